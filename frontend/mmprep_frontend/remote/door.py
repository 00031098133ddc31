"""The socket for backends on other hosts: who is there, and when somebody is not any more.

Another host's processes hold no lock here. A backend is given up, and what it had is given back,

* when its connection ends: ZeroMQ then knows no way to it (seen within :data:`_ALIVE_SECONDS`, since it is told something
  that often), or a new connection of the same backend comes;
* when it says nothing for as long as a lease holds: its process is stopped, or its host is;
* when it does not read: more waits for it than may;
* when it breaks the protocol, or its key is not known any more.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

import mmprep
from mmprep.errors import Busy, InvalidRequest, MmprepError, ProtocolError, ServiceUnavailable, StartupError
from mmprep.logs import event
from mmprep.metrics import Metrics
from mmprep.remote.curve import read_secret
from mmprep.remote.endpoint import TcpEndpoint, host_id
from mmprep.runtime import RuntimeDir
from mmprep.settings import RemoteSettings
from mmprep.wire import messages
from mmprep.wire import remote_messages as remote
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.configured import configure
from mmprep.wire.sockets import ANY_HANDSHAKE_FAILURE, Pump
from mmprep_frontend.remote.gatekeeper import DOMAIN, Gatekeeper
from mmprep_frontend.remote.session import CHUNK, CREDITS, Session

_log = logging.getLogger("mmprep.remote")

_OVER = "the session is over: connect again"
#: Backends at a time.
_MOST_SESSIONS = 256
_TICK_SECONDS = 0.25
_ALIVE_SECONDS = 1.0
#: Seconds between two lines of the log about connections that were refused.
_LOG_SECONDS = 1.0
#: Bytes of jobs and other words that may wait for a backend, beside its chunks.
_OTHER_BYTES = 32 << 20
#: Messages that ZeroMQ takes for one peer; what is more waits here, where it is counted.
_HIGH_WATER = 64
#: Milliseconds for a handshake, and of ZeroMQ's own heartbeat, which ends connections of hosts that are gone.
_HANDSHAKE_MS, _HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 5000, 2000, 10_000


class RemoteDoor:
    """Serves backends on other hosts.

    Parameters
    ----------
    runtime:
        Of the service.
    endpoint:
        Where to listen.
    settings:
        With the files of keys; without them nothing is encrypted and everybody may connect.

    Raises
    ------
    StartupError
        A file of a key is wrong, or there is no listening there.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        runtime: RuntimeDir,
        endpoint: TcpEndpoint,
        settings: RemoteSettings,
        metrics: Metrics,
    ) -> None:
        self._context = context
        self._runtime = runtime
        self._endpoint = endpoint
        self._metrics = metrics
        self._host = host_id()
        self._sessions: dict[bytes, Session] = {}
        #: By the backend's id; also those that are being closed.
        self._by_id: dict[str, Session] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._gatekeeper: Gatekeeper | None = None
        self._told_at = float("-inf")
        socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        configure(socket)
        socket.sndhwm = _HIGH_WATER
        socket.ipv6 = endpoint.is_ipv6
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        try:
            self._secure(socket, settings)
            monitor = socket.get_monitor_socket(ANY_HANDSHAKE_FAILURE)
            socket.bind(str(endpoint))
        except zmq.ZMQError as error:
            socket.close()
            raise StartupError(
                f"--remote-endpoint {endpoint}: cannot listen there ({os.strerror(error.errno or 0)})"
            ) from None
        self._monitor = Pump(monitor, self._handshake_failed)
        self._pump = Pump(socket, self._on_message, outbox_bytes=CHUNK * CREDITS + _OTHER_BYTES, copy=False)
        self._ticking = asyncio.create_task(self._tick())

    def _secure(self, socket: zmq.Socket[bytes], settings: RemoteSettings) -> None:
        if settings.curve_key_file is None or settings.curve_clients_dir is None:
            return
        _, secret = read_secret(Path(settings.curve_key_file), "--curve-key-file")
        self._gatekeeper = Gatekeeper(self._context, Path(settings.curve_clients_dir))
        socket.curve_secretkey = secret
        socket.curve_server = True
        socket.zap_domain = DOMAIN.encode()

    async def close(self) -> None:
        """Give back all that backends have, and close."""
        self._ticking.cancel()
        for session in list(self._sessions.values()):
            self._end(session, "stopped")
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        self._pump.close()
        self._monitor.close()
        if self._gatekeeper is not None:
            self._gatekeeper.close()

    @property
    def status(self) -> dict[str, Any]:
        """What the service's status says."""
        return {
            "endpoint": str(self._endpoint),
            "encrypted": self._gatekeeper is not None,
            "backends": [session.status for session in self._sessions.values()],
        }

    # --- messages -------------------------------------------------------------------------------------------------

    def _handshake_failed(self, frames: list[Any]) -> None:
        failed = parse_monitor_message(frames)["event"]
        why = "unknown key" if failed == zmq.EVENT_HANDSHAKE_FAILED_AUTH else "handshake"
        self._metrics.count("mmprep_refused_total", link="remote", error=why)
        now = time.monotonic()
        if now - self._told_at >= _LOG_SECONDS:  # anybody can make these
            self._told_at = now
            event(_log, logging.WARNING, "a connection was refused", reason=why)

    def _on_message(self, frames: list[zmq.Frame]) -> None:
        peer = frames[0].bytes
        session = self._sessions.get(peer)
        try:
            if len(frames) != 2:
                raise ProtocolError("a message to this door is one frame")
            message = unpack(frames[1].buffer, remote.ToDoor)
            user = self._user(frames[1])
            if isinstance(message, remote.RemoteHello):
                self._hello(peer, message, user, session)
            elif session is None:
                raise ProtocolError("the first message of a connection is a hello")
            elif session.user != user:
                raise ProtocolError("the connection is another one's")
            else:
                self._heard(peer, session, message)
        except MmprepError as error:
            self._refuse(peer, session, error)

    def _user(self, frame: zmq.Frame) -> str:
        return "" if self._gatekeeper is None else str(frame.get("User-Id"))

    def _heard(self, peer: bytes, session: Session, message: msgspec.Struct) -> None:
        session.heard_at = time.monotonic()
        match message:
            case remote.Alive():
                pass
            case remote.Bye():
                del self._sessions[peer]
                closing = self._end(session, "left")
                closing.add_done_callback(lambda _: self._send(peer, messages.Done(message.call)))
            case _:
                session.take(message)

    def _hello(self, peer: bytes, hello: remote.RemoteHello, user: str, session: Session | None) -> None:
        if hello.protocol != PROTOCOL:
            raise ProtocolError(
                f"this service speaks protocol {PROTOCOL}, the backend {hello.protocol}; use one version"
            )
        if session is not None:
            raise ProtocolError("a connection says hello once")
        if hello.host and hmac.compare_digest(hello.host, self._host):
            self._send(peer, remote.Neighbour(str(self._runtime.path), bytes.fromhex(self._runtime.runtime_id)))
            return
        closing = self._make_way(hello, user)
        if closing is None and len(self._by_id) >= _MOST_SESSIONS:
            raise Busy(f"{_MOST_SESSIONS} backends are connected; try again later", retry_after=10.0)
        new = Session(
            self._context,
            self._runtime,
            hello,
            user=user,
            send=partial(self._say, peer),
            metrics=self._metrics,
            former=closing,
        )
        self._sessions[peer] = self._by_id[hello.id] = new
        self._start(self._open(peer, new))

    def _make_way(self, hello: remote.RemoteHello, user: str) -> asyncio.Task[None] | None:
        """End the session that has the id of a hello; return what ends when that is done, ``None``: there is none.

        Raises
        ------
        InvalidRequest
            It is another living backend's.
        """
        former = self._by_id.get(hello.id)
        if former is None:
            return None
        for peer in [peer for peer, session in self._sessions.items() if session is former]:
            self._say(peer, remote.Alive())  # whose connection is gone is not alive
        same = former.user == user and hmac.compare_digest(former.instance, hello.instance)
        if not same and not former.closing:
            raise InvalidRequest(
                f"a living process is registered as {hello.id!r}; choose another backend id", param="backend_id"
            )
        return self._end(former, "replaced")

    async def _open(self, peer: bytes, session: Session) -> None:
        try:
            await session.open()
        except MmprepError as error:
            self._refuse(peer, session, error)
            return
        if session.ready:
            welcome = remote.RemoteWelcome(PROTOCOL, mmprep.__version__, int(session.seconds * 1000), CHUNK, CREDITS)
            self._send(peer, welcome)

    def _refuse(self, peer: bytes, session: Session | None, error: MmprepError) -> None:
        self._metrics.count("mmprep_refused_total", link="remote", error=type(error).__name__)
        event(_log, logging.WARNING, "a backend was refused", reason=str(error))
        self._send(peer, messages.Refused(messages.Fault.of(error)))
        if session is not None:  # which has heard why
            self._sessions.pop(peer, None)
            self._end(session, "refused")

    # --- out ------------------------------------------------------------------------------------------------------

    def _say(self, peer: bytes, message: msgspec.Struct, *frames: Any) -> None:
        """Send something to a backend, or give it up."""
        why = self._send(peer, message, *frames)
        session = self._sessions.get(peer)
        if why is not None and session is not None:
            self._end(session, why)

    def _send(self, peer: bytes, message: msgspec.Struct, *frames: Any) -> str | None:
        """Send something; return why that cannot be."""
        try:
            self._pump.send([peer, pack(message), *frames])
        except zmq.ZMQError:
            return "lost"
        except Busy:
            return "not reading"
        return None

    # --- ends -----------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        said = 0.0
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            now = time.monotonic()
            say = now - said >= _ALIVE_SECONDS
            said = now if say else said
            for peer, session in list(self._sessions.items()):
                try:
                    self._look_at(peer, session, now, say=say)
                except Exception:  # noqa: BLE001 -- whatever is wrong with one must not keep the others
                    _log.exception("a session could not be looked at")
                    self._end(session, "broken")

    def _look_at(self, peer: bytes, session: Session, now: float, *, say: bool) -> None:
        if now - session.heard_at > session.seconds:
            self._end(session, "silent")
        elif self._gatekeeper is not None and not self._gatekeeper.knows(session.user):
            self._end(session, "key removed")
        else:
            if say:
                self._say(peer, remote.Alive())
            session.tick(now)

    def _end(self, session: Session, why: str) -> asyncio.Task[None]:
        """Give back what a backend had; the returned task ends when that is done."""
        first = not session.closing
        closing = session.close()
        if first:
            self._metrics.count("mmprep_remote_sessions_total", end=why)
            event(_log, logging.INFO, "a backend on another host is gone", backend=session.id, reason=why)
            for peer in [peer for peer, one in self._sessions.items() if one is session]:
                del self._sessions[peer]
                self._send(peer, messages.Refused(messages.Fault.of(ServiceUnavailable(_OVER))))
            self._tasks.add(closing)
            closing.add_done_callback(partial(self._ended, session))
        return closing

    def _ended(self, session: Session, closing: asyncio.Task[None]) -> None:
        self._tasks.discard(closing)
        if self._by_id.get(session.id) is session:
            del self._by_id[session.id]
        if not closing.cancelled() and closing.exception() is not None:
            _log.error("a session did not end as it should", exc_info=closing.exception())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
