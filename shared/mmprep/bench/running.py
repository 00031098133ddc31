"""Services that the benchmark starts for itself, each in a runtime directory of its own, and small child processes.

A child of the benchmark is a module of this package that reads one line of JSON, makes itself ready, says ``ready``, waits
for the line ``go``, works, and answers with one line of JSON. Its standard input then ends, and so does the child.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, Self

import zmq

from mmprep import embedded
from mmprep.cli.attended import attended
from mmprep.cli.desk import DeskClient
from mmprep.cli.ready import url_when_ready
from mmprep.errors import ServiceUnavailable

Mode = Literal["cold", "cached", "by uuid"]

#: The largest picture in pixels that Qwen2-VL's published configuration does not shrink.
MAX_PIXELS = 12845056

#: The ring of a service that is measured, and of one that only shows that measuring works.
RING, SMALL_RING = "1GiB", "256MiB"
_SECONDS_TO_STOP = 30.0


def full_size_model(directory: Path, source: Path | None = None) -> Path:
    """Copy a model directory (by default the embedded one) and let pictures keep their size, as the published models do.

    Parameters
    ----------
    directory:
        Made; must not exist.
    source:
        With a ``preprocessor_config.json`` of the Qwen2-VL family.
    """
    shutil.copytree(source or embedded.path(), directory, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    path = directory / "preprocessor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for old in ("min_pixels", "max_pixels"):
        config.pop(old, None)
    config["size"] = {"shortest_edge": 3136, "longest_edge": MAX_PIXELS}
    path.write_text(json.dumps(config), encoding="utf-8")
    return directory


class Service:
    """A running service.

    Attributes
    ----------
    runtime_dir, url, port: where it is reached.
    ready_seconds: from the start of its process until it said that it takes requests.
    """

    def __init__(
        self,
        process: subprocess.Popen[str],
        reader: threading.Thread,
        runtime_dir: str,
        port: int,
        ready_seconds: float,
    ) -> None:
        self._process = process
        self._reader = reader
        reader.start()
        self.runtime_dir = runtime_dir
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.ready_seconds = ready_seconds

    def pids(self) -> dict[str, list[int]]:
        """Return the processes by role: frontends, writer, lanes, supervisor."""
        with DeskClient(self.runtime_dir) as desk:
            status = desk.status()
        return {
            "frontends": [frontend["pid"] for frontend in status["frontends"]],
            "writer": [status["worker"]["pid"]],
            "lanes": [lane["pid"] for lane in status["lanes"]],
            "supervisor": [status["supervisor"]["pid"]],
        }

    def ring(self) -> dict[str, int]:
        """Return the ring's part of the status, sizes in bytes."""
        with DeskClient(self.runtime_dir) as desk:
            ring: dict[str, int] = desk.status()["ring"]
        return ring

    def stop(self) -> None:
        """End the service and wait until it is gone."""
        self._process.terminate()
        try:
            self._process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()


@contextlib.contextmanager
def service(
    model: Path,
    *,
    frontends: int,
    lanes: int,
    cache_size: str = RING,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Service]:
    """Start a service from the main thread, give it, and stop it; it ends with this process, however that ends.

    Parameters
    ----------
    options:
        More options of ``mmprep serve``.

    Raises
    ------
    ServiceUnavailable
        It did not get ready; its own message has gone to our standard error.
    """
    with tempfile.TemporaryDirectory(prefix="mmprep-bench-", dir="/tmp") as directory:
        runtime_dir = f"{directory}/r"
        command = attended("serve", str(model), "--runtime-dir", runtime_dir)
        command += ["--port", "0", "--frontends", str(frontends), "--lanes", str(lanes), "--cache-size", cache_size]
        command += options
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**_environment(), **(environment or {})},
        )
        try:
            assert process.stderr is not None
            port = int(url_when_ready(process.stderr).rpartition(":")[2])
            reader = threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True)
            running = Service(process, reader, runtime_dir, port, time.monotonic() - started)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        try:
            yield running
        finally:
            running.stop()


def _environment() -> dict[str, str]:
    """Return ours without options of ``mmprep serve``: what is measured is the service as the benchmark starts it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MMPREP_")}


def _pass_on(lines: IO[str]) -> None:
    """Write what the service says to our standard error, to the end: a full pipe would stop it."""
    for line in lines:
        sys.stderr.write(line)
    lines.close()


class Child:
    """One child process of the benchmark; a context manager that waits for its end."""

    def __init__(self, module: str, orders: Mapping[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self._say(json.dumps(orders))

    def wait_ready(self) -> None:
        """Return when the child has made itself ready."""
        self._hear("ready")

    def go(self) -> None:
        """Let the child start."""
        self._say("go")

    def answer(self) -> Any:
        """Return the child's answer, when it has one."""
        return json.loads(self._hear(None))

    def stop(self) -> None:
        """Tell a child that works until then that it is time to answer."""
        self._say("stop")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self, expected: str | None) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line or (expected is not None and line != expected):
            raise ServiceUnavailable(f"a process of the benchmark failed (it said {line[:200]!r}); see above")
        return line


def read_orders() -> dict[str, Any]:
    """Return what this child is to do."""
    orders: dict[str, Any] = json.loads(sys.stdin.readline())
    return orders


def say_ready() -> None:
    """Tell the parent that the work can start, and return when it may; a parent that is gone ends this process."""
    print("ready", flush=True)  # noqa: T201 -- the protocol with the parent
    if sys.stdin.readline().strip() != "go":
        raise SystemExit(1)


def say_answer(answer: Any) -> None:
    """Send the answer."""
    print(json.dumps(answer), flush=True)  # noqa: T201 -- the protocol with the parent


def answer_all(socket: zmq.Socket[bytes], answer: Callable[[], None]) -> None:
    """Tell the parent that this child is ready, and ``answer`` each message in ``socket`` until the parent says something."""
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    print("ready", flush=True)  # noqa: T201 -- the protocol with the parent
    while sys.stdin.fileno() not in (ready := dict(poller.poll())):
        if socket in ready:
            answer()
