"""Pictures that come embedded already, in queues: a backend gets the very numbers that were sent, by address.

What it gets is compared with the arrays that the test made, and with what numpy reads of their files.
"""

import asyncio
import base64
import io
import os
import signal

import msgspec
import numpy as np
import pytest
import zmq
from PIL import Image
from tests.integration.service import PATIENCE, decode_item, serving, text, user
from tests.integration.test_embedded_pictures import GRIDS, npy, part, rows
from tests.integration.test_full_ring import fill_with_views

from mmprep import Backend, Client, InvalidRequest, MediaError, ProtocolError, TooLarge
from mmprep.card import ItemOptions
from mmprep.digest import Hasher
from mmprep.failpoints import VARIABLE
from mmprep.runtime import parse_endpoint
from mmprep_frontend.dispatch import WriterLink
from mmprep_frontend.offered import OfferItem

CHAT = user(text("one "), part(GRIDS[0]), text(" two "), part(GRIDS[1]))
#: Of 96 KiB, and of more than a quarter of the ring.
SMALL, LARGE = (1, 8, 8), (1, 14, 14)


@pytest.fixture(scope="module")
def offers(tmp_path_factory):
    """Return a file that is there when the frontend has asked the writer for media by an offer."""
    return tmp_path_factory.mktemp("offers") / "made"


@pytest.fixture(scope="module")
def service(offers):
    options = ("--cache-size", "1MiB", "--spill-size", "400KiB", "--max-media-size", "1MiB")
    env = {VARIABLE: f"frontend.offer.sent=touch:{offers}"}
    with serving(*options, "--queues", "declared", "--frontends", 1, env=env) as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    with Client(service.endpoint) as client:
        yield client


@pytest.fixture
def backend(service):
    with Backend(service.endpoint, queue="engine", credits=8) as backend:
        yield backend
    service.quiet()


def same_bits(arrays, embeddings, grid):
    """Check one item's arrays against the file's; also what is no number has its bits."""
    assert set(arrays) == {"image_embeds", "image_grid_thw"}
    assert (arrays["image_embeds"].dtype, arrays["image_embeds"].shape) == (embeddings.dtype, embeddings.shape)
    assert arrays["image_embeds"].tobytes() == np.ascontiguousarray(embeddings).tobytes()
    assert (arrays["image_grid_thw"].dtype, arrays["image_grid_thw"].tolist()) == (np.int64, list(grid))


def counted(service):
    metrics = service.metrics()
    return [metrics.get(f'mmprep_mm_cache_{name}_total{{modality="image"}}', 0) for name in ("queries", "hits")]


def test_a_job_has_what_was_sent_with_the_ranges_and_hashes_that_rendering_gives(service, client, backend):
    answer = service.render(CHAT)
    posted = service.chat(CHAT, queue="engine")
    assert posted.status == 202
    raw = [{**one, "image_embeds": dict(one["image_embeds"])} for one in (part(grid) for grid in GRIDS)]
    for one in raw:
        one["image_embeds"]["image_embeds"] = base64.b64decode(one["image_embeds"]["image_embeds"])
    ids = [posted.json["request_id"], client.post(user(text("one "), raw[0], text(" two "), raw[1]), queue="engine")]
    for job_id in ids:
        job = backend.pull()
        features = {**answer["features"], "kwargs_data": None, "mm_metadata": None}
        assert job.request == {**answer, "request_id": job_id, "features": features}
        assert all(item.address is not None for item in job.items["image"])
        with job.view() as items:
            for arrays, grid in zip(items["image"], GRIDS, strict=True):
                assert not arrays["image_embeds"].flags.writeable
                same_bits(arrays, rows(grid), grid)
        job.ack()


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_bit_arrives_also_of_what_is_no_number(client, backend, dtype, order):
    array = np.asarray(rows(SMALL, dtype), order=order)
    array[0, :4] = [np.nan, -np.inf, np.inf, -0.0]
    array.view(f"<u{array.itemsize}")[1, 0] |= 0x7F80 | 1  # a NaN of another kind in half precision
    file = io.BytesIO()
    np.save(file, array)
    client.post(user(part(SMALL, image_embeds=file.getvalue())), queue="engine")
    job = backend.pull()
    with job.view() as items:
        same_bits(items["image"][0], np.load(io.BytesIO(file.getvalue())), SMALL)
    job.ack()


def test_the_same_embedding_is_one_item_of_the_cache_until_it_is_evicted_or_cleared(service, offers, client, backend):
    """Jobs of what the frontend knows to be there are made without asking the writer first."""
    assert service.post("/reset_mm_cache", {}).status == 200
    chat, twice = user(part(SMALL)), user(part(SMALL), part(SMALL))
    for asked, found, empties in ((chat, 0, False), (chat, 1, False), (twice, 2, False), (chat, 0, True)):
        if empties:
            assert service.post("/reset_mm_cache", {}).status == 200
        before = counted(service)
        offers.unlink(missing_ok=True)
        client.post(asked, queue="engine")
        assert offers.exists() == (not found)
        number = len(asked[0]["content"])
        assert [after - then for after, then in zip(counted(service), before, strict=True)] == [number, found]
        job = backend.pull()
        assert [item.cached for item in job.items["image"]] == [bool(found)] * number
        with job.view() as items:
            for arrays in items["image"]:
                same_bits(arrays, rows(SMALL), SMALL)
        job.ack()
        assert service.quiet()["ring"]["entries"] == 1
    client.post(chat, queue="engine", cache_salt="another tenant's")
    job = backend.pull()
    assert not job.items["image"][0].cached
    assert job.items["image"][0].hash not in service.render(chat)["features"]["mm_hashes"]["image"]
    job.ack()


def test_a_job_without_tensors_costs_the_cache_nothing(service, client, backend):
    before = counted(service)
    client.post(CHAT, queue="engine", mm_payload="none")
    assert counted(service) == before
    job = backend.pull()
    answer = service.render(CHAT, mm_payload="none")
    assert job.token_ids == answer["token_ids"]
    assert [item.hash for item in job.items["image"]] == answer["features"]["mm_hashes"]["image"]
    with pytest.raises(InvalidRequest, match="no tensors"), job.view():
        pass
    job.ack()


def test_they_come_beside_media_of_other_modalities(service, client, backend):
    frames = [Image.fromarray(np.full((56, 56, 3), shade, np.uint8)) for shade in (0, 80, 160, 240)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=500)
    film = {
        "type": "video_url",
        "video_url": {"url": "data:image/gif;base64," + base64.b64encode(file.getvalue()).decode()},
    }
    chat = user(part(GRIDS[0]), film, part(GRIDS[1]))
    answer = service.render(chat)
    client.post(chat, queue="engine")
    job = backend.pull()
    assert job.token_ids == answer["token_ids"]
    assert job.request["features"]["mm_hashes"] == answer["features"]["mm_hashes"]
    with job.view() as items:
        for arrays, grid in zip(items["image"], GRIDS, strict=True):
            same_bits(arrays, rows(grid), grid)
        (video,) = items["video"]
        (expected,) = map(decode_item, answer["features"]["kwargs_data"]["video"])
        assert video.keys() == expected.keys()
        assert all(np.array_equal(video[name], field.array) for name, field in expected.items())
    job.ack()


def test_what_is_above_a_quarter_of_the_ring_is_read_from_a_segment_of_its_own(service, client, backend):
    client.post(user(part(LARGE)), queue="engine")
    job = backend.pull()
    assert job.items["image"][0].address.segment != service.status()["segment"]
    with job.view() as items:
        same_bits(items["image"][0], rows(LARGE), LARGE)
    job.ack()


def test_what_finds_no_shared_memory_is_refused_and_taken_when_there_is_some_again(service, client, backend):
    with Client(service.endpoint, backend_id="greedy") as greedy:
        held = fill_with_views(greedy)
        posted = []
        while (
            answer := service.chat(user(part(SMALL, image_embeds=other(len(posted)))), queue="declared")
        ).status == 202:
            posted.append(answer.json["request_id"])
        assert (answer.status, answer.error["type"]) == (429, "OverloadedError")
        assert int(answer.headers["Retry-After"]) >= 1
        assert 0 < len(posted) < 8
        for item in held:
            item.release()
    with Backend(service.endpoint, queue="declared", credits=8) as taking:
        for number, job_id in enumerate(posted):
            job = taking.pull()
            assert job.id == job_id
            with job.view() as items:
                same_bits(items["image"][0], np.load(io.BytesIO(base64.b64decode(other(number)))), SMALL)
            job.ack()
    service.quiet()
    client.post(user(part(SMALL, image_embeds=other(len(posted)))), queue="engine")
    backend.pull().ack()


def other(number):
    return npy(np.full((16, 1536), number + 0.5, "<f4"))


def test_a_job_outlives_the_writer_with_its_tensors(service, client):
    with Backend(service.endpoint, queue="engine", credits=1) as backend:
        client.post(CHAT, queue="engine")
        client.post(user(part(SMALL)), queue="engine")
        first = backend.pull()
        (pid,) = service.pids()["writer"]
        os.kill(pid, signal.SIGKILL)
        with first.view() as items:
            same_bits(items["image"][0], rows(GRIDS[0]), GRIDS[0])
        first.ack()
        second = backend.pull()
        with second.view() as items:
            same_bits(items["image"][0], rows(SMALL), SMALL)
        second.ack()
    service.quiet()


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_embeds": npy(np.zeros((6, 3), "<f4"))},
        {"image_embeds": npy(np.zeros((7, 1536), "<f4"))},
        {"image_embeds": npy(np.zeros((6, 1536), "<i4"))},
        {"image_embeds": npy(np.zeros((6, 1536), "<f8"))},
        {"image_embeds": base64.b64encode(base64.b64decode(npy(rows(GRIDS[0])))[:-1]).decode()},
        {"image_embeds": base64.b64encode(b"\x80\x02}q\x00.").decode()},
        {"image_embeds": "?"},
        {"image_embeds": npy(np.zeros((200, 1536), "<f4"))},
        {"image_grid_thw": [1, 4, 4]},
        {"image_grid_thw": [1, 4]},
        {"image_grid_thw": [0, 4, 6]},
        {"image_grid_thw": npy(np.zeros(9000, "<i8"))},
    ],
)
def test_what_rendering_refuses_is_refused_in_the_same_words(service, wrong):
    chat = user(part(GRIDS[0], **wrong))
    rendered, posted = service.chat(chat), service.chat(chat, queue="declared")
    assert rendered.status in {400, 413}
    assert (posted.status, posted.error) == (rendered.status, rendered.error)


LYING = [
    (rows(GRIDS[0])[:5], GRIDS[0], InvalidRequest),
    (rows(GRIDS[0]), (1, 4, 4), InvalidRequest),
    (rows(GRIDS[0]), (1 << 20, 1 << 20, 4), InvalidRequest),
    (rows(GRIDS[0], "<i4"), GRIDS[0], InvalidRequest),
]


def test_a_lane_believes_no_frontend_and_nothing_is_left_of_what_lies(service, client, backend):
    files = [(base64.b64decode(npy(array)), grid, error) for array, grid, error in LYING]
    right = files[1][0]
    files += [(right[:-1], GRIDS[0], InvalidRequest), (right + b"\0", GRIDS[0], InvalidRequest)]
    files += [(right.replace(b"1536", b"9999"), GRIDS[0], InvalidRequest), (b"", GRIDS[0], InvalidRequest)]
    files += [(right, None, MediaError)]
    lanes, entries = service.pids()["lane"], service.quiet()["ring"]["entries"]

    async def offers(link, medium, grid, digest):
        options = msgspec.msgpack.encode(ItemOptions("float32", grid=grid))
        item = OfferItem(os.urandom(32), "image", medium, digest, options, 4096)
        deadline = asyncio.get_running_loop().time() + PATIENCE
        with await link.offer([item], need="tensors", deadline=deadline, priority=0) as offered:
            return offered.items[0].fault

    async def main():
        with zmq.Context() as context:
            link = WriterLink(
                context, parse_endpoint(service.endpoint), 9, hasher="blake3", inline_size=1, queue_size=1, on_card=bool
            )
            try:
                for medium, grid, expected in files:
                    fault = await offers(link, medium, grid, Hasher("blake3").content_digest(medium))
                    assert isinstance(fault.error(), expected), (fault, grid, medium[:80])
                fault = await offers(link, right, GRIDS[0], bytes(32))
                assert isinstance(fault.error(), ProtocolError)
            finally:
                link.close()

    asyncio.run(main())
    state = service.quiet()
    assert (service.pids()["lane"], state["ring"]["entries"]) == (lanes, entries)
    client.post(CHAT, queue="engine")
    job = backend.pull()
    with job.view() as items:
        same_bits(items["image"][0], rows(GRIDS[0]), GRIDS[0])
    job.ack()


def test_one_that_is_larger_than_a_medium_may_be_is_refused(client):
    with pytest.raises(TooLarge) as caught:
        client.post(user(part((1, 28, 28), image_embeds=base64.b64decode(npy(rows((1, 28, 28)))))), queue="declared")
    assert caught.value.param == "messages[0].content[0].image_embeds"
