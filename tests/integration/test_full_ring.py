"""Full, large, many: what finds no room in the ring goes to a spill, then travels inline, then is refused for a time.

Every picture here is compared with what the model's own code makes of it in this process. The rings are of 1 MiB, so that a
picture of 196 pixels a side takes a bit less than a quarter, the most that one item of the ring may have.
"""

import asyncio
import io
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.integration.service import SHM, Service, decode_item, eventually, image, serving, text, user

from mmprep import AsyncClient, Backend, Busy, Client, LeaseLost, StaleAddress, TooLarge, embedded
from mmprep.card import ItemOptions
from mmprep.items import field_array, region_size
from mmprep.runtime import RuntimeDir
from mmprep.segment import segments_of
from mmprep_worker.models.family import MediaLimits
from mmprep_worker.models.registry import load_family

#: Pixels a side of a picture that fits four times into the ring.
SIDE = 196
LARGE = 3 * SIDE


def picture(number, side=SIDE):
    """Return a PNG that no other number gives."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    into = io.BytesIO()
    Image.fromarray(pixels).save(into, "PNG", compress_level=0)
    return into.getvalue()


@pytest.fixture(scope="module")
def family():
    return load_family(embedded.path(), MediaLimits(1 << 24, 64, 60.0, 60.0))


@pytest.fixture
def is_right(family):
    """Return whether arrays are those that the model makes of a picture."""

    def check(arrays, data):
        prepared = family.open("image", memoryview(data), ItemOptions("uint8"))
        region = memoryview(bytearray(region_size(prepared.meta.fields)))
        expected = {spec.name: field_array(region, spec) for spec in prepared.meta.fields}
        prepared.fill(expected)
        return arrays.keys() == expected.keys() and all((arrays[n] == expected[n]).all() for n in expected)

    return check


def raw(data):
    return {"type": "image_url", "image_url": {"url": data}}


def chat(client, *pictures, **options):
    """Return the items of a chat about pictures."""
    return client.chat(user(*map(raw, pictures), text("?")), **options).items["image"]


def inline(element):
    """Return the arrays of one element of ``kwargs_data``."""
    return {name: field.array for name, field in decode_item(element).items()}


def spills_of(service):
    """Return the names of the segments beside the ring."""
    return set(segments_of(RuntimeDir(service.runtime_dir).runtime_id)) - {service.status()["segment"]}


def mapped():
    """Return the names of the segments that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {"/" + line.partition("/dev/shm/")[2] for line in lines if "/dev/shm/mmprep" in line}


def fill_with_views(client):
    """Fill the ring with what this client holds as views; return the items, four."""
    held = []
    for number in range(4):
        held += chat(client, picture(number), lease_kind="view")
    return held


# --- spills -----------------------------------------------------------------------------------------------------------


def test_a_picture_above_a_quarter_of_the_ring_is_read_from_a_segment_of_its_own_in_every_way(is_right):
    large = picture(1, LARGE)
    with (
        serving("--cache-size", "1MiB", "--spill-size", "4MiB") as service,
        Backend(service.endpoint, id="engine") as backend,
        Client(service.endpoint) as client,
    ):
        (element,) = service.render(user(image(large, "png"), text("?")))["features"]["kwargs_data"]["image"]
        assert is_right(inline(element), large)
        (spill,) = spills_of(service)
        for payload in ("tensors", "shm"):
            (item,) = chat(client, large, payload=payload)
            assert is_right(item.materialize(), large)
            assert item.cached
        assert (item.address.segment, item.address.slot) == (spill, 0)
        with item.view() as arrays:
            assert is_right(arrays, large)
            assert spill in mapped()
        del arrays
        item.release()
        features = service.render(user(image(large, "png")), mm_payload="shm", backend_id="engine")["features"]
        assert features["kwargs_data"] is None
        (address,) = features["mm_addresses"]["image"]
        unleased = {name: value for name, value in address.items() if not name.startswith("lease")}
        for opened in (backend.open(address), backend.acquire(unleased, kind="view")):
            assert is_right(opened.materialize(), large)
            opened.release()
        assert spill not in mapped(), "a segment stays mapped that nobody reads any more"
        for forged in ({"segment": "/mmprep-0-00000000-00000000"}, {"epoch": "0" * 32}, {"generation": 1}):
            with pytest.raises(StaleAddress):
                backend.acquire({**unleased, **forged})
        status = service.quiet()
        assert (status["ring"]["entries"], status["spills"]["entries"], status["spills"]["made"]) == (0, 1, 1)
        assert status["spills"]["bytes"] == (SHM / spill.removeprefix("/")).stat().st_size
        metrics = service.metrics()
        assert metrics["mmprep_spill_bytes"] == status["spills"]["bytes"]
        assert (metrics["mmprep_spills_total"], metrics["mmprep_inline_total"]) == (1, 0)
        chat(client, *(picture(number, LARGE) for number in (2, 3)))
        assert spill not in spills_of(service), "the one that was not used the longest makes room"
        with pytest.raises(StaleAddress):
            backend.acquire(unleased)


def test_an_address_names_no_segment_but_the_ring_and_spills_of_its_runtime_directory():
    with (
        serving("--cache-size", "1MiB") as service,
        serving("--cache-size", "1MiB", "--spill-size", "4MiB") as other,
        Client(other.endpoint) as client,
        Backend(service.endpoint) as backend,
    ):
        items = chat(client, picture(1, LARGE), picture(1))
        addresses = [item.address for item in items]
        assert addresses[0].segment in spills_of(other)
        for item in items:
            item.release()
        assert addresses[0].segment not in mapped()
        for address in addresses:
            with pytest.raises(StaleAddress):
                backend.acquire(address)
        assert addresses[0].segment not in mapped()


def test_a_ring_full_of_views_goes_on_with_spills_then_inline_then_says_when_to_come_back(is_right):
    options = ("--cache-size", "1MiB", "--spill-size", "300KiB", "--inline-size", "300KiB", "--lease-seconds", "1s")
    with (
        serving(*options) as service,
        Client(service.endpoint, backend_id="greedy") as greedy,
        Client(service.endpoint) as client,
    ):
        held = fill_with_views(greedy)
        assert service.status()["ring"]["free"] < 256 * 1024
        held += chat(greedy, picture(10), lease_kind="view")
        (spilled,) = held[4:]
        assert spilled.address.segment != service.status()["segment"]
        (item,) = chat(client, picture(11))
        assert (item.address, item.cached) == (None, False)
        assert is_right(item.materialize(), picture(11))
        with item.view() as arrays:
            assert is_right(arrays, picture(11))
        with pytest.raises(Busy) as caught:
            chat(client, picture(12), picture(13), payload="tensors")
        assert caught.value.retryable
        answer = service.chat(user(*(image(picture(number), "png") for number in (12, 13))))
        assert (answer.status, answer.error["type"]) == (429, "OverloadedError")
        assert int(answer.headers["Retry-After"]) >= 1
        assert is_right(chat(client, picture(0), payload="tensors")[0].materialize(), picture(0)), "hits go on"
        for number, one in enumerate(held):
            with one.view() as arrays:
                assert is_right(arrays, picture(number if number < 4 else 10)), "a view was overwritten"
            one.release()
        eventually(lambda: service.status()["ring"]["leased"] == 0, "the end of the views")
        (item,) = chat(client, picture(12))
        assert item.address.segment == service.status()["segment"]
        item.release()
        assert service.quiet()["inline"]["sent"] >= 1


def test_spills_of_killed_services_and_writers_are_gone_when_the_next_one_is_ready(tmp_path):
    options = (tmp_path / "run", "--cache-size", "1MiB", "--spill-size", "4MiB")

    def spill(service):
        service.render(user(image(picture(1, LARGE), "png")))
        (name,) = spills_of(service)
        return name

    dead = Service(*options)
    try:
        left = spill(dead.ready())
    finally:
        dead.kill()
    service = Service(*options)
    try:
        assert not spills_of(service.ready())
        assert left != (left := spill(service))
        writer = service.pids()["writer"][0]
        os.kill(writer, signal.SIGKILL)
        service.status_when(lambda s: s.get("worker") and s["worker"]["pid"] != writer, "another writer")
        assert spill(service) != left
        runtime_id = RuntimeDir(service.runtime_dir).runtime_id
        assert service.stop() == 0
        assert segments_of(runtime_id) == []
    finally:
        if service.process.poll() is None:
            service.kill()


def test_a_lane_that_dies_over_a_spill_leaves_no_segment_and_its_picture_is_made_again(is_right, tmp_path):
    env = {"MMPREP_FAILPOINTS": f"lane.fill.middle=once:{tmp_path / 'died'},kill"}
    options = ("--cache-size", "1MiB", "--spill-size", "4MiB")
    with serving(*options, env=env) as service, Client(service.endpoint) as client:
        (item,) = chat(client, picture(1, LARGE))
        assert (tmp_path / "died").exists()
        assert is_right(item.materialize(), picture(1, LARGE))
        assert spills_of(service) == {item.address.segment}
        item.release()
        service.quiet()


def test_what_a_reader_has_of_a_spill_outlives_the_writer_and_the_next_one_makes_another(is_right):
    large, small = picture(1, LARGE), picture(2)
    with serving("--cache-size", "1MiB", "--spill-size", "4MiB") as service, Client(service.endpoint) as client:
        items = chat(client, large, small)
        before = {item.address.segment for item in items}
        writer = service.pids()["writer"][0]
        os.kill(writer, signal.SIGKILL)
        service.status_when(lambda s: s.get("worker") and s["worker"]["pid"] != writer, "another writer")
        again = chat(client, large, small)
        assert [item.cached for item in again] == [False, True]
        assert items[0].address.segment not in spills_of(service)
        for held in (items, again):
            for item, data in zip(held, (large, small), strict=True):
                assert is_right(item.materialize(), data)
                with item.view() as arrays:
                    assert is_right(arrays, data)
                del arrays
                item.release()
        with pytest.raises(LeaseLost):
            items[0].materialize()
        assert not (mapped() & before) - {service.status()["segment"]}
        service.quiet()


# --- inline -----------------------------------------------------------------------------------------------------------


def test_what_has_no_segment_travels_inline_where_addresses_were_asked_for_and_is_cached_for_nobody(is_right):
    small, large = picture(1), picture(2, LARGE)
    with (
        serving("--cache-size", "1MiB", "--spill-size", "0", "--inline-size", "8MiB") as service,
        Backend(service.endpoint, id="engine") as backend,
        Client(service.endpoint) as client,
    ):
        parts = user(image(large, "png"), image(small, "png"), text("?"))
        features = service.render(parts, mm_payload="shm", backend_id="engine")["features"]
        without, address = features["mm_addresses"]["image"]
        element, no_element = features["kwargs_data"]["image"]
        assert without is no_element is None
        assert is_right(inline(element), large)
        item = backend.open(address)
        assert is_right(item.materialize(), small)
        item.release()
        assert service.render(parts, mm_payload="none")["features"]["kwargs_data"] is None
        first, second = service.render(parts)["features"]["kwargs_data"]["image"]
        assert is_right(inline(first), large)
        assert is_right(inline(second), small)
        for payload in ("shm", "tensors"):
            items = chat(client, large, small, payload=payload)
            assert [item.cached for item in items] == [False, True]
            assert items[0].address is None
            for item, data in zip(items, (large, small), strict=True):
                assert is_right(item.materialize(), data)
                with item.view() as arrays:
                    assert is_right(arrays, data)
                item.release()
        status = service.quiet()
        assert (status["inline"]["sent"], status["spills"]["made"], status["ring"]["entries"]) == (4, 0, 1)
        assert service.metrics()["mmprep_inline_total"] == 4


def test_many_who_ask_for_the_same_large_picture_at_once_all_get_it_inline(is_right):
    large = picture(1, LARGE)

    async def ask(endpoint):
        async with AsyncClient(endpoint) as client:
            calls = [client.chat(user(raw(large)), payload=payload) for payload in ("shm", "tensors") * 6]
            return [result.items["image"][0] for result in await asyncio.gather(*calls)]

    with serving("--cache-size", "1MiB", "--spill-size", "0", "--inline-size", "32MiB") as service:
        items = asyncio.run(ask(service.endpoint))
        assert all(is_right(item.materialize(), large) for item in items)
        assert [item.address for item in items] == [None] * 12
        assert 1 <= service.quiet()["inline"]["sent"] <= 12


def test_where_the_machine_has_no_memory_for_a_spill_the_picture_travels(is_right):
    # A limit on the size of files fails the reservation as a full /dev/shm does, for this service alone.
    code = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_400_000,) * 2); os.execvp(sys.argv[1], sys.argv[1:])"
    with (
        serving("--cache-size", "1MiB", "--spill-size", "8MiB", prefix=(sys.executable, "-c", code)) as service,
        Client(service.endpoint) as client,
    ):
        for _ in range(2):
            (item,) = chat(client, picture(1, LARGE))
            assert is_right(item.materialize(), picture(1, LARGE))
            assert (item.address, item.cached) == (None, False)
        assert not spills_of(service)
        status = service.quiet()
        assert (status["spills"]["made"], status["spills"]["bytes"], status["inline"]["sent"]) == (0, 0, 2)


def test_a_picture_that_no_budget_would_take_is_too_large_for_good():
    with (
        serving("--cache-size", "1MiB", "--spill-size", "0", "--inline-size", "0") as service,
        Client(service.endpoint) as client,
    ):
        with pytest.raises(TooLarge, match="--spill-size"):
            chat(client, picture(1, LARGE))
        assert service.chat(user(image(picture(1, LARGE), "png"))).status == 413
        assert len(chat(client, picture(1, LARGE), payload="none")) == 1
        service.quiet()


# --- many -------------------------------------------------------------------------------------------------------------


def test_a_request_larger_than_the_ring_is_answered_and_the_cache_of_the_others_is_not_flushed(is_right):
    pictures = [picture(number) for number in range(8)]
    with (
        serving("--cache-size", "1MiB", "--spill-size", "2MiB") as service,
        Client(service.endpoint) as client,
    ):
        chat(client, picture(100))[0].release()
        chat(client, picture(101))[0].release()
        for payload in ("tensors", "shm"):
            items = chat(client, *pictures, payload=payload)
            assert all(is_right(item.materialize(), data) for item, data in zip(items, pictures, strict=True))
        segments = [item.address.segment for item in items]
        assert segments.count(service.status()["segment"]) == 2
        assert len(set(segments)) == 7
        assert all(item.cached for item in items)
        for item in items:
            item.release()
        kept = [chat(client, picture(number), payload="tensors")[0].cached for number in (100, 101)]
        assert kept == [True, True]
        service.quiet()


def test_two_requests_that_each_need_half_of_the_ring_are_both_answered_again_and_again(is_right):
    halves = [[picture(0), picture(1)], [picture(2), picture(3)]]
    with serving("--cache-size", "1MiB", "--spill-size", "0", "--inline-size", "0") as service:

        def ask(pictures):
            with Client(service.endpoint) as client:
                for _ in range(10):
                    items = chat(client, *pictures)
                    assert all(is_right(item.materialize(), data) for item, data in zip(items, pictures, strict=True))
                    for item in items:
                        item.release()

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(ask, halves))
        service.quiet()


def test_three_thousand_tiny_pictures_are_more_than_the_directory_holds_and_all_are_answered(is_right):
    many, at_once, slots = 3_000, 100, 1024

    def tiny(number):
        into = io.BytesIO()
        Image.new("RGB", (28, 28), (number % 251, number // 251, 7)).save(into, "PNG", compress_level=0)
        return into.getvalue()

    options = ("--cache-size", "32MiB", "--limit-mm-per-prompt", f"image={at_once}")
    with serving(*options) as service, Client(service.endpoint) as client:
        for first in range(0, many, at_once):
            pictures = [tiny(number) for number in range(first, first + at_once)]
            items = chat(client, *pictures, payload="tensors")
            assert len(items) == at_once
            assert is_right(items[first // at_once].materialize(), pictures[first // at_once])
        status = service.quiet()
        assert status["ring"]["entries"] == slots
        assert status["ring"]["evictions"] == many - slots
        assert status["ring"]["free"] > 1 << 20, "the slots were used up, not the bytes"
        assert (status["spills"]["made"], status["inline"]["sent"]) == (0, 0)
