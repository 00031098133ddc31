"""A backend's connection to the door of a service on another host: keys, hello, calls, and a new one when it is lost.

Every connection is a session of its own at the door, which has nothing of the one before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import zmq

import mmprep
from mmprep.errors import CLOSED, AuthenticationError, InvalidRequest, MmprepError, ServiceUnavailable
from mmprep.remote.curve import RemoteKeys
from mmprep.remote.endpoint import TcpEndpoint, host_id
from mmprep.runtime import RuntimeDir
from mmprep.segment import segments_of
from mmprep.wire import messages
from mmprep.wire import remote_messages as remote
from mmprep.wire.calls import CallTable, WriterLostError
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.sockets import Link
from mmprep.wire.standing import Standing

#: Seconds for one word with the door, its replacement included.
_CALL_SECONDS = 10.0
#: Seconds after a loss, until the door is tried again.
_PAUSE_SECONDS = 0.2
#: Milliseconds between two heartbeats of ZeroMQ's own, and until one that is not answered ends the connection.
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 2000, 10_000
_CONNECT_MS = 5000
_LOST = "the connection to the service was lost; try again"


class Handlers(NamedTuple):
    """What is called on the loop: with the door's welcome, with what it says unasked, and when the session is over."""

    welcomed: Callable[[remote.RemoteWelcome], None]
    said: Callable[[msgspec.Struct, list[zmq.Frame]], None]
    over: Callable[[type[MmprepError], str], None]


class DoorConnection:
    """One backend's connection, made anew by itself.

    Parameters
    ----------
    endpoint, keys:
        Of the door.
    backend_id, queues, credits:
        As in :class:`~mmprep.wire.remote_messages.RemoteHello`.
    receives:
        Tensors are to travel even where the service is on this host.

    Attributes
    ----------
    near: the service's runtime directory where it is on this host; then there is no session.
    up: there is a session.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: TcpEndpoint,
        keys: RemoteKeys,
        backend_id: str,
        *,
        queues: tuple[str, ...],
        credits: int,  # noqa: A002 -- the word for it
        receives: bool,
        handlers: Handlers,
    ) -> None:
        self.near: RuntimeDir | None = None
        self.up = False
        self._keys = keys
        self._id = backend_id
        self._queues = queues
        self._credits = credits
        self._host = b"" if receives else host_id()
        self._handlers = handlers
        self._instance = os.urandom(16)
        self._calls = CallTable()
        self._known = False
        self._standing = Standing()
        self._ipv6 = endpoint.is_ipv6
        self._link = Link(
            context,
            str(endpoint),
            f"backend:{backend_id}",
            greeting=self._greeting,
            on_message=self._on_message,
            on_down=self._on_down,
            frame_limit=remote.MAX_CHUNK,
            copy=False,
            tune=self._tune,
            on_refusal=self._handshake_failed,
            pause=_PAUSE_SECONDS,
        )

    # --- words with the door --------------------------------------------------------------------------------------

    async def ready(self, seconds: float) -> None:
        """Wait for a session, or until the service was found to be on this host.

        Raises
        ------
        AuthenticationError
            The keys do not fit.
        ServiceUnavailable
            Nobody answered within ``seconds``.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._standing.until(lambda: self.up or self.near is not None)
        except TimeoutError:
            raise ServiceUnavailable(
                "no service answers at this endpoint; is it started with --remote-endpoint?"
            ) from None

    async def call(self, make: Callable[[int], msgspec.Struct]) -> Any:
        """Ask the door, and the next one where the connection is lost before it answers: every call may be made twice."""
        return await self._calls.ask(
            lambda number: self.tell(make(number)),
            self._connected,
            seconds=_CALL_SECONDS,
            silence="the service did not answer",
        )

    async def _connected(self) -> None:
        if not self._standing.closed:
            await self._standing.until(lambda: self.up)

    def tell(self, message: msgspec.Struct) -> None:
        """Say something that is not answered; nobody hears it where there is no session."""
        self._link.send([pack(message)])

    def ask(self, make: Callable[[int], msgspec.Struct], answered: Callable[[asyncio.Future[Any]], None]) -> None:
        """Ask without waiting for the answer."""
        self._calls.begin(lambda number: self.tell(make(number)), answered)

    def give_up(self) -> None:
        """End this session and begin another one: nothing that came in it can be relied on."""
        self._link.reopen()

    async def close(self, seconds: float) -> None:
        """Leave; the door gets ``seconds`` to give back what this backend had."""
        self._standing.closed = True
        if self.up:
            with contextlib.suppress(MmprepError, TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.call(remote.Bye)
        self._link.close()
        self._end(InvalidRequest, CLOSED)

    def _end(self, kind: type[MmprepError], why: str) -> None:
        """The session is over."""
        self.up = False
        self._handlers.over(kind, why)
        self._calls.fail_all(kind, why)
        self._standing.note()

    # --- the connection -------------------------------------------------------------------------------------------

    def _tune(self, socket: zmq.Socket[bytes]) -> None:
        self._keys.apply(socket)
        socket.ipv6 = self._ipv6
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)

    def _greeting(self) -> list[bytes]:
        hello = remote.RemoteHello(
            PROTOCOL, mmprep.__version__, self._id, self._instance, self._queues, self._credits, self._host
        )
        return [pack(hello)]

    def _on_down(self) -> None:
        self._end(WriterLostError, _LOST)

    def _handshake_failed(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            why = "the service does not know this backend's key: put its public key into the service's --curve-clients-dir"
        elif self._known and event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            return  # a service that was there before is going away
        elif self._keys.given:
            why = "the handshake failed: curve_server_key_file is not this service's key, or it listens without keys"
        else:
            why = "the handshake failed: the service wants keys; give curve_key_file and curve_server_key_file"
        self._refuse(AuthenticationError(why))

    def _refused(self, error: MmprepError) -> None:
        """The door has ended the session, or begins none: say so to those who wait, and try another connection."""
        if not (self.up and isinstance(error, ServiceUnavailable)):
            self._refuse(error)
        self._link.reopen()

    def _refuse(self, error: MmprepError) -> None:
        self._standing.refusal = error
        self._calls.fail_all(ServiceUnavailable, error.message)
        self._standing.note()

    def _on_message(self, frames: list[zmq.Frame]) -> None:
        message = unpack(frames[0].buffer, remote.FromDoor)
        match message:
            case remote.RemoteWelcome():
                self._host = b""  # where it is now it stays
                self._standing.refusal, self.up, self._known = None, True, True
                self._handlers.welcomed(message)
                self._standing.note()
            case remote.Neighbour():
                self._is_near(message)
            case messages.Refused():
                self._refused(message.fault.error())
            case remote.Opened():
                self._calls.resolve(message.call, (message, b"".join(frame.bytes for frame in frames[1:2])))
            case messages.Failed():
                self._calls.resolve(message.call, message.fault.error())
            case messages.Done() | messages.Renewed() | messages.Kept():
                self._calls.resolve(message.call, message)
            case remote.Alive():
                pass
            case _ if self.up:
                self._handlers.said(message, frames[1:])

    def _is_near(self, neighbour: remote.Neighbour) -> None:
        """Use the service's shared memory, where it can be seen from here; containers of one host may not see it."""
        runtime, runtime_id = RuntimeDir(neighbour.runtime_dir), neighbour.runtime_id.hex()
        self._host = b""
        with contextlib.suppress(OSError):
            if runtime.runtime_id == runtime_id and segments_of(runtime_id):
                self.near = runtime
                self._standing.note()
                return
        self._link.send(self._greeting())
