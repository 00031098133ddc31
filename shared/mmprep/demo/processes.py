"""The two processes of the demonstration: the service, and the backend that reads what it made.

Both run in sessions of their own, so that Ctrl-C at a terminal reaches the demonstration alone, which then ends them in
order. The service is ``mmprep serve`` as anybody would start it; options of it in the environment are left out, since the
demonstration is of the embedded model as it comes.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, Self

from mmprep.cli.attended import attended
from mmprep.cli.ready import url_in
from mmprep.errors import ServiceUnavailable, StartupError
from mmprep.ports import claim_port
from mmprep.runtime import RuntimeDir, default_path
from mmprep.segment import SHM_DIRECTORY, free_space

HOST = "127.0.0.1"
#: Bytes of the ring; less where /dev/shm has less free.
CACHE_SIZE = 256 << 20
_LEAST_CACHE = 16 << 20
#: Seconds; above the drain and kill times of the service, which end it before.
_LONGEST_STOP = 60.0


def choose_port(port: int) -> tuple[int, str | None]:
    """Return ``port``, or 0 and why where another process listens there."""
    if port:
        try:
            claim_port(HOST, port).close()
        except StartupError:
            return 0, f"port {port} is taken; the service gets a free one"
    return port, None


@contextmanager
def runtime_directory(given: str | None) -> Iterator[tuple[str, str | None]]:
    """Give the runtime directory, and why where it is another than the default one, which is then removed."""
    if given is not None:
        yield given, None
        return
    default = RuntimeDir(default_path())
    if default.service_pid() is None:
        yield str(default.path), None
        return
    with tempfile.TemporaryDirectory(prefix="mmprep-", dir="/tmp") as temporary:
        yield temporary, f"a service runs in {default.path}; this one gets {temporary}"


def choose_cache_size() -> tuple[int, str | None]:
    """Return the bytes for the ring, and why where they are fewer than :data:`CACHE_SIZE`."""
    space = free_space()
    if space is None or space[0] >= CACHE_SIZE * 2:
        return CACHE_SIZE, None
    size = max(_LEAST_CACHE, space[0] // 2 >> 20 << 20)
    if size >= CACHE_SIZE:
        return CACHE_SIZE, None
    return size, f"{SHM_DIRECTORY} has {space[0] >> 20} MiB free; the ring gets {size >> 20} MiB of it"


class Service:
    """``mmprep serve`` as a child process; a context manager that stops it."""

    def __init__(self, runtime_dir: str, port: int, cache_size: int) -> None:
        command = attended("serve", "--host", HOST, "--port", str(port))
        command += ["--runtime-dir", runtime_dir, "--cache-size", str(cache_size), "--drain-timeout", "2s"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MMPREP_")}
        self.runtime_dir = runtime_dir
        self.port = 0
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment,
        )
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_LONGEST_STOP)
        except subprocess.TimeoutExpired:  # its children end with it: it holds their standard input
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def line(self, seconds: float) -> str | None:
        """Return the next line that the service prints, or ``None`` where it prints none in this time.

        Raises
        ------
        ServiceUnavailable
            It has ended.
        """
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return None
        if line is None:
            self._lines.put(None)
            raise ServiceUnavailable(f"the service has ended with status {self._process.wait()}")
        url = url_in(line)
        if url is not None:
            self.port = int(url.rpartition(":")[2])
        return line

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)


class BackendProcess:
    """``python -m mmprep.demo.backend`` as a child process; a context manager that ends it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mmprep.demo.backend"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_LONGEST_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def send(self, **call: Any) -> None:
        """Send a call; :meth:`receive` gives its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{json.dumps(call)}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ServiceUnavailable("the backend process has ended; its message stands above") from None

    def receive(self) -> dict[str, Any]:
        """Return the answer of the oldest call without one; raises ServiceUnavailable where the call failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ServiceUnavailable("the backend process has ended; its message stands above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ServiceUnavailable(f"the backend process: {answer['error']}")
        return answer

    def call(self, **call: Any) -> dict[str, Any]:
        """Send a call and return its answer."""
        self.send(**call)
        return self.receive()
