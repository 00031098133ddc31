"""Drives one real service: ``mmprep serve`` as a child process, its HTTP door and its status, as users have them.

:class:`Service` starts it and waits for its "ready" line, :func:`serving` gives one in a directory of its own and checks at
the end that it leaves with status 0 and leaves nothing. Waiting is always for an event, or polling with a generous bound.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from mmprep.cli.desk import DeskClient
from mmprep.runtime import RuntimeDir
from mmprep.segment import segments_of

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
SHM = Path("/dev/shm")

#: Seconds to wait for what should come soon, on a machine that may be busy with other things.
PATIENCE = 150.0

_READY = re.compile(r"mmprep: ready after [0-9.]+ s: (http://\S+) and (ipc://\S+)$")
_KINDS = {".jpg": "jpeg", ".png": "png", ".webp": "webp"}


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a command: this checkout's packages, no option from outside, no network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MMPREP_")}
    packages = os.pathsep.join(str(ROOT / part) for part in ("shared", "frontend", "worker"))
    return {**kept, "PYTHONPATH": packages, "HF_HUB_OFFLINE": "1", **(extra or {})}


def mmprep(
    *arguments: Any, stdin: bytes | None = None, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
):
    """Run one ``mmprep`` command to its end and return it, with ``returncode``, ``stdout`` and ``stderr`` as text."""
    command = [*prefix, sys.executable, "-m", "mmprep.cli", *map(str, arguments)]
    given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    done = subprocess.run(command, capture_output=True, env=environment(env), check=False, timeout=PATIENCE, **given)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Return the first true value of ``condition``, for things that send no event.

    It is asked less and less often: who waits for a service to be whole again must not take the CPU from it.
    """
    deadline, pause = time.monotonic() + PATIENCE, 0.01
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(pause)
        pause = min(1.25 * pause, 0.1)
    return value


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be reaped does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def private_bytes(pid: int) -> int:
    """Return the bytes of memory that the process shares with nobody and no file: its heap."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", text)[1]) * 1024


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error; the answer must be one, in the promised form."""
        assert self.headers["Content-Type"].startswith("application/json")
        body = self.json
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "code", "param"}
        assert body["error"]["code"] == self.status
        return body["error"]


class Service:
    """One ``mmprep serve``.

    Parameters
    ----------
    runtime_dir:
        Of the service.
    options:
        Of the command; a free port is taken unless they name one.
    model:
        Directory or name; none: the embedded one.
    env:
        Added to the environment.
    prefix:
        A command that runs this one, as ``unshare``.
    """

    def __init__(
        self,
        runtime_dir: Path | str,
        *options: Any,
        model: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.runtime_dir = Path(runtime_dir)
        self.url = ""
        self.endpoint = ""
        self.lines: list[str] = []
        port = () if "--port" in options else ("--port", "0")
        command = [*prefix, sys.executable, "-m", "mmprep.cli", "serve", "--runtime-dir", runtime_dir, *port, *options]
        command += [] if model is None else [model]
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(env)
        )
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                if found := _READY.match(self.lines[-1]):
                    self.url, self.endpoint = found.groups()
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def stderr(self) -> str:
        return "\n".join(self.lines)

    def ready(self) -> Service:
        """Wait until the service takes requests; fails where it ends before."""
        with self._changed:
            self._changed.wait_for(lambda: self.url or not self._reader.is_alive(), PATIENCE)
        assert self.url, f"the service did not start:\n{self.stderr}"
        return self

    # --- its end --------------------------------------------------------------------------------------------------

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the exit and return its status; also until nobody holds its standard error any more."""
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert not self._reader.is_alive(), "a child of the service outlives it"
        self.process.stderr.close()
        return status

    def stop(self) -> int:
        """Ask the service to stop and return its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> int:
        """Kill the supervisor and wait until all its processes are gone."""
        self.signal(signal.SIGKILL)
        return self.wait()

    # --- what it says ---------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return what ``mmprep status --json`` prints, without a process for each question."""
        with DeskClient(str(self.runtime_dir)) as desk:
            return desk.status()

    def status_when(self, condition: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        """Return the first status that meets ``condition``."""
        return eventually(lambda: (status := self.status()) and condition(status) and status, what)

    def quiet(self) -> dict[str, Any]:
        """Wait until nothing is under way, pinned or leased, and return the status."""
        return self.status_when(_is_quiet, "a service with nothing under way, pinned or leased")

    def under_way(self) -> int:
        """Return how many requests the frontends are at."""
        return sum(frontend["inflight"] for frontend in self.status()["frontends"])

    @contextmanager
    def standing_still(self, role: str = "writer") -> Iterator[None]:
        """Stop the one process of a role for the time of a block."""
        (pid,) = self.pids()[role]
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def pids(self) -> dict[str, list[int]]:
        """Return the pids of the service's processes by role."""
        status = self.status_when(
            lambda s: s.get("lanes") and all(lane["pid"] for lane in s["lanes"]) and s["frontends"], "all processes"
        )
        return {
            "supervisor": [status["supervisor"]["pid"]],
            "writer": [status["worker"]["pid"]],
            "frontend": [frontend["pid"] for frontend in status["frontends"]],
            "lane": [lane["pid"] for lane in status["lanes"]],
        }

    def mapping(self, file: str) -> list[str]:
        """Return the roles of the service's processes that have mapped a file whose path has ``file`` in it."""
        pids = [(role, pid) for role, pids in self.pids().items() for pid in pids]
        return [role for role, pid in pids if file in Path(f"/proc/{pid}/maps").read_text()]

    def metrics(self) -> dict[str, float]:
        """Return the series of ``/metrics`` as ``{name{labels}: value}``."""
        lines = self.request("GET", "/metrics").body.decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    # --- HTTP -----------------------------------------------------------------------------------------------------

    def connect(self) -> http.client.HTTPConnection:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return http.client.HTTPConnection(host, int(port), timeout=PATIENCE)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send one request on a connection of its own."""
        with closing(self.connect()) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def get_or_none(self, path: str) -> Answer | None:
        """Return the answer, ``None`` where nobody listens."""
        try:
            return self.get(path)
        except (OSError, http.client.HTTPException):
            return None

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        """Send ``body`` as JSON, bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, raw, Content_Type="application/json", **headers)

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> Answer:
        """Post to ``/v1/chat/completions/render``."""
        return self.post("/v1/chat/completions/render", {"messages": messages, **fields})

    def render(self, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """Return the GenerateRequest of a chat that must succeed."""
        answer = self.chat(messages, **fields)
        assert answer.status == 200, answer.body
        return answer.json


def _is_quiet(status: dict[str, Any]) -> bool:
    return bool(
        status.get("lanes")
        and all(lane["state"] == "idle" for lane in status["lanes"])
        and status["pins"] == 0
        and not any(backend["leases"] for backend in status["backends"])
        and status["ring"]["filling"] == status["ring"]["leased"] == status["spills"]["filling"] == 0
        and status["inline"] == {"items": 0, "bytes": 0, "sent": status["inline"]["sent"]}
        and all(queue["depth"] == 0 for queue in status["queues"].values())
        and not any(frontend["inflight"] for frontend in status["frontends"])
    )


@contextmanager
def serving(
    *options: Any,
    model: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[Service]:
    """Give a ready service; at the end it must leave with status 0, nothing in its directory, and no segment.

    It has one frontend unless ``--frontends`` is among the options: a start costs each more than a second of CPU time.
    """
    if "--frontends" not in options:
        options = ("--frontends", 1, *options)
    directory = Path(tempfile.mkdtemp(prefix="mmprep-", dir="/tmp"))
    service = Service(directory, *options, model=model, env=env, prefix=prefix)
    try:
        yield service.ready()
        runtime_id = RuntimeDir(directory).runtime_id
        status = service.stop()
        assert segments_of(runtime_id) == []
        assert status == 0, service.stderr
        assert "Traceback" not in service.stderr, service.stderr
        assert list(directory.iterdir()) == []
    finally:
        if service.process.poll() is None:
            service.kill()
        shutil.rmtree(directory, ignore_errors=True)


# --- requests ---------------------------------------------------------------------------------------------------------


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(data: bytes, kind: str = "jpeg") -> dict[str, Any]:
    """Return a part with a picture as a data URL."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def photo(name: str) -> dict[str, Any]:
    """Return a part with a picture of ``tests/data``."""
    path = DATA / name
    return image(path.read_bytes(), _KINDS[path.suffix])


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


# --- an independent reading of the interface's words on kwargs_data ---------------------------------------------------


class Field(NamedTuple):
    """One tensor of a ``kwargs_data`` element; a bfloat16 one holds its bit patterns as uint16."""

    dtype: str
    array: np.ndarray
    kind: str
    arguments: dict[str, Any]


def decode_item(element: str) -> dict[str, Field]:
    """Return the fields in one element of ``kwargs_data`` or ``mm_metadata``."""

    def raw(code: int, data: bytes) -> bytes:
        assert code == 3
        return data

    packed = base64.b64decode(element, validate=True)
    fields = {}
    for name, field in msgpack.unpackb(packed, ext_hook=raw, strict_map_key=True).items():
        assert set(field) == {"data", "field"}
        dtype, shape, data = field["data"]
        kind, arguments = field["field"]
        stored = np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder("<")
        fields[name] = Field(dtype, np.frombuffer(data, stored).reshape(shape), kind, arguments)
    return fields
