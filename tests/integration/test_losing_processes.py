"""What clients, readers and the supervisor do when a process goes away at a bad moment; found by ``scripts/chaos``."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from tests.integration.service import environment, eventually, is_alive, photo, serving, user

from mmprep import Client, ServiceUnavailable, layout
from mmprep.registration import Registration
from mmprep.runtime import RuntimeDir
from mmprep.segment import Segment, segment_name
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL, pack
from mmprep.wire.configured import router

BACKEND = """
import sys
from mmprep import Backend
with Backend(sys.argv[1], id="engine-0"):
    print("registered", flush=True)
    sys.stdin.read()
"""

HOLDER = """
import sys, time
from mmprep.process_lock import ProcessLock
lock = ProcessLock(sys.argv[1])
while not lock.acquire():
    time.sleep(0.01)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def service():
    with serving("--frontends", 1, "--cache-size", "16MiB", "--log-level", "warning") as running:
        yield running


@pytest.fixture
def segment(runtime_dir):
    """Give a segment as a writer makes it, without entries."""
    epoch = os.urandom(layout.EPOCH_SIZE)
    geometry = layout.Geometry.plan(1 << 20, 16)
    runtime = RuntimeDir.prepare(runtime_dir)
    with Segment.create(segment_name(runtime.runtime_id, epoch), geometry.total_size) as made:
        made.buffer[: layout.PAGE] = layout.pack_header(layout.Header(epoch, 1, geometry))
        yield made, messages.SegmentInfo(made.name, epoch, geometry.total_size)
        made.unlink()


def kill_writer(service):
    """Kill the writer and wait until another one is at work."""
    (pid,) = service.pids()["writer"]
    os.kill(pid, signal.SIGKILL)
    return service.status_when(
        lambda s: s.get("worker") and s["worker"]["pid"] != pid and all(x["state"] == "idle" for x in s["lanes"]),
        "another writer",
    )


def test_a_call_for_a_backend_that_lives_waits_until_the_new_writer_knows_it(service):
    """Not before the backend goes on, which was stopped while the writer was replaced; an error would be no help."""
    command = [sys.executable, "-c", BACKEND, service.endpoint]
    backend = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
    with backend, ThreadPoolExecutor(1) as thread:
        try:
            assert backend.stdout.readline() == b"registered\n"
            os.kill(backend.pid, signal.SIGSTOP)
            kill_writer(service)
            call = thread.submit(service.chat, user(photo("cat.png")), mm_payload="shm", backend_id="engine-0")
            eventually(
                lambda: call.done() or any(f["inflight"] for f in service.status()["frontends"]), "the call's start"
            )
        finally:
            os.kill(backend.pid, signal.SIGCONT)
        answer = call.result()
        assert answer.status == 200, answer.body
        assert answer.json["features"]["mm_addresses"]["image"][0]["lease"]
        backend.communicate()


def test_a_call_for_a_backend_that_was_killed_is_refused(service):
    command = [sys.executable, "-c", BACKEND, service.endpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as backend:
        assert backend.stdout.readline() == b"registered\n"
        backend.kill()
    service.status_when(lambda s: not s["backends"], "the backend's end")
    answer = service.chat(user(photo("cat.png")), mm_payload="shm", backend_id="engine-0")
    assert answer.status == 404
    assert answer.error["param"] == "backend_id"


def test_a_writer_that_cannot_start_again_at_once_is_tried_until_it_can(service):
    """As where /dev/shm is full for a moment; here another process holds its lock."""
    pids = service.pids()
    path = RuntimeDir(service.runtime_dir).lock_path("writer", "0")
    command = [sys.executable, "-c", HOLDER, path]
    os.kill(pids["supervisor"][0], signal.SIGSTOP)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as holder:
        try:
            os.kill(pids["writer"][0], signal.SIGKILL)
            assert holder.stdout.readline() == b"held\n"
        finally:
            os.kill(pids["supervisor"][0], signal.SIGCONT)
        eventually(lambda: "ended with status 1 and is replaced" in service.stderr, "a writer that cannot start")
    service.status_when(lambda s: s.get("lanes") and all(x["state"] == "idle" for x in s["lanes"]), "another writer")
    assert service.render(user(photo("cat.png")))["features"]


def listeners(port):
    """Return how many sockets listen on a port of this network namespace."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def test_no_client_is_given_to_a_frontend_that_is_started_again_until_it_takes_requests():
    """The writer is stopped meanwhile, so that the frontend does not learn of its model; the others have no need to."""
    with serving("--frontends", 2, "--cache-size", "16MiB") as service, Client(service.endpoint) as client:
        pids = service.pids()
        (writer,), (killed, _) = pids["writer"], pids["frontend"]
        os.kill(writer, signal.SIGSTOP)
        try:
            os.kill(killed, signal.SIGKILL)
            service.status_when(
                lambda s: len(s["frontends"]) == 2 and killed not in {f["pid"] for f in s["frontends"]},
                "another frontend",
            )
            with ThreadPoolExecutor(4) as threads:
                answers = list(threads.map(lambda number: client.tokenize(prompt=f"{number}"), range(100)))
            over_http = [service.post("/tokenize", {"prompt": f"{number}"}).status for number in range(40)]
        finally:
            os.kill(writer, signal.SIGCONT)
        assert all(answer["count"] > 0 for answer in answers)
        assert set(over_http) == {200}
        eventually(lambda: listeners(int(service.url.rpartition(":")[2])) == 2, "a second process that listens")
        service.status_when(lambda s: all(f["ready"] for f in s["frontends"]), "a frontend that is ready again")
        assert client.tokenize(prompt="again")["count"] > 0


@pytest.mark.parametrize("role", ["writer", pytest.param("frontend", marks=pytest.mark.slow)])
def test_a_process_that_is_stopped_for_long_is_replaced(service, role):
    stopped = service.pids()[role][0]
    os.kill(stopped, signal.SIGSTOP)
    eventually(lambda: not is_alive(stopped), "the end of the stopped process")
    assert stopped not in service.pids()[role]
    eventually(lambda: service.get("/ready").status == 200, "a ready service")
    with Client(service.endpoint) as client:
        assert client.chat(user(photo("cat.png")), payload="tensors").items["image"]
    service.quiet()


def test_a_reader_refused_by_a_writer_that_died_takes_the_next_ones_word(runtime_dir, segment):
    """Its welcome may come when its segment is gone already, as to a reader that was stopped meanwhile."""
    _, info = segment
    runtime = RuntimeDir(runtime_dir)
    gone = messages.SegmentInfo(segment_name(runtime.runtime_id, b"gone"), bytes(16), info.size)

    @contextlib.contextmanager
    def writer(told):
        """Be a writer that has welcomed one reader, with ``told`` for its segment."""
        with zmq.Context() as context, router(context, runtime.writer) as socket:
            socket.rcvtimeo = 60_000
            welcome = pack(messages.WriterWelcome(PROTOCOL, 1, told, 1000, b""))
            socket.send_multipart([socket.recv_multipart()[0], welcome])
            yield
        Path(runtime.writer.removeprefix("ipc://")).unlink(missing_ok=True)

    async def register(context):
        registration = Registration(context, runtime, "engine-0")
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(registration.close)
            first = writer(gone)
            waiting = asyncio.create_task(registration.ready(60.0))
            await asyncio.to_thread(first.__enter__)
            with pytest.raises(ServiceUnavailable, match="cannot be mapped"):
                await waiting
            first.__exit__(None, None, None)
            second = writer(info)
            await asyncio.to_thread(second.__enter__)
            stack.callback(second.__exit__, None, None, None)
            return (await registration.ready(60.0)).name

    with zmq.Context() as context:
        assert asyncio.run(register(context)) == info.name
        context.destroy(linger=0)
