"""ZeroMQ sockets on an asyncio loop, without ``zmq.asyncio``'s futures (half the cost a message).

ZeroMQ's file descriptor is edge-triggered and also consumed by sends: after each send and after each batch of receives
the socket's events are looked at again, or messages would lie unread until the next one comes.

WARNING: nothing here blocks. A send that the socket does not take at once waits in a bounded outbox; above the bound it
is refused with :class:`~mmprep.errors.Busy`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import zmq
from zmq.utils.monitor import parse_monitor_message

from mmprep.errors import MmprepError
from mmprep.wire.codec import CONTROL_LIMIT, MAX_FRAMES
from mmprep.wire.configured import RECONNECT_MS, configure
from mmprep.wire.frames import Frames, ready, recv_frames, send_frames
from mmprep.wire.outbox import Outbox

Handler: TypeAlias = Callable[[list[Any]], None]

_log = logging.getLogger("mmprep.wire")

_BATCH = 64
#: Seconds until a peer that has refused a connection is asked for another one.
_REOPEN_SECONDS = 0.5
#: A peer is there, and the two do not agree on how to speak: on CURVE, on a key, or on ZeroMQ at all.
HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
)
#: All of them, as a socket's monitor is asked for them.
ANY_HANDSHAKE_FAILURE = HANDSHAKE_FAILURES[0] | HANDSHAKE_FAILURES[1] | HANDSHAKE_FAILURES[2]
#: Messages that may wait for one peer.
_MOST_WAITING = 65_536
#: Seconds until a peer that took nothing is tried again.
_RETRY_SECONDS = 0.005


class Pump:
    """Moves messages between one socket and one handler on the running loop.

    Parameters
    ----------
    socket:
        Configured by :func:`~mmprep.wire.configured.configure`; owned by the pump from now on. Of a ROUTER, the first frame names the peer, and
        one peer that does not read holds up no other.
    handler:
        Called with the frames of each message, on the loop.
    outbox_bytes:
        How many bytes may wait for one peer.
    copy:
        False: frames are ``zmq.Frame`` objects whose buffers need no copy; for bulk.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], handler: Handler, *, outbox_bytes: int = 64 << 20, copy: bool = True
    ) -> None:
        self._socket = socket
        self._handler = handler
        self._copy = copy
        self._routes = socket.type == zmq.ROUTER
        self._outbox = Outbox(max_messages=_MOST_WAITING, max_bytes=outbox_bytes)
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._woken = False
        self._retry: asyncio.TimerHandle | None = None
        self._closed = False
        self._loop.add_reader(self._fd, self._run)
        self._wake()

    def send(self, frames: Frames) -> None:
        """Send one message, now or when the socket takes it.

        Raises
        ------
        Busy
            The outbox is full: the other side does not keep up.
        zmq.ZMQError
            A ROUTER does not know the peer (any more): ``EHOSTUNREACH``.
        """
        if self._closed:
            return
        peer = frames[0] if self._routes else b""
        if self._outbox.holds(peer) or not self._try(frames):
            self._outbox.add(peer, frames)
        self._wake()

    def close(self, *, linger_ms: int = 0) -> None:
        """Close the socket; what waits in the outbox is dropped.

        Parameters
        ----------
        linger_ms:
            For so long ZeroMQ goes on to deliver what it has taken; ending the context waits for that.
        """
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            if self._retry is not None:
                self._retry.cancel()
            self._socket.close(linger_ms)

    def _try(self, frames: Frames) -> bool:
        try:
            send_frames(self._socket, frames)
        except zmq.Again:
            return False
        return True

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._woken = False
        for _ in range(_BATCH):
            if self._closed:
                return
            # One look serves both directions: a look that finds the socket writable has used up the signal that says so.
            readable, writable = ready(self._socket)
            sent = writable and bool(self._outbox) and self._flush()
            if readable:
                # One frame too many is as bad as a million, and tells the handler.
                self._handle(recv_frames(self._socket, copy=self._copy)[: MAX_FRAMES + 1])
            elif not sent:
                if writable and self._outbox:
                    self._run_later()
                return
        self._wake()

    def _run_later(self) -> None:
        """A ROUTER is always writable, whoever of its peers is not: only time can tell when to try again."""
        if self._retry is None:
            self._retry = self._loop.call_later(_RETRY_SECONDS, self._run_again)

    def _run_again(self) -> None:
        self._retry = None
        self._run()

    def _handle(self, frames: list[Any]) -> None:
        try:
            self._handler(frames)
        except MmprepError as error:
            _log.warning("a message was refused: %s", error)
        except Exception:  # noqa: BLE001 -- one bad message must not stop the pump
            _log.exception("a message could not be handled")

    def _flush(self) -> bool:
        """Send what waits; return whether anything went."""
        went = False
        for peer, frames in list(self._outbox.first()):
            try:
                if self._try(frames):
                    self._outbox.sent(peer)
                    went = True
            except zmq.ZMQError:  # a peer that is gone needs no answer
                self._outbox.drop(peer)
        return went


class Link:
    """A DEALER that is one peer of a ROUTER, and starts afresh when the other side goes away.

    A DEALER that reconnects would replay messages that were meant for a dead process. So a socket has one connection in
    its life, and every loss closes it; the next one has a new random identity (an *incarnation*), greets anew, and
    ``on_down`` tells the owner that all calls under way are lost.

    Parameters
    ----------
    endpoint:
        Of the ROUTER, ``ipc://…``.
    name:
        For the identity: role and id, for logs of the other side.
    greeting:
        Gives the frames of the first message of every incarnation.
    on_message, on_down:
        Called on the loop.
    frame_limit:
        The largest frame received, in bytes.
    tune:
        Sets more options of each new socket, as those of ``tcp://``.
    on_refusal:
        Called with the event, one of :data:`HANDSHAKE_FAILURES`, where the other side is there and does not agree with how
        this one wants to be spoken to.
    pause:
        Seconds between a loss and the next try.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        name: str,
        *,
        greeting: Callable[[], Frames],
        on_message: Handler,
        on_down: Callable[[], None],
        frame_limit: int = CONTROL_LIMIT,
        copy: bool = True,
        tune: Callable[[zmq.Socket[bytes]], None] | None = None,
        on_refusal: Callable[[int], None] | None = None,
        pause: float = 0.0,
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._name = name
        self._greeting = greeting
        self._on_message = on_message
        self._on_down = on_down
        self._frame_limit = frame_limit
        self._copy = copy
        self._tune = tune
        self._on_refusal = on_refusal
        self._pause = pause
        self._pump: Pump | None = None
        self._monitor: Pump | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._open()

    def send(self, frames: Frames) -> None:
        """Send one message to the present incarnation of the other side; see :meth:`Pump.send`."""
        if self._pump is not None:
            self._pump.send(frames)

    def reopen(self) -> None:
        """Give this connection up, and open another one soon: the other side has refused it."""
        self.close()
        self._on_down()
        self._retry = asyncio.get_running_loop().call_later(_REOPEN_SECONDS, self._open)

    def close(self, *, linger_ms: int = 0) -> None:
        """Close for good; see :meth:`Pump.close`."""
        if self._retry is not None:
            self._retry.cancel()
        if self._socket is not None:
            self._socket.disable_monitor()
        if self._monitor is not None:
            self._monitor.close()
        if self._pump is not None:
            self._pump.close(linger_ms=linger_ms)
        self._pump = self._monitor = self._socket = None

    def _open(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        configure(socket, frame_limit=self._frame_limit)
        socket.routing_id = f"{self._name}:{os.urandom(8).hex()}".encode()
        # ZeroMQ would connect again before this loop hears of the loss, and send what waits to whoever is there then.
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        if self._tune is not None:
            self._tune(socket)
        events = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
        monitor = socket.get_monitor_socket(events if self._on_refusal is None else events | ANY_HANDSHAKE_FAILURE)
        socket.connect(self._endpoint)
        self._socket = socket
        self._pump = Pump(socket, self._on_message, copy=self._copy)
        self._monitor = Pump(monitor, self._monitored)
        self._pump.send(self._greeting())

    def _monitored(self, frames: list[Any]) -> None:
        event = parse_monitor_message(frames)["event"]
        if event in HANDSHAKE_FAILURES:
            if self._on_refusal is not None:
                self._on_refusal(event)
        elif event == zmq.EVENT_DISCONNECTED:
            self._restart()
        elif self._socket is not None:  # nobody is there yet
            loop = asyncio.get_running_loop()
            seconds = max(self._pause, RECONNECT_MS / 1000)
            self._retry = loop.call_later(seconds, self._connect_again, self._socket)

    def _connect_again(self, socket: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.ZMQError):  # it has forgotten the endpoint already
            socket.disconnect(self._endpoint)
        socket.connect(self._endpoint)

    def _restart(self) -> None:
        self.close()
        self._on_down()
        if self._pause:
            self._retry = asyncio.get_running_loop().call_later(self._pause, self._open)
        else:
            self._open()
