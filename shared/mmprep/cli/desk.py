"""Asking a running service's supervisor, synchronously."""

from __future__ import annotations

import os
from typing import Any, Self

import msgspec
import zmq

from mmprep import __version__
from mmprep.errors import ServiceUnavailable
from mmprep.runtime import RuntimeDir, default_path
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.sockets import configure

_FRAME_LIMIT = 64 << 20
_SECONDS = 5.0
_SILENT = "the service does not answer; is it stopped or overloaded?"


class DeskClient:
    """A connection to the supervisor of one runtime directory; a context manager.

    Raises
    ------
    ServiceUnavailable
        No service runs there.
    """

    def __init__(self, runtime_dir: str | None) -> None:
        runtime = RuntimeDir(runtime_dir or default_path())
        if not runtime.path.is_dir() or runtime.service_pid() is None:
            raise ServiceUnavailable(f"no service runs in {runtime.path}; start it with: mmprep serve")
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        configure(self._socket, frame_limit=_FRAME_LIMIT)
        self._socket.rcvtimeo = self._socket.sndtimeo = int(_SECONDS * 1000)
        self._socket.connect(runtime.supervisor)
        self._calls = 0
        try:
            hello = messages.Hello(PROTOCOL, __version__, "control", f"cli-{os.getpid()}", os.getpid())
            self._send(hello)
            self._receive()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        self._context.destroy(linger=0)

    def status(self) -> dict[str, Any]:
        """Return the service's status."""
        self._calls += 1
        self._send(messages.Ask(self._calls, "status"))
        status: dict[str, Any] = msgspec.json.decode(self._receive()[1])
        return status

    def _send(self, message: msgspec.Struct) -> None:
        try:
            self._socket.send(pack(message))
        except zmq.Again:  # nobody listens
            raise ServiceUnavailable(_SILENT) from None

    def _receive(self) -> list[bytes]:
        try:
            frames = self._socket.recv_multipart()
        except zmq.Again:
            raise ServiceUnavailable(_SILENT) from None
        message = unpack(frames[0], messages.FromSupervisor)
        if isinstance(message, messages.Refused | messages.Failed):
            raise message.fault.error()
        return frames
