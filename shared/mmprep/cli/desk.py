"""Asking the processes of a running service, synchronously: its supervisor, and its writer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Self

import msgspec
import zmq

from mmprep import __version__
from mmprep.errors import ServiceUnavailable
from mmprep.runtime import RuntimeDir, default_path
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.configured import configure

_FRAME_LIMIT = 64 << 20
_SECONDS = 5.0
_SILENT = "the service does not answer; is it stopped or overloaded?"


class _Connection:
    """A connection to one process of the service of a runtime directory; a context manager.

    Parameters
    ----------
    answers:
        The messages that it may send.

    Raises
    ------
    ServiceUnavailable
        No service runs there, or it does not answer.
    """

    def __init__(self, runtime: RuntimeDir, endpoint: str, answers: Any) -> None:
        if not runtime.path.is_dir() or runtime.service_pid() is None:
            raise ServiceUnavailable(f"no service runs in {runtime.path}; start it with: mmprep serve")
        self._answers = answers
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        configure(self._socket, frame_limit=_FRAME_LIMIT)
        self._socket.rcvtimeo = self._socket.sndtimeo = int(_SECONDS * 1000)
        self._socket.connect(endpoint)
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

    def _number(self) -> int:
        self._calls += 1
        return self._calls

    def _send(self, message: msgspec.Struct) -> None:
        try:
            self._socket.send(pack(message))
        except zmq.Again:  # nobody listens
            raise ServiceUnavailable(_SILENT) from None

    def _receive(self) -> tuple[Any, list[bytes]]:
        try:
            frames = self._socket.recv_multipart()
        except zmq.Again:
            raise ServiceUnavailable(_SILENT) from None
        message = unpack(frames[0], self._answers)
        if isinstance(message, messages.Refused | messages.Failed):
            raise message.fault.error()
        return message, frames[1:]


class DeskClient(_Connection):
    """A connection to the supervisor of one runtime directory; ``None`` is the default one."""

    def __init__(self, runtime_dir: str | None) -> None:
        runtime = RuntimeDir(runtime_dir or default_path())
        super().__init__(runtime, runtime.supervisor, messages.FromSupervisor)

    def status(self) -> dict[str, Any]:
        """Return the service's status."""
        self._send(messages.Ask(self._number(), "status"))
        _, (told,) = self._receive()
        status: dict[str, Any] = msgspec.json.decode(told)
        return status


class WriterClient(_Connection):
    """A connection to the writer of one runtime directory; ``None`` is the default one."""

    def __init__(self, runtime_dir: str | None) -> None:
        runtime = RuntimeDir(runtime_dir or default_path())
        super().__init__(runtime, runtime.writer, messages.FromWriter)

    def clear(self) -> messages.Cleared:
        """Drop every entry of the ring that nobody holds; what somebody holds goes when it is let go."""
        self._send(messages.Clear(self._number()))
        cleared, _ = self._receive()
        assert isinstance(cleared, messages.Cleared)
        return cleared

    def entries(self) -> Iterator[messages.InspectedEntry]:
        """Yield the entries by slot, page by page: each page is of its own moment."""
        start = 0
        while True:
            self._send(messages.Inspect(self._number(), start))
            page, _ = self._receive()
            assert isinstance(page, messages.Inspected)
            yield from page.entries
            start = page.start
            if not start:
                return
