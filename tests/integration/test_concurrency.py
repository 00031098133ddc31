"""Many requests at once over few pictures, several frontends and both doors: right pixels, one computation, nothing left."""

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from tests.integration.service import decode_item, eventually, image, serving, text, user
from transformers import AutoImageProcessor

from mmprep import Backend, Client, MmprepError, embedded

REQUESTS = 64


@pytest.fixture(scope="module")
def service():
    with serving("--frontends", 3, "--lanes", 2, "--cache-size", "128MiB") as running:
        yield running


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained(embedded.path())


def drawn(number):
    """Return a PNG that no other number gives, each of another size."""
    pixels = np.random.default_rng(number).integers(0, 256, (200 + 29 * (number % 8), 260, 3), dtype=np.uint8)
    into = io.BytesIO()
    Image.fromarray(pixels).save(into, "PNG", compress_level=1)
    return into.getvalue()


def expected_pixels(processor, data):
    picture = Image.open(io.BytesIO(data))
    processed = processor(images=[picture], return_tensors="np", do_rescale=False, do_normalize=False)
    return processed["pixel_values"].astype(np.uint8), processed["image_grid_thw"][0]


def counted(service):
    """Return the counters that tell how often a picture was looked up, found and computed."""
    metrics = service.metrics()
    return {
        "queries": metrics.get('mmprep_mm_cache_queries_total{modality="image"}', 0),
        "hits": metrics.get('mmprep_mm_cache_hits_total{modality="image"}', 0),
        "decoded": metrics.get('mmprep_stage_seconds_count{stage="decode"}', 0),
        "processed": metrics.get('mmprep_stage_seconds_count{stage="process"}', 0),
        "published": metrics.get('mmprep_stage_seconds_count{stage="publish"}', 0),
    }


def grown(before, after):
    return {name: after[name] - before[name] for name in before}


def test_64_requests_for_8_pictures_get_their_own_pixels_and_compute_each_once(service, processor):
    pictures = [drawn(number) for number in range(8)]
    expected = [expected_pixels(processor, data) for data in pictures]
    before = counted(service)
    start = threading.Barrier(REQUESTS)

    def check(index, arrays):
        pixels, grid = expected[index]
        assert np.array_equal(arrays["image_grid_thw"], grid)
        assert np.array_equal(arrays["pixel_values"], pixels)

    def over_http(index):
        answer = service.render(user(image(pictures[index], "png"), text("?")))
        check(index, {name: f.array for name, f in decode_item(answer["features"]["kwargs_data"]["image"][0]).items()})
        return answer["features"]["mm_hashes"]["image"][0]

    def by_address(index):
        part = image(pictures[index], "png")
        answer = service.render(user(part, text("?")), mm_payload="shm", backend_id=backend.id)
        item = backend.open(answer["features"]["mm_addresses"]["image"][0])
        check(index, item.materialize())
        item.release()
        return answer["features"]["mm_hashes"]["image"][0]

    def native(payload):
        def call(index):
            part = {"type": "image_url", "image_url": pictures[index]}
            item = client.chat(user(part, text("?")), payload=payload).items["image"][0]
            check(index, item.materialize())
            with item.view() as arrays:
                check(index, arrays)
            item.release()
            return item.hash

        return call

    ways = (over_http, by_address, native("tensors"), native("shm"))

    def request(number):
        start.wait()
        return number % 8, ways[number // 8 % 4](number % 8)

    with (
        Client(service.endpoint) as client,
        Backend(service.endpoint) as backend,
        ThreadPoolExecutor(REQUESTS) as threads,
    ):
        hashes = set(threads.map(request, range(REQUESTS)))
    assert len(hashes) == 8, "one hash a picture, whichever way it came"
    difference = grown(before, counted(service))
    assert difference == {"queries": REQUESTS, "hits": REQUESTS - 8, "decoded": 8, "processed": 8, "published": 8}
    service.quiet()


def test_requests_share_pictures_in_any_order(service, processor):
    """Requests of several pictures that overlap wait for one another's flights and never for each other."""
    pictures = [drawn(100 + number) for number in range(6)]
    expected = [expected_pixels(processor, data)[0] for data in pictures]
    before = counted(service)
    orders = [[(first + step * stride) % 6 for step in range(4)] for first in range(6) for stride in (1, 5)]

    def request(order):
        answer = service.render(user(*(image(pictures[index], "png") for index in order)))
        for index, element in zip(order, answer["features"]["kwargs_data"]["image"], strict=True):
            assert np.array_equal(decode_item(element)["pixel_values"].array, expected[index])

    with ThreadPoolExecutor(len(orders)) as threads:
        list(threads.map(request, orders))
    assert grown(before, counted(service))["decoded"] == 6
    service.quiet()


def test_one_broken_picture_among_many_harms_no_other(service):
    broken = drawn(200)[:3000]

    def request(number):
        parts = [image(drawn(201 + number % 4), "png")] + [image(broken, "png")] * (number % 3 == 0)
        return number, service.chat(user(*parts)).status

    with ThreadPoolExecutor(24) as threads:
        for number, status in threads.map(request, range(24)):
            assert status == (422 if number % 3 == 0 else 200)
    service.quiet()


def test_clients_that_hang_up_leave_nothing_behind(service):
    """Some are gone before their picture is decoded, some while their answer is sent."""
    connections = []
    for number in range(40):
        connection = service.connect()
        body = json.dumps({"messages": user(image(drawn(300 + number), "png"), text("?"))})
        connection.request("POST", "/v1/chat/completions/render", body)
        connections.append(connection)
    for connection in connections[:35]:
        connection.close()
    assert all(connection.getresponse().status == 200 for connection in connections[35:])
    for connection in connections[35:]:
        connection.close()
    service.quiet()
    eventually(lambda: service.metrics()["mmprep_inflight"] == 0, "no request under way")
    assert service.render(user(image(drawn(300), "png"), text("?")))["features"]


def test_a_native_client_that_leaves_in_the_middle_ends_its_call_and_leaves_nothing_behind(service):
    for number in range(3):
        parts = [{"type": "image_url", "image_url": drawn(400 + 8 * number + index)} for index in range(8)]
        client = Client(service.endpoint)
        with ThreadPoolExecutor(1) as thread:
            call = thread.submit(client.chat, user(*parts), payload="shm")
            eventually(lambda call=call: call.done() or service.metrics()["mmprep_inflight"], "the request")
            client.close()
            error = call.exception()
        assert error is None or isinstance(error, MmprepError)
    service.quiet()
