"""A process killed at each point between grant, fill, publish, send, acknowledge and release: every request is answered.

One service goes through all points, another one through those of items that find no room in the ring. Beside the request
that meets the point, another client asks for what is in the cache.
"""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
from tests.integration.faulty import asked, drawn, faulty, is_right
from tests.integration.service import PATIENCE, environment, eventually
from tests.integration.test_remote import DOOR
from tests.integration.test_writer_restart import ANEW

from mmprep import Backend, Client
from mmprep.failpoints import POINTS, VARIABLE

#: By label; where a request for one new picture comes by. Records: the first is the grant's, the second the publishing's.
REQUEST = {
    "a task was received": "lane.task.received",
    "the digest was checked": "lane.digest.checked",
    "an extent was asked for": "lane.send[AskExtent]",
    "an extent was granted": "lane.granted",
    "half of the extent is filled": "lane.fill.middle",
    "the extent is full": "lane.filled.before",
    "the writer was told that it is full": "lane.filled.after",
    "an offer was taken": "writer.message.after[Offer]",
    "media were asked for": "writer.send.after[Wants]",
    "a medium was received": "writer.put.received",
    "a task was sent": "writer.lane.after[Task]",
    "the grant is not recorded": "writer.record.before",
    "the grant is recorded": "writer.record.after",
    "the grant was not sent": "writer.lane.before[Granted]",
    "the publishing is not recorded": "writer.record.before",
    "the publishing is recorded": "writer.record.after",
    "the answer was not sent": "writer.send.before[Answer]",
    "the answer was sent": "writer.send.after[Answer]",
    "an unpin was received": "writer.message.before[Unpin]",
    "an offer was sent": "frontend.offer.sent",
    "media are wanted": "frontend.wants.received",
    "a medium was sent": "frontend.put.sent",
    "an answer was received": "frontend.answer.received",
    "an unpin is due": "frontend.unpin.before",
    "an unpin was sent": "frontend.unpin.after",
}
SECOND = {"the publishing is not recorded", "the publishing is recorded"}
#: Where a request for one new picture comes by that goes to a segment of its own.
SPILL = {
    "a spill was not granted": "writer.lane.before[GrantedSpill]",
    "a spill was granted": "writer.lane.after[GrantedSpill]",
    "a spill was made": "lane.spill.made",
    "half of a spill is filled": "lane.fill.middle",
    "a spill has no record": "lane.spill.filled",
    "a spill is full": "lane.filled.before",
    "the writer was told that a spill is full": "lane.filled.after",
    "an answer about a spill was not sent": "writer.send.before[Answer]",
    "an answer about a spill was sent": "writer.send.after[Answer]",
}
#: Where a request for one comes by that travels inline.
INLINE = {
    "tensors are wanted": "writer.lane.after[GrantedInline]",
    "tensors are about to be sent": "lane.send[Inlined]",
    "tensors were sent": "lane.filled.after",
    "tensors were received": "writer.inlined.received",
    "an answer about tensors was not sent": "writer.send.before[Answer]",
    "an answer about tensors was sent": "writer.send.after[Answer]",
    "a fetch was sent": "frontend.fetch.sent",
    "a fetch was received": "writer.fetch.received",
    "tensors were fetched": "frontend.fetched",
}
#: Of which there are 1 MiB for spills, and of which it is too large.
SPILLED, TRAVELS = 336, 588
RELEASE = {
    "a release was received": "writer.message.before[Release]",
    "a lease was released": "writer.message.after[Release]",
}
TAKEOVER = {
    "the lanes have ended": "writer.lanes.ended",
    "the ring is chosen": "writer.ring.chosen",
    "other names are removed": "writer.others.removed",
    "the ring has its next writer": "writer.ring.claimed",
    "the directory was read": "writer.ring.restored",
    "a reader was welcomed": "writer.send.after[WriterWelcome]",
    "a reader tells what it holds": "writer.message.before[Reassert]",
    "a reader has told what it holds": "writer.message.after[Reassert]",
}
#: Where a frontend comes by that posts a job, and a backend that pulls it.
POST = {"a job was posted": "frontend.post.sent"}
PULL = ("backend.job.received", "backend.ack.before")
BACKEND = ("backend.lease.received", "backend.mapped", "backend.release.before", "backend.release.after")

#: What is pinned for a frontend or leased to its client; a writer may die at both.
PAYLOAD = {label: "shm" for label, point in REQUEST.items() if point.startswith("writer.") and "Unpin" not in point}
PAYLOAD |= {label: "shm" for label, point in (SPILL | INLINE).items() if not point.startswith("lane.")}

ENTRIES = {
    label: f"{point}=kill{'@2' if label in SECOND else ''}"
    for label, point in (REQUEST | RELEASE | TAKEOVER | POST).items()
}
BESIDE = {label: f"{point}=kill" for label, point in (SPILL | INLINE).items()}

#: A reader that takes a picture by address and lets it go.
READER = """
import sys
from mmprep import Backend, Client
with Client(sys.argv[1]) as client:
    result = client.chat([{"role": "user", "content": [{"type": "image_url", "image_url": sys.stdin.buffer.read()}]}])
    result.items["image"][0].materialize()
    print("read", flush=True)
    result.release()
"""

#: A backend that pulls a job and is done with it.
PULLER = """
import sys
from mmprep import Backend
with Backend(sys.argv[1], queue="jobs") as backend:
    backend.pull().ack()
"""

KNOWN = drawn(0)
numbers = count(1)


@pytest.fixture(scope="module")
def broken():
    with faulty(ENTRIES, "--cache-size", "16MiB", "--queues", "jobs") as service:
        yield service


@pytest.fixture(scope="module")
def clients(broken):
    with Client(broken.service.endpoint) as one, Client(broken.service.endpoint) as other:
        yield one, other


@pytest.fixture(scope="module")
def beside():
    with faulty(BESIDE, "--cache-size", "1MiB", "--spill-size", "1MiB", "--inline-size", "8MiB") as service:
        yield service


@pytest.fixture(scope="module")
def clients_beside(beside):
    with Client(beside.service.endpoint) as one, Client(beside.service.endpoint) as other:
        yield one, other


def reads(client, picture, payload="tensors"):
    return is_right(client.chat(asked(picture), payload=payload, timeout=PATIENCE), picture)


@pytest.mark.parametrize("label", REQUEST)
def test_requests_are_answered_when_a_process_dies_where(broken, clients, label):
    strike(broken, clients, label, drawn(next(numbers)))


def strike(broken, clients, label, picture):
    """Ask for a new picture, and let the process die that comes by the point first."""
    client, other = clients
    role = (REQUEST | SPILL | INLINE)[label].partition(".")[0]
    assert reads(other, KNOWN)
    broken.whole()
    before = broken.pids(role)
    broken.gates.open(label)
    with ThreadPoolExecutor(2) as threads:
        struck = threads.submit(reads, client, picture, PAYLOAD.get(label, "tensors"))
        beside = threads.submit(reads, other, KNOWN)
        assert struck.result()
        assert beside.result()
    broken.gates.wait(label)
    broken.status_when(lambda s: _one_is_gone(s, role, before), "the end of the process")
    assert len(broken.pids(role) & before) == len(before) - 1, "one is new, the others are as they were"
    broken.whole()
    assert reads(other, picture)


def _one_is_gone(status, role, before):
    processes = [status.get("worker", {})] if role == "writer" else status.get(f"{role}s", ())
    return not before <= {process.get("pid") for process in processes}


@pytest.mark.parametrize("label", SPILL)
def test_requests_are_answered_from_a_spill_when_a_process_dies_where(beside, clients_beside, label):
    strike(beside, clients_beside, label, drawn(next(numbers), SPILLED))
    assert beside.whole()["spills"]["entries"] == 1


@pytest.mark.parametrize("label", INLINE)
def test_requests_are_answered_inline_when_a_process_dies_where(beside, clients_beside, label):
    strike(beside, clients_beside, label, drawn(next(numbers), TRAVELS))
    assert beside.whole()["inline"]["sent"] > 0


@pytest.mark.parametrize("label", RELEASE)
def test_nothing_stays_leased_when_the_writer_dies_where(broken, clients, label):
    client, other = clients
    picture = drawn(next(numbers))
    result = client.chat(asked(picture), payload="shm", timeout=PATIENCE)
    assert broken.status()["ring"]["leased"]
    before = broken.pids("writer")
    broken.gates.open(label)
    with ThreadPoolExecutor(1) as threads:
        beside = threads.submit(reads, other, KNOWN)
        result.release()
        assert beside.result()
    broken.gates.wait(label)
    broken.status_when(lambda s: _one_is_gone(s, "writer", before), "the end of the writer")
    broken.whole()
    assert eventually(lambda: reads(client, picture, "shm"), "an answer by address")
    broken.whole()


@pytest.mark.parametrize("label", TAKEOVER)
def test_leases_and_requests_outlive_a_writer_and_its_successor_that_dies_where(broken, clients, label):
    client, other = clients
    picture = drawn(next(numbers))
    held = client.chat(asked(picture), payload="shm", timeout=PATIENCE)
    (before,) = broken.pids("writer")
    broken.gates.open(label)
    with ThreadPoolExecutor(2) as threads:
        os.kill(before, signal.SIGKILL)
        calls = [threads.submit(reads, one, drawn(next(numbers)), "shm") for one in (client, other)]
        assert all(call.result() for call in calls)
    broken.gates.wait(label)
    assert is_right(held, picture)
    broken.whole()
    assert before not in broken.pids("writer")
    assert reads(other, picture, "shm")
    broken.whole()


@pytest.mark.parametrize("point", BACKEND)
def test_a_reader_that_dies_leaves_no_lease_and_disturbs_nobody(broken, clients, point):
    client, other = clients
    picture = drawn(next(numbers))
    before = broken.whole()
    held = client.chat(asked(picture), payload="shm", timeout=PATIENCE)
    command = [sys.executable, "-c", READER, broken.service.endpoint]
    with ThreadPoolExecutor(1) as threads:
        beside = threads.submit(reads, other, KNOWN)
        env = environment({VARIABLE: f"{point}=kill"})
        reader = subprocess.run(command, input=picture, env=env, capture_output=True, check=False)
        assert beside.result()
    assert reader.returncode == -signal.SIGKILL, reader.stderr.decode()
    assert (reader.stdout == b"read\n") == (point.startswith("backend.release"))
    assert is_right(held, picture), "another lease on the same item holds"
    after = broken.whole()
    broken.status_when(lambda s: len(s["backends"]) <= 2, "only readers that live")
    assert (after["worker"], after["lanes"]) == (before["worker"], before["lanes"])
    assert reads(other, picture, "shm")


@pytest.mark.parametrize("point", PULL)
def test_a_job_goes_to_another_backend_when_one_dies_where(broken, clients, point):
    client, _ = clients
    posted = client.post(asked(drawn(next(numbers))), queue="jobs")
    command = [sys.executable, "-c", PULLER, broken.service.endpoint]
    puller = subprocess.run(command, env=environment({VARIABLE: f"{point}=kill"}), capture_output=True, check=False)
    assert puller.returncode == -signal.SIGKILL, puller.stderr.decode()
    pull(broken, posted, attempt=2)


@pytest.mark.parametrize("label", POST)
def test_what_was_posted_is_one_job_when_its_frontend_dies_where(broken, clients, label):
    client, _ = clients
    before = broken.pids("frontend")
    broken.gates.open(label)
    posted = client.post(asked(drawn(next(numbers))), queue="jobs")
    broken.gates.wait(label)
    broken.status_when(lambda s: _one_is_gone(s, "frontend", before), "the end of the frontend")
    pull(broken, posted, attempt=1)


def pull(broken, posted, *, attempt):
    """Pull the one job that there is, and be done with it."""
    with Backend(broken.service.endpoint, queue="jobs") as backend:
        job = backend.pull()
        assert (job.id, job.attempt) == (posted, attempt)
        with job.view() as items:
            assert items["image"][0]["pixel_values"].any()
        job.ack()
        assert broken.whole()["queues"]["jobs"]["depth"] == 0
        assert backend.pull(0.01) is None


def test_every_point_has_a_test_that_kills_there():
    tables = (REQUEST, SPILL, INLINE, RELEASE, TAKEOVER, ANEW, POST, DOOR)
    reached = {point.partition("[")[0] for table in tables for point in table.values()} | {*BACKEND, *PULL}
    assert set(POINTS) <= reached
