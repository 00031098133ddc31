"""The service under test: starts it, finds its processes, asks for its status, ends it, and looks for what it left."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from mmprep.cli.attended import attended
from mmprep.errors import ServiceUnavailable
from mmprep.runtime import RuntimeDir
from mmprep.segment import segments_of

_SECONDS_TO_READY = 300.0
_SECONDS_TO_STOP = 40.0
_STATUS_SECONDS = 30.0
_READY = " s: http://"
#: By module; a lane's is longer than the writer's.
_ROLES = {"mmprep_frontend": "frontend", "mmprep_worker": "writer", "mmprep_worker.lanes": "lane"}


class Service:
    """One ``mmprep serve``, started from the main thread; it ends with this process, however that ends.

    Parameters
    ----------
    directory:
        Of this run; the runtime directory and the log are made in it.
    options:
        Of the command.
    environment:
        Added to that of all its processes.
    """

    def __init__(self, directory: Path, options: list[str], environment: Mapping[str, str]) -> None:
        self.runtime_dir = directory / "r"
        self.log = directory / "service.log"
        self._environment = {**os.environ, **environment}
        command = attended("serve", "--runtime-dir", str(self.runtime_dir), "--port", "0", *options)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, env=self._environment)
        self.port = 0
        self.runtime_id = ""

    def wait_ready(self) -> None:
        """Wait until it takes requests; raises ServiceUnavailable where it does not."""
        deadline = time.monotonic() + _SECONDS_TO_READY
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in self.log.read_text(encoding="utf-8").splitlines():
                _, found, rest = line.partition(_READY)
                if found:
                    self.port = int(rest.split()[0].rpartition(":")[2])
                    self.runtime_id = RuntimeDir(self.runtime_dir).runtime_id
                    return
            time.sleep(0.05)
        raise ServiceUnavailable(f"the service did not start: {self.log.read_text(encoding='utf-8')[-500:]}")

    def pids(self, role: str) -> list[int]:
        """Return the living processes of ``frontend``, ``writer`` or ``lane``, as the kernel knows them."""
        return sorted(pid for pid in _descendants(self.process.pid) if _role(pid) == role)

    def status(self) -> dict[str, Any]:
        """Return what ``mmprep status --json`` prints; raises ServiceUnavailable where it fails."""
        command = [sys.executable, "-m", "mmprep.cli", "status", "--json", "--runtime-dir", str(self.runtime_dir)]
        try:
            done = subprocess.run(
                command, capture_output=True, check=False, timeout=_STATUS_SECONDS, env=self._environment
            )
        except subprocess.TimeoutExpired:
            raise ServiceUnavailable("mmprep status does not end") from None
        if done.returncode:
            raise ServiceUnavailable(f"mmprep status: {done.stderr.decode()[-300:]}")
        status: dict[str, Any] = msgspec.json.decode(done.stdout)
        return status

    def stop(self) -> int | None:
        """Ask it to stop, and return its exit status; ``None`` where it had to be killed."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        """End it with all its processes, whatever state they are in."""
        for pid in [self.process.pid, *_descendants(self.process.pid)]:
            send(pid, signal.SIGKILL)
        self.process.wait()

    def tracebacks(self) -> int:
        """Return how many Python tracebacks its log holds."""
        return self.log.read_text(encoding="utf-8", errors="replace").count("Traceback (most recent call last)")


def left_behind(runtime_dir: Path, runtime_id: str, mark: str) -> Iterator[str]:
    """Say what is there that a stopped service must not leave.

    Parameters
    ----------
    runtime_dir, runtime_id:
        Where it ran, and what its segments are named after.
    mark:
        An environment variable's ``NAME=value`` that all its processes have.
    """
    for pid in _marked(mark):
        yield f"process {pid} ({_command(pid)})"
    for name in segments_of(runtime_id):
        yield f"segment {name}"
    if runtime_dir.exists():
        for path in sorted(runtime_dir.rglob("*")):
            kind = "socket" if stat.S_ISSOCK(path.lstat().st_mode) else "file"
            yield f"{kind} {path.relative_to(runtime_dir)} in the runtime directory"


def not_quiet(status: dict[str, Any]) -> list[str]:
    """Say what a service without clients, backends or faults must not hold and does."""
    ring = status.get("ring")
    if ring is None:
        return ["no writer answers"]
    held = [f"{what}: {ring[what]} bytes" for what in ("leased", "filling") if ring[what]]
    held += unbalanced(ring)
    held += [f"pins of {status['pins']} calls"] if status["pins"] else []
    held += [f"{b['leases']} leases of {b['id']}" for b in status["backends"] if b["leases"]]
    held += [f"backend {b['id']} is still registered" for b in status["backends"]]
    held += [f"{f['inflight']} requests under way in frontend {f['pid']}" for f in status["frontends"] if f["inflight"]]
    held += [f"{queue['depth']} in queue {name}" for name, queue in status["queues"].items() if queue["depth"]]
    held += [f"lane {lane['pid']} is {lane['state']}" for lane in status["lanes"] if lane["state"] != "idle"]
    return held


def unbalanced(ring: dict[str, int]) -> list[str]:
    """Say where the parts of the ring are not the whole."""
    total = sum(ring[part] for part in ("free", "ready", "leased", "filling"))
    return [] if total == ring["capacity"] else [f"the ring's parts add up to {total} of {ring['capacity']} bytes"]


def send(pid: int, number: int) -> bool:
    """Send a signal; false where the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _descendants(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        children: list[int] = []
        for task in _entries(f"/proc/{parent}/task"):
            children += map(int, _read(f"/proc/{parent}/task/{task}/children").split())
        found += children
        waiting += children
    return found


def _role(pid: int) -> str | None:
    words = _read(f"/proc/{pid}/cmdline").split("\0")
    return _ROLES.get(words[2]) if len(words) > 2 and words[1] == "-m" else None


def _marked(mark: str) -> list[int]:
    pids = [int(name) for name in _entries("/proc") if name.isdigit() and int(name) != os.getpid()]
    return [pid for pid in pids if mark in _read(f"/proc/{pid}/environ").split("\0")]


def _command(pid: int) -> str:
    return _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()[:200]


def _entries(path: str) -> list[str]:
    try:
        return [entry.name for entry in Path(path).iterdir()]
    except OSError:  # it has ended
        return []


def _read(path: str) -> str:
    try:
        return Path(path).read_bytes().decode(errors="replace")
    except OSError:  # it has ended, or is another user's
        return ""
