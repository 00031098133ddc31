"""What outlives the writer: the content of the ring, leases as copies and views, requests under way."""

import hashlib
import io
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest
from PIL import Image
from tests.integration.faulty import asked, drawn, faulty, is_right
from tests.integration.service import PATIENCE, SHM, environment, eventually, image, serving, user

from mmprep import Backend, Client

seeds = count(1000)

OPTIONS = ("--cache-size", "16MiB", "--lease-seconds", "30")

#: By label; where a writer comes by that makes a new ring, because a reader does not say what it holds of the former one.
ANEW = {
    "a new ring is due": "writer.segment.before",
    "a new ring was made": "writer.segment.made",
    "a new ring is laid out": "writer.segment.ready",
    "the lanes have ended": "writer.anew.lanes",
    "the spills are removed": "writer.anew.spills",
    "the former ring is removed": "writer.anew.ring",
}

#: Holds one picture as it lies in shared memory and says for each line of its input what it reads there.
READER = """
import hashlib, sys
from mmprep import Client

client = Client(sys.argv[1], backend_id=sys.argv[2])
part = {"type": "image_url", "image_url": {"url": open(sys.argv[3], "rb").read()}}
item = client.chat([{"role": "user", "content": [part]}], payload="shm").items["image"][0]
with item.view() as arrays:
    print("holds", flush=True)
    for line in sys.stdin:
        print(hashlib.sha256(arrays["pixel_values"]).hexdigest(), flush=True)
"""


def picture(seed):
    """Return a PNG of its own content, of the same size for all seeds."""
    pixels = np.random.default_rng(seed).integers(0, 256, (224, 224, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def part(data):
    return {"type": "image_url", "image_url": {"url": data}}


def pixels(item):
    return item.materialize()["pixel_values"]


def flood(client):
    """Put twice as much into the ring as it holds, of which it has nothing."""
    for _ in range(120):
        new = picture(next(seeds))
        client.chat(user(part(new)), payload="none")
        client.chat(user(part(new)), payload="shm").release()


def kill_writer(service):
    """Kill the writer and wait until its successor has heard of all readers and has warm lanes."""
    before = service.status()["worker"]
    os.kill(before["pid"], signal.SIGKILL)
    return service.status_when(
        lambda s: (
            "worker" in s
            and s["worker"]["pid"] != before["pid"]
            and not s["worker"]["awaited"]
            and all(lane["state"] == "idle" for lane in s["lanes"])
        ),
        "another writer, ready",
    )


@pytest.fixture(scope="module")
def service():
    """One service whose writer dies in every test; each leaves it with nothing under way or held."""
    with serving(*OPTIONS) as running:
        yield running


def test_the_next_writer_serves_the_content_of_the_ring(service):
    with Client(service.endpoint) as client:
        first = [client.chat(user(part(picture(seed))), payload="shm").items["image"][0] for seed in range(8)]
        expected = [pixels(item) for item in first]
        before = service.status()
        os.kill(before["worker"]["pid"], signal.SIGKILL)
        # At once: hits need no lane, and neither does what is asked for while there is no writer.
        again = [client.chat(user(part(picture(seed))), payload="shm").items["image"][0] for seed in range(8)]
        assert all(item.cached for item in again)
        assert [item.address.generation for item in again] == [item.address.generation for item in first]
        assert all(np.array_equal(pixels(item), right) for item, right in zip(again, expected, strict=True))
        after = service.status_when(lambda s: not s["worker"]["awaited"], "a settled ring")
        assert after["segment"] == before["segment"]
        assert after["worker"]["incarnation"] == before["worker"]["incarnation"] + 1
        fresh = client.chat(user(part(picture(99))), payload="shm").items["image"][0]
        assert not fresh.cached
        assert fresh.address.generation > max(item.address.generation for item in first)
    service.quiet()


def test_leases_outlive_the_writer_and_keep_their_content(service):
    with Client(service.endpoint, backend_id="keeper") as keeper, Client(service.endpoint) as other:
        copied = keeper.chat(user(part(picture(1))), payload="shm").items["image"][0]
        viewed = keeper.chat(user(part(picture(2))), payload="shm", lease_kind="view").items["image"][0]
        late = keeper.chat(user(part(picture(3))), payload="shm").items["image"][0]
        expected = [pixels(item) for item in (copied, viewed, late)]
        with viewed.view() as arrays:
            kill_writer(service)
            backends = {backend["id"]: backend["leases"] for backend in service.status()["backends"]}
            assert backends["keeper"] == 3
            flood(other)
            assert np.array_equal(arrays["pixel_values"], expected[1])
            assert np.array_equal(pixels(copied), expected[0])
            with late.view() as again:
                assert np.array_equal(again["pixel_values"], expected[2])
        for item in (copied, viewed, late):
            item.release()
        eventually(lambda: service.status()["ring"]["leased"] == 0, "the end of the leases")
    service.quiet()


@pytest.mark.parametrize("kind", ["copy", "view"])
def test_an_address_that_the_writer_before_leased_is_leased_anew_when_it_is_opened(service, kind):
    with Backend(service.endpoint, id="engine") as backend, Client(service.endpoint) as other:
        answer = service.render(user(image(picture(5), "png")), mm_payload="shm", backend_id="engine", lease_kind=kind)
        address = answer["features"]["mm_addresses"]["image"][0]
        kill_writer(service)
        item = backend.open(address)
        with item.view() as arrays:
            expected = arrays["pixel_values"].copy()
            flood(other)
            assert np.array_equal(arrays["pixel_values"], expected)
        assert expected.any()
        item.release()
    service.quiet()


@contextmanager
def reader(service, name, path):
    command = [sys.executable, "-c", READER, service.endpoint, name, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout.readline() == "holds\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_reader_that_stays_silent_makes_the_cache_start_anew_and_goes_on_reading_what_it_held(service, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(picture(7))
    with reader(service, "sleeper", path) as process, Client(service.endpoint) as client:
        expected = ask(process)
        awake = client.chat(user(part(picture(8))), payload="shm").items["image"][0]
        right = pixels(awake)
        before = service.status()
        process.send_signal(signal.SIGSTOP)
        after = kill_writer(service)
        assert after["segment"] != before["segment"]
        assert not (SHM / before["segment"].removeprefix("/")).exists()
        assert after["worker"]["incarnation"] > before["worker"]["incarnation"] + 1
        flood(client)
        assert np.array_equal(pixels(awake), right), "the former segment stays for those who have it mapped"
        process.send_signal(signal.SIGCONT)
        assert ask(process) == expected
        again = client.chat(user(part(picture(7))), payload="shm").items["image"][0]
        with again.view() as arrays:
            assert hashlib.sha256(arrays["pixel_values"]).hexdigest() == expected
    service.quiet()


@pytest.fixture(scope="module")
def broken():
    entries = {label: f"{point}=kill" for label, point in ANEW.items()}
    with faulty(entries, *OPTIONS, "--max-object-size", "1MiB", "--spill-size", "4MiB") as service:
        yield service


@pytest.mark.parametrize("label", ANEW)
def test_a_writer_that_dies_while_the_cache_starts_anew_is_replaced_and_leaves_no_segment(broken, label, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(picture(7))
    spilled = drawn(1, 588)
    with reader(broken.service, "sleeper", path) as process, Client(broken.service.endpoint) as client:
        expected = ask(process)
        held = client.chat(asked(drawn(2)), payload="shm")
        assert is_right(client.chat(asked(spilled)), spilled)
        assert broken.status()["spills"]["entries"] == 1
        before = broken.status()
        process.send_signal(signal.SIGSTOP)
        broken.gates.open(label)
        os.kill(before["worker"]["pid"], signal.SIGKILL)
        assert is_right(client.chat(asked(drawn(3)), payload="shm", timeout=PATIENCE), drawn(3))
        broken.gates.wait(label)
        assert is_right(client.chat(asked(spilled), payload="shm", timeout=PATIENCE), spilled)
        assert is_right(held, drawn(2)), "what was mapped stays as it was"
        after = broken.status_when(lambda s: "worker" in s and not s["worker"]["awaited"], "a settled ring")
        assert after["segment"] != before["segment"]
        process.send_signal(signal.SIGCONT)
        assert ask(process) == expected
    broken.whole()


def test_a_reader_that_dies_with_the_writer_holds_nothing_up(service, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(picture(7))
    with reader(service, "victim", path) as process, Client(service.endpoint) as client:
        before = service.status()
        process.send_signal(signal.SIGSTOP)
        os.kill(before["worker"]["pid"], signal.SIGKILL)
        process.kill()
        process.wait()
        after = service.status_when(
            lambda s: "worker" in s and s["worker"]["pid"] != before["worker"]["pid"], "a writer"
        )
        after = service.status_when(lambda s: not s["worker"]["awaited"], "a settled ring")
        assert after["segment"] == before["segment"]
        assert client.chat(user(part(picture(7))), payload="shm").items["image"][0].cached
    service.quiet()


def test_a_damaged_header_costs_the_content_and_nothing_else(service):
    with Client(service.endpoint) as client:
        client.chat(user(part(picture(1))), payload="shm").release()
        before = service.status()
        with (SHM / before["segment"].removeprefix("/")).open("r+b") as segment:
            segment.write(b"not a ring")
        after = kill_writer(service)
        assert after["segment"] != before["segment"]
        assert not client.chat(user(part(picture(1))), payload="shm").items["image"][0].cached
    service.quiet()


def test_requests_go_on_while_the_writer_is_killed_again_and_again(service):
    with Client(service.endpoint, request_timeout=60) as client:
        expected = {seed: pixels(client.chat(user(part(picture(seed)))).items["image"][0]) for seed in range(6)}
        for round_ in range(4):
            os.kill(service.pids()["writer"][0], signal.SIGKILL)
            for seed, right in expected.items():
                for payload in ("tensors", "shm"):
                    item = client.chat(user(part(picture(seed))), payload=payload).items["image"][0]
                    assert np.array_equal(pixels(item), right)
            answer = client.chat(user(part(picture(100 + round_))), payload="tensors")
            assert pixels(answer.items["image"][0]).any()
    service.quiet()


def test_a_view_that_was_granted_to_the_process_before_is_leased_anew(service):
    with Client(service.endpoint, backend_id="engine") as former:
        first = former.chat(user(part(picture(5))), payload="shm", lease_kind="view").items["image"][0]
        expected, address = pixels(first), first.address
    with Backend(service.endpoint, id="engine") as backend:
        item = backend.open(address)
        leases = {one["id"]: one["leases"] for one in service.status()["backends"]}
        assert leases["engine"] == 1
        with item.view() as arrays:
            assert np.array_equal(arrays["pixel_values"], expected)
        item.release()
    service.quiet()
