"""Media by ``uuid`` alone, over HTTP and native doors of a service of two frontends: found, or a 404 that names the part."""

import hashlib
import io
import itertools
import json
import os
import signal

import msgspec
import numpy as np
import pytest
import zmq
from blake3 import blake3
from PIL import Image
from tests.integration.service import decode_item, image, serving, text, user
from transformers import AutoImageProcessor

from mmprep import Backend, Client, NotFound, __version__, embedded
from mmprep.failpoints import VARIABLE
from mmprep.result import unpack_head
from mmprep.runtime import RuntimeDir
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL, pack, unpack

seeds = itertools.count(1)
#: Pictures that fill the ring of 8 MiB several times over.
FLOOD = 300
#: The forms in which clients say that they send no data.
ABSENT = [{}, {"image_url": None}, {"image_url": {}}, {"image_url": {"url": None}}, {"image_url": ""}]


@pytest.fixture(scope="module")
def offers(tmp_path_factory):
    """Return a file that is there when a frontend has asked the writer for media by an offer."""
    return tmp_path_factory.mktemp("offers") / "made"


@pytest.fixture(scope="module")
def service(offers):
    env = {VARIABLE: f"frontend.offer.sent=touch:{offers}"}
    with serving("--frontends", 2, "--cache-size", "8MiB", env=env) as running:
        yield running


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained(embedded.path())


@pytest.fixture
def uuid():
    """Return a name that no other test uses."""
    return f"https://pictures.example/{next(seeds)}.png?size=large"


@pytest.fixture
def cat():
    return picture()


def picture():
    """Return a PNG that was not there before."""
    seed = next(seeds)
    pixels = np.random.default_rng(seed).integers(0, 256, (112 + 28 * (seed % 5), 168, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sent(data, uuid):
    return {**image(data, "png"), "uuid": uuid}


def alone(uuid):
    return {"type": "image_url", "image_url": None, "uuid": uuid}


def hashes(answer):
    return answer["features"]["mm_hashes"]["image"]


def expected_pixels(processor, data):
    """Return what transformers makes of a picture, before it normalises."""
    opened = Image.open(io.BytesIO(data))
    processed = processor(images=[opened], return_tensors="np", do_rescale=False, do_normalize=False)
    return processed["pixel_values"].astype(np.uint8)


def hash_of(service, data, **fields):
    """Return the hash of a picture that is sent without a uuid; nothing is computed for it but its plan."""
    return hashes(service.render(user(image(data, "png")), mm_payload="none", **fields))[0]


def not_found(service, parts, param, **fields):
    answer = service.chat(user(*parts), **fields)
    assert answer.status == 404, answer.body
    assert answer.error["type"] == "NotFoundError"
    assert answer.error["param"] == param
    assert "uuid" in answer.error["message"]
    return answer.error


def through(endpoint, body):
    """Send one chat to the frontend with this endpoint and return the hashes in its answer, the job's id, or the error."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger, socket.rcvtimeo = 1000, 60_000
        socket.connect(endpoint)
        socket.send(pack(messages.Hello(PROTOCOL, __version__, "client", "by-hand", os.getpid())))
        assert isinstance(unpack(socket.recv(), messages.FromFrontend), messages.FrontendWelcome)
        socket.send_multipart([pack(messages.Request(1, "chat")), msgspec.json.encode(body)])
        header, *frames = socket.recv_multipart()
    answer = unpack(header, messages.FromFrontend)
    if isinstance(answer, messages.Failed):
        return answer.fault.error()
    if isinstance(answer, messages.Response):
        return msgspec.json.decode(frames[0])["request_id"]
    return [item.hash.hex() for item in unpack_head(frames[0]).items]


# --- what is found ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image_url", "input_image"])
def test_a_picture_that_was_sent_with_a_uuid_is_had_by_it_alone(service, processor, uuid, cat, kind):
    first = service.render(user(sent(cat, uuid), text("What is this?")))
    for absent in ABSENT:
        again = service.render(user({"type": kind, **absent, "uuid": uuid}, text("What is this?")))
        assert again["features"] == first["features"]
        assert again["token_ids"] == first["token_ids"]
    fields = decode_item(again["features"]["kwargs_data"]["image"][0])
    assert np.array_equal(fields["pixel_values"].array, expected_pixels(processor, cat))


def test_the_hash_is_the_contents_whatever_it_is_called(service, uuid, cat):
    (named,) = hashes(service.render(user(sent(cat, uuid))))
    assert named == hash_of(service, cat)
    assert hashes(service.render(user(sent(cat, uuid + "2"), alone(uuid)))) == [named, named]


def test_a_uuid_that_one_frontend_heard_is_known_to_the_other(service, uuid, cat):
    first, second = RuntimeDir(service.runtime_dir).frontends()
    for one, other, name in ((first, second, uuid), (second, first, uuid + "2")):
        noted = through(one, {"messages": user(sent(cat, name)), "mm_payload": "none"})
        assert noted == [hash_of(service, cat)]
        for endpoint in (other, one):
            assert through(endpoint, {"messages": user(alone(name)), "mm_payload": "none"}) == noted
    unknown = through(second, {"messages": user(text("?"), alone(uuid + "3")), "mm_payload": "none"})
    assert (type(unknown), unknown.param) == (NotFound, "messages[0].content[1].uuid")


def test_every_payload_is_had_by_uuid(service, processor, uuid, cat):
    noted = hashes(service.render(user(sent(cat, uuid))))
    pixels = expected_pixels(processor, cat)
    assert hashes(service.render(user(alone(uuid)), mm_payload="none")) == noted
    with Backend(service.endpoint, id="by-uuid") as backend:
        features = service.render(user(alone(uuid)), mm_payload="shm", backend_id="by-uuid")["features"]
        item = backend.open(features["mm_addresses"]["image"][0])
        assert np.array_equal(item.materialize()["pixel_values"], pixels)
        item.release()


class Queue:
    """Posts through a frontend that is named, and sees what the job is, and whether the writer was asked before."""

    def __init__(self, backend, offers):
        self._backend = backend
        self._offers = offers

    def post(self, endpoint, *parts, **fields):
        """Return the job, acknowledged, and whether it was made by an offer; or the error."""
        self._offers.unlink(missing_ok=True)
        told = through(endpoint, {"messages": user(*parts), "queue": "by-uuid", **fields})
        if not isinstance(told, str):
            return told
        job = self._backend.pull()
        assert job.id == told
        pixels = []
        if fields.get("mm_payload") != "none":
            with job.view() as items:
                pixels = [arrays["pixel_values"].copy() for arrays in items["image"]]
        job.ack()
        return [item.hash for item in job.items["image"]], pixels, self._offers.exists()


@pytest.fixture
def queue(service, offers):
    with Backend(service.endpoint, queue="by-uuid") as backend:
        yield Queue(backend, offers)


def test_a_job_by_uuid_alone_takes_one_word_with_the_writer_where_its_frontend_knows_the_picture(
    service, queue, processor, uuid, cat
):
    """The one frontend has sent it; the other learns by asking once what it stands for, and where that lies."""
    first, second = RuntimeDir(service.runtime_dir).frontends()
    expected, pixels = [hash_of(service, cat)], expected_pixels(processor, cat)
    for endpoint, part, asks in (
        (first, sent(cat, uuid), True),
        (first, alone(uuid), False),
        (second, alone(uuid), True),
        (second, alone(uuid), False),
    ):
        noted, found, asked = queue.post(endpoint, part)
        assert (noted, asked) == (expected, asks)
        assert np.array_equal(found[0], pixels)
    assert queue.post(second, alone(uuid), mm_payload="none") == (expected, [], False)
    before = service.metrics()
    noted, found, asked = queue.post(second, image(cat, "png"), alone(uuid), alone(uuid))
    assert (noted, asked) == (expected * 3, False)
    after = service.metrics()
    for name in ("queries", "hits"):
        assert (
            after[f'mmprep_mm_cache_{name}_total{{modality="image"}}'] - 3
            == before[f'mmprep_mm_cache_{name}_total{{modality="image"}}']
        )


def test_a_job_is_of_what_a_uuid_stands_for_whichever_frontend_has_heard_of_it(service, queue, processor, uuid):
    first, second = RuntimeDir(service.runtime_dir).frontends()
    cat, dog = picture(), picture()
    names = [uuid, uuid + "2"]
    queue.post(second, sent(cat, names[0]), sent(dog, names[1]))
    assert not queue.post(second, *map(alone, names))[2]
    queue.post(first, sent(dog, names[0]), sent(cat, names[1]))
    noted, pixels, asked = queue.post(second, *map(alone, names))
    assert asked, "it took what it remembered for what is so"
    assert noted == [hash_of(service, dog), hash_of(service, cat)]
    for found, data in zip(pixels, (dog, cat), strict=True):
        assert np.array_equal(found, expected_pixels(processor, data))
    assert queue.post(second, *map(alone, names))[::2] == (noted, False)
    # What a name stood for before it is sent in the same request is for the writer to say.
    noted, _, asked = queue.post(second, alone(names[0]), sent(cat, names[0]), alone(names[0]))
    assert (noted, asked) == ([hash_of(service, data) for data in (dog, cat, cat)], True)


def test_a_job_by_a_uuid_that_stands_for_nothing_any_more_is_a_404_that_names_its_part(service, queue, uuid, cat):
    first, _ = RuntimeDir(service.runtime_dir).frontends()
    queue.post(first, sent(cat, uuid))
    assert not queue.post(first, alone(uuid))[2]
    assert service.post("/reset_mm_cache", {}).status == 200
    for fields in ({}, {"mm_payload": "none"}):
        error = queue.post(first, text("?"), alone(uuid), **fields)
        assert (type(error), error.param) == (NotFound, "messages[0].content[1].uuid")
    answer = service.chat(user(text("?"), alone(uuid)), queue="by-uuid")
    assert (answer.status, answer.error["param"]) == (404, "messages[0].content[1].uuid")
    assert queue.post(first, sent(cat, uuid))[0] == [hash_of(service, cat)]


def test_tokens_are_counted_by_uuid(service, uuid, cat):
    words = text("What is this?")
    counted = service.post("/tokenize", {"messages": user(sent(cat, uuid), words)})
    by_uuid = service.post("/tokenize", {"messages": user(alone(uuid), words)})
    assert (counted.status, by_uuid.status) == (200, 200)
    assert by_uuid.json == counted.json
    assert by_uuid.json["count"] > 10
    error = service.post("/tokenize", {"messages": user(words, alone(uuid + "2"))}).error
    assert (error["code"], error["param"]) == (404, "messages[0].content[1].uuid")


@pytest.mark.parametrize("payload", ["shm", "tensors", "none"])
def test_native_clients_have_a_picture_by_uuid(service, processor, uuid, cat, payload):
    with Client(service.endpoint) as client:
        part = {"type": "image_url", "image_url": {"url": cat}, "uuid": uuid}
        first = client.chat(user(part), payload=payload)
        again = client.chat(user(alone(uuid), alone(uuid)), payload=payload)
        assert [item.hash for item in again.items["image"]] == [first.items["image"][0].hash] * 2
        if payload != "none":
            assert all(item.cached for item in again.items["image"])
            for item in again.items["image"]:
                assert np.array_equal(item.materialize()["pixel_values"], expected_pixels(processor, cat))
        counted = client.tokenize(messages=user(alone(uuid)))
        assert counted["count"] == len(client.chat(user(part), payload="none").token_ids)
        with pytest.raises(NotFound) as caught:
            client.chat(user(alone(uuid + "2")), payload=payload)
        assert caught.value.param == "messages[0].content[0].uuid"
        first.release()
        again.release()


def test_recalled_pictures_count_as_queries_and_hits_and_nothing_is_decoded_or_hashed(service, uuid, cat):
    service.render(user(sent(cat, uuid)))
    before = service.metrics()
    service.render(user(alone(uuid), alone(uuid)))
    not_found(service, [alone(uuid + "2")], "messages[0].content[0].uuid")
    after = service.metrics()
    for name, grown in (
        ('mmprep_mm_cache_queries_total{modality="image"}', 3),
        ('mmprep_mm_cache_hits_total{modality="image"}', 2),
        ('vllm:mm_cache_hits_total{modality="image"}', 2),
        ('mmprep_stage_seconds_count{stage="decode"}', 0),
        ('mmprep_stage_seconds_count{stage="hash"}', 0),
    ):
        assert after[name] - before[name] == grown, name


# --- what is not --------------------------------------------------------------------------------------------------------


def test_an_unknown_uuid_is_a_404_that_names_its_part(service, uuid, cat):
    parts = [text("?"), image(cat, "png"), {"type": "image_url", "uuid": uuid}]
    for fields in ({}, {"mm_payload": "none"}):
        error = not_found(service, parts, "messages[0].content[2].uuid", **fields)
        assert "send its data again" in error["message"]
        assert uuid not in error["message"]


def test_nobody_finds_a_picture_by_its_hash_or_digest_or_in_another_scope(service, uuid, cat):
    key = hash_of(service, cat)
    service.render(user(sent(cat, uuid)))
    service.render(user(sent(cat, uuid)), cache_salt="a")
    digests = (blake3(cat).hexdigest(), hashlib.sha256(cat).hexdigest())
    for guess in (key, key.upper(), *digests):
        not_found(service, [alone(guess)], "messages[0].content[0].uuid")
    not_found(service, [alone(uuid)], "messages[0].content[0].uuid", cache_salt="b")


def test_a_uuid_stands_for_one_picture_in_each_scope(service, uuid):
    cat, dog = picture(), picture()
    service.render(user(sent(cat, uuid)))
    service.render(user(sent(dog, uuid)), cache_salt="a")
    assert hashes(service.render(user(alone(uuid)))) == [hash_of(service, cat)]
    assert hashes(service.render(user(alone(uuid)), cache_salt="a")) == [hash_of(service, dog, cache_salt="a")]


def test_tensors_of_another_dtype_or_beside_a_plan_have_to_be_computed_from_the_data(service, uuid, cat):
    place = "messages[0].content[0].uuid"
    service.render(user(sent(cat, uuid)), mm_payload="none")
    not_found(service, [alone(uuid)], place)
    service.render(user(sent(cat, uuid)))
    not_found(service, [alone(uuid)], place, mm_dtype="float32")
    service.render(user(image(cat, "png")), mm_dtype="float32")
    features = service.render(user(alone(uuid)), mm_dtype="float32")["features"]
    assert decode_item(features["kwargs_data"]["image"][0])["pixel_values"].dtype == "float32"
    assert features["mm_hashes"]["image"] == [hash_of(service, cat, mm_dtype="float32")]
    service.render(user(alone(uuid)))


def test_an_evicted_picture_is_a_404_until_it_is_sent_again(service, uuid, cat):
    service.render(user(sent(cat, uuid)))
    with Client(service.endpoint) as client:
        for _ in range(FLOOD):
            client.chat(user({"type": "image_url", "image_url": picture()}), payload="tensors")
    not_found(service, [alone(uuid)], "messages[0].content[0].uuid")
    first = service.render(user(sent(cat, uuid)))
    assert service.render(user(alone(uuid)))["features"] == first["features"]


def test_a_part_without_data_and_uuid_and_a_wrong_uuid_are_refused_at_their_places(service):
    for part, name in (
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": {}}, "image_url"),
        ({"type": "image_url", "uuid": 7}, "uuid"),
        ({"type": "image_url", "uuid": ""}, "uuid"),
        ({"type": "image_url", "uuid": "u" * 1025}, "uuid"),
    ):
        answer = service.chat(user(part))
        assert (answer.status, answer.error["param"]) == (400, f"messages[0].content[0].{name}")


# --- what a uuid stands for ---------------------------------------------------------------------------------------------


def test_other_bytes_under_a_uuid_make_it_stand_for_those(service, uuid):
    cat, dog = picture(), picture()
    service.render(user(sent(cat, uuid)))
    answer = service.render(user(sent(dog, uuid)))
    assert hashes(answer) == [hash_of(service, dog)]
    assert service.render(user(alone(uuid)))["features"] == answer["features"]
    assert hashes(service.render(user(sent(cat, uuid)))) == [hash_of(service, cat)]
    assert hashes(service.render(user(alone(uuid)))) == [hash_of(service, cat)]


def test_the_parts_of_one_request_mean_what_they_would_one_after_the_other(service, uuid):
    before, cat, dog = picture(), picture(), picture()
    service.render(user(sent(before, uuid)))
    parts = [alone(uuid), sent(cat, uuid), alone(uuid), sent(dog, uuid), alone(uuid), alone(uuid)]
    expected = [hash_of(service, data) for data in (before, cat, cat, dog, dog, dog)]
    assert hashes(service.render(user(*parts))) == expected
    assert hashes(service.render(user(alone(uuid)))) == expected[-1:]


def test_after_bytes_that_are_no_picture_a_uuid_does_not_stand_for_the_picture_before(service, uuid, cat):
    service.render(user(sent(cat, uuid)))
    broken = cat[: len(cat) // 2]
    assert service.chat(user(sent(broken, uuid))).status == 422
    not_found(service, [alone(uuid)], "messages[0].content[0].uuid")
    service.render(user(sent(cat, uuid)))
    service.render(user(alone(uuid)))


def test_data_that_do_not_reach_the_cache_change_nothing(service, uuid, cat):
    service.render(user(sent(cat, uuid)))
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}, "uuid": uuid}
    assert service.chat(user(part)).status == 400
    assert hashes(service.render(user(alone(uuid)))) == [hash_of(service, cat)]


def test_a_conversation_goes_on_with_uuids_in_place_of_its_pictures(service, uuid):
    cat, dog = picture(), picture()
    turns = user(sent(cat, uuid), text("And this?"))
    first = service.render(turns)
    turns = [
        *user(alone(uuid), text("And this?")),
        {"role": "assistant", "content": "Noise."},
        *user(sent(dog, uuid + "2"), alone(uuid), text("Which one is darker?")),
    ]
    answer = service.render(turns)
    assert hashes(answer) == [*hashes(first), hash_of(service, dog), *hashes(first)]
    params = json.dumps(service.chat([*turns, *user(text("?"), alone(uuid + "3"))]).error["param"])
    assert params == '"messages[3].content[1].uuid"'


def test_the_next_writer_knows_no_uuids_and_learns_them_again(uuid, cat):
    with serving("--frontends", 2, "--cache-size", "16MiB") as service:
        service.render(user(sent(cat, uuid)))
        before = service.status()["worker"]
        os.kill(before["pid"], signal.SIGKILL)
        not_found(service, [alone(uuid)], "messages[0].content[0].uuid")
        service.status_when(lambda s: s.get("worker", before)["pid"] != before["pid"], "another writer")
        first = service.render(user(sent(cat, uuid)))
        assert service.render(user(alone(uuid)))["features"] == first["features"]
