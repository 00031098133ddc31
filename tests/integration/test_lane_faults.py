"""Lanes that crash, hang, stop, answer wrongly or outgrow their memory: the request is tried again, then refused; others go on."""

import io
import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from PIL import Image
from tests.integration.faulty import asked, drawn, faulty, is_right
from tests.integration.service import PATIENCE, SHM, image, is_alive, mmprep, photo, serving, text, user
from tests.models import write_qwen2_vl

import mmprep as package
from mmprep import Client, layout
from mmprep.errors import MediaError, TooLarge
from mmprep.runtime import RuntimeDir
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.configured import configure

TASK_SECONDS = 3

#: What one lane does once, where; the request is tried again.
ONCE = {
    "a decoder crashes": "lane.fill.middle=segv",
    "a decoder exits": "lane.fill.middle=exit",
    "a decoder hangs": "lane.fill.middle=hang",
    "a lane stops": "lane.task.received=stop",
    "no message": "lane.send[AskExtent]=garbage:bytes",
    "no message at the end": "lane.send[Filled]=garbage:bytes",
    "too many frames": "lane.send[Filled]=garbage:frames",
    "filled without a grant": "lane.send[AskExtent]=garbage:filled",
    "asks twice": "lane.send[AskExtent]=garbage:twice",
    "asks without metadata": "lane.send[AskExtent]=garbage:empty",
    "fills another task": "lane.send[Filled]=garbage:other",
}
#: By what is done twice: where, and what the error says.
POISON = {
    "crashes": ("lane.fill.middle=segv", "the process that decoded it crashed"),
    "hangs": ("lane.digest.checked=hang", f"it took longer than {TASK_SECONDS} seconds"),
    "answers wrongly": ("lane.send[AskExtent]=garbage:filled", "the process that decoded it gave a wrong answer"),
}
HARMLESS = {"filled twice": "lane.send[Filled]=garbage:twice"}
ABSURD = {"absurd length": "lane.send[AskExtent]=garbage:length"}
STOPPED = {"stopped while it fills": "lane.fill.middle=stop"}
TWICE = {f"{name} {n}": entry for name, (entry, _) in POISON.items() for n in (1, 2)}

KNOWN = drawn(0)
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def broken():
    entries = ONCE | HARMLESS | ABSURD | STOPPED | TWICE
    with faulty(entries, "--cache-size", "8MiB", "--task-timeout", f"{TASK_SECONDS}s") as service:
        yield service


@pytest.fixture(scope="module")
def client(broken):
    with Client(broken.service.endpoint) as one:
        yield one


def reads(client, picture, payload="tensors"):
    return is_right(client.chat(asked(picture), payload=payload, timeout=PATIENCE), picture)


def counted(status, name):
    return status["metrics"].get(name, 0)


@pytest.mark.parametrize("fault", ONCE)
def test_a_lane_is_replaced_and_its_item_tried_again_when(broken, client, fault):
    writer, before = broken.pids("writer"), broken.pids("lane")
    restarts = counted(broken.whole(), "mmprep_lane_restarts_total")
    picture = drawn(next(numbers))
    broken.gates.open(fault)
    with ThreadPoolExecutor(1) as threads:
        struck = threads.submit(reads, client, picture)
        broken.gates.wait(fault)
        assert reads(client, drawn(next(numbers))), "another picture, by the other lane"
        assert struck.result()
    broken.status_when(lambda s: not before <= {lane["pid"] for lane in s["lanes"]}, "the end of the lane")
    after = broken.pids("lane")
    assert len(before & after) == 1, "one is new, the other one is as it was"
    assert not [pid for pid in before - after if is_alive(pid)]
    assert counted(broken.whole(), "mmprep_lane_restarts_total") == restarts + 1
    assert broken.pids("writer") == writer


def test_a_second_word_that_an_item_is_there_changes_nothing(broken, client):
    before = broken.pids("lane")
    (label,) = HARMLESS
    broken.gates.open(label)
    picture, later = drawn(next(numbers)), drawn(next(numbers))
    assert reads(client, picture)
    assert broken.gates.was_taken(label)
    assert all(reads(client, each) for each in (later, picture))
    broken.whole()
    assert broken.pids("lane") == before


def test_an_absurd_size_is_refused_and_nothing_goes_for_it(broken, client):
    assert reads(client, KNOWN)
    before, entries = broken.pids("lane"), broken.whole()["ring"]["entries"]
    (label,) = ABSURD
    broken.gates.open(label)
    picture = drawn(next(numbers))
    with pytest.raises(TooLarge):
        reads(client, picture)
    status = broken.whole()
    assert status["ring"]["entries"] == entries
    assert broken.pids("lane") == before
    assert reads(client, picture)


@pytest.mark.parametrize("what", POISON)
def test_a_picture_that_takes_two_lanes_is_refused_with_the_reason_until_the_cache_is_cleared(broken, client, what):
    picture = drawn(next(numbers))
    restarts = counted(broken.whole(), "mmprep_lane_restarts_total")
    for n in (1, 2):
        broken.gates.open(f"{what} {n}")
    poison = user(text("look:"), image(picture, "png"))
    answer = broken.service.chat(poison)
    assert answer.status == 422, answer.body
    assert POISON[what][1] in answer.error["message"]
    assert "2 times" in answer.error["message"]
    assert answer.error["param"] == "messages[0].content[1].image_url"
    broken.status_when(lambda s: counted(s, "mmprep_lane_restarts_total") == restarts + 2, "two lanes' ends")
    after = broken.pids("lane")
    assert broken.service.metrics()["mmprep_quarantined"] == 1

    tasks = _tasks(broken.service)
    again = broken.service.chat(poison)
    assert again.status == 422
    assert POISON[what][1] in again.error["message"]
    with pytest.raises(MediaError, match=POISON[what][1]):
        client.chat(asked(picture), payload="tensors", timeout=PATIENCE)
    assert _tasks(broken.service) == tasks, "no lane has seen it"
    assert reads(client, drawn(next(numbers))), "other pictures are fine"
    assert broken.pids("lane") == after

    _clear(broken.service.runtime_dir)
    assert reads(client, picture)
    assert broken.service.metrics()["mmprep_quarantined"] == 0
    broken.whole()


def _tasks(service):
    return service.metrics()['mmprep_stage_seconds_count{stage="queue"}']


def _clear(runtime_dir):
    """Clear the cache, as a control process does."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        configure(socket)
        socket.rcvtimeo = int(PATIENCE * 1000)
        socket.connect(RuntimeDir(runtime_dir).writer)
        hello = messages.Hello(PROTOCOL, package.__version__, "control", "test", os.getpid())
        for message in (hello, messages.Clear(1)):
            socket.send(pack(message))
        assert isinstance(unpack(socket.recv(), messages.FromWriter), messages.WriterWelcome)
        assert isinstance(unpack(socket.recv(), messages.FromWriter), messages.Cleared)


# --- a lane that was given up while it could still write --------------------------------------------------------------


def test_what_a_stopped_lane_may_still_write_to_is_nobody_elses_until_its_exit(broken, client):
    """The whole ring goes by while the lane stands in the middle of its extent; not one byte of that changes."""
    (label,) = STOPPED
    side = 400
    before, start = broken.pids("lane"), broken.whole()
    picture = drawn(next(numbers), side)
    others = [drawn(next(numbers), side) for _ in range(12)]
    broken.gates.open(label)
    with ThreadPoolExecutor(1) as threads:
        struck = threads.submit(reads, client, picture)
        broken.gates.wait(label)
        (stopped,) = _wait_for_stopped(broken, before)
        (held,) = _records(start["segment"], layout.State.GRANTED)
        content = _content(start["segment"], held)
        assert len(set(content)) > 1, "its metadata are written"
        evictions = 0
        for other in others:
            assert reads(client, other)
            now = broken.status()
            records = _records(start["segment"])
            if not _is_stopped(stopped):
                break  # it was beyond its time, and killed
            assert now["ring"]["filling"] >= held.length
            assert held in records
            for record in records:
                assert (
                    record == held
                    or record.offset + record.length <= held.offset
                    or (held.offset + held.length <= record.offset)
                ), "the extent was given to another"
            assert _content(start["segment"], held) == content
            evictions = now["ring"]["evictions"] - start["ring"]["evictions"]
        assert evictions > 0, "the hand has gone round while the lane stood"
        assert struck.result()
    assert not is_alive(stopped)
    assert stopped not in broken.pids("lane")
    broken.whole()
    assert all(reads(client, other) for other in others)
    broken.whole()


def _is_stopped(pid):
    try:
        return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_for_stopped(broken, pids):
    return broken.status_when(lambda _: [pid for pid in pids if _is_stopped(pid)], "a stopped lane") and [
        pid for pid in pids if _is_stopped(pid)
    ]


def _segment(name):
    return (SHM / name.lstrip("/")).open("rb")


def _records(name, *states):
    """Return the directory's records, as any reader of the segment sees them."""
    with _segment(name) as file:
        geometry = layout.unpack_header(file.read(layout.PAGE)).geometry
        found = []
        for slot in range(geometry.slots):
            file.seek(geometry.record_offset(slot))
            record = layout.unpack_record(file.read(layout.RECORD_SIZE), slot, geometry)
            if record is not None and (not states or record.state in states):
                found.append(record)
    return found


def _content(name, record):
    with _segment(name) as file:
        file.seek(record.offset)
        return file.read(record.length)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"), [("png", {"compress_level": 1}), ("jpeg", {}), ("jpeg", {"progressive": True})]
)
def test_a_picture_that_outgrows_a_lanes_memory_is_refused_and_the_lane_works_on(narrow, kind, options):
    into = io.BytesIO()
    Image.new("RGB", (8000, 8000), (10, 200, 30)).save(into, kind, **options)
    before = narrow.pids()
    answer = narrow.chat(user(image(into.getvalue(), kind)))
    assert answer.status == 413, answer.body
    assert "memory" in answer.error["message"]
    assert answer.error["param"] == "messages[0].content[0].image_url"
    assert narrow.chat(user(photo("cat.png"))).status == 200
    assert narrow.pids() == before
    narrow.quiet()


@pytest.fixture(scope="module")
def narrow():
    """A service whose lanes have no room for the pixels of a large picture; its ring has, for the item."""
    with serving("--frontends", 1, "--lanes", 2, "--cache-size", "64MiB", "--lane-memory", "320MiB") as service:
        yield service


def test_lanes_that_have_no_room_for_the_model_end_the_start_with_a_word_about_it(runtime_dir):
    done = mmprep("serve", "--port", 0, "--runtime-dir", runtime_dir, "--cache-size", "16MiB", "--lane-memory", "64MiB")
    assert done.returncode == 1
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("mmprep: ")]
    assert "--lane-memory" in told
    assert list(runtime_dir.iterdir()) == []


def test_a_lane_that_cannot_start_again_is_tried_again_while_the_others_work(tmp_path):
    model = write_qwen2_vl(tmp_path / "model")
    config, aside = model / "preprocessor_config.json", tmp_path / "aside"
    with serving("--frontends", 1, "--lanes", 2, "--cache-size", "16MiB", model=model) as service:
        lanes = service.pids()["lane"]
        config.rename(aside)
        os.kill(lanes[0], signal.SIGKILL)
        service.status_when(lambda s: counted(s, "mmprep_lane_restarts_total") >= 2, "a start that failed")
        assert service.get("/ready").status == 200
        assert service.chat(user(photo("cat.png"))).status == 200
        aside.rename(config)
        assert len(set(service.pids()["lane"]) & set(lanes)) == 1, "one is new, the other one is as it was"
        service.quiet()
