"""Items that were processed elsewhere, in a real service: had by their names in every way, by nobody else, or refused.

What is injected is made by transformers' processor or by hand; most bodies are packed here, by another packer than the
client's.
"""

import io
import itertools
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from PIL import Image
from tests.integration.service import DATA, decode_item, image, photo, serving, text, user
from transformers import AutoImageProcessor

from mmprep import Backend, Client, InvalidRequest, embedded

KEY, SAME, OTHER, ADMIN = (f"sk-{name}-0123456789abcdef" for name in ("client", "same", "other", "admin"))
GRID = (1, 4, 6)
names = itertools.count(1)


def with_key(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys")
    keys, admins = directory / "keys", directory / "admins"
    keys.write_text(f"team {KEY}\nteam {SAME}\nelse {OTHER}\n")
    admins.write_text(f"team {ADMIN}\n")
    options = ("--api-key-file", keys, "--admin-key-file", admins, "--enable-injection", "--max-media-size", "3MiB")
    with serving("--frontends", 2, "--cache-size", "8MiB", "--spill-size", 0, "--max-model-len", 4096, *options) as it:
        yield it


@pytest.fixture(scope="module")
def token():
    return json.loads((embedded.path() / "config.json").read_text())["image_token_id"]


@pytest.fixture
def name():
    return f"injected-{next(names)}"


def pixels(seed, grid=GRID):
    """Return what an external processor may have made: patches of uint8."""
    return np.random.default_rng(seed).integers(0, 256, (int(np.prod(grid)), 1176), np.uint8)


def field(array, dtype=None):
    return {"data": [dtype or array.dtype.name, list(array.shape), msgpack.ExtType(3, array.tobytes())]}


def made(name, token, seed=1, grid=GRID, **more):
    """Return a body."""
    fields = {"pixel_values": field(pixels(seed, grid)), "image_grid_thw": field(np.array(grid, np.int64))}
    expansion = {"token_ids": [token] * (int(np.prod(grid)) // 4)}
    return {"key": name, "modality": "image", "fields": fields, "expansion": expansion, **more}


def inject(service, body, key=ADMIN, **headers):
    packed = body if isinstance(body, bytes) else msgpack.packb(body)
    return service.request("POST", "/inject", packed, Content_Type="application/msgpack", **with_key(key), **headers)


def injected(service, body):
    answer = inject(service, body)
    assert answer.status == 200, answer.body
    return answer.json


def chat(service, *parts, key=KEY, **fields):
    return service.post("/v1/chat/completions/render", {"messages": user(*parts), **fields}, **with_key(key))


def rendered(service, *parts, **fields):
    answer = chat(service, *parts, **fields)
    assert answer.status == 200, answer.body
    return answer.json["features"]


def hash_of(features):
    (only,) = features["mm_hashes"]["image"]
    return only


def patches(features):
    (only,) = features["kwargs_data"]["image"]
    return decode_item(only)["pixel_values"].array


def alone(name):
    return {"type": "image_url", "image_url": None, "uuid": name}


def picture(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, 84, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# --- what is had --------------------------------------------------------------------------------------------------------


def test_an_item_is_had_by_its_name_with_every_payload_and_each_is_a_hit(service, token, name):
    told = injected(service, made(name, token))
    assert told == {"hash": told["hash"], "length": 6, "cached": False}
    packed = inject(service, made(name, token), Accept="application/msgpack")
    assert msgpack.unpackb(packed.body) == {**told, "cached": True}
    before = service.metrics()
    for payload in ("none", "tensors"):
        answer = chat(service, text("What is this?"), alone(name), mm_payload=payload).json
        (place,) = answer["features"]["mm_placeholders"]["image"]
        assert hash_of(answer["features"]) == told["hash"]
        assert answer["token_ids"][place["offset"] : place["offset"] + place["length"]] == [token] * 6
    given = decode_item(answer["features"]["kwargs_data"]["image"][0])
    assert np.array_equal(given["pixel_values"].array, pixels(1))
    assert (given["pixel_values"].kind, given["image_grid_thw"].array.tolist()) == ("flat", [1, 4, 6])
    with Backend(service.endpoint, id="engine-0") as backend:
        features = rendered(service, alone(name), mm_payload="shm", backend_id="engine-0")
        item = backend.open(features["mm_addresses"]["image"][0])
        with item.view() as arrays:
            assert np.array_equal(arrays["pixel_values"], pixels(1))
        item.release()
    after = service.metrics()
    for series in ("mmprep_mm_cache_queries_total", "mmprep_mm_cache_hits_total", "vllm:mm_cache_hits_total"):
        labelled = f'{series}{{modality="image"}}'
        assert after[labelled] - before.get(labelled, 0) == 3
    body = {"messages": user(text("What is this?"), alone(name))}
    assert service.post("/tokenize", body, **with_key(KEY)).json["tokens"] == answer["token_ids"]


def test_what_transformers_makes_of_a_picture_is_had_as_what_the_service_makes_of_it(service, token, name):
    opened = Image.open(DATA / "cat.png").convert("RGB").resize((160, 120))
    buffer = io.BytesIO()
    opened.save(buffer, "PNG")
    processed = AutoImageProcessor.from_pretrained(embedded.path())(images=[opened], return_tensors="np")
    values, grid = processed["pixel_values"].astype(np.float32), processed["image_grid_thw"][0].astype(np.int64)
    body = made(name, token, fields={"pixel_values": field(values), "image_grid_thw": field(grid)})
    body["expansion"] = {"token_ids": [token] * (len(values) // 4), "is_embed": [True] * (len(values) // 4)}
    told = injected(service, body)
    own = rendered(service, image(buffer.getvalue(), "png"), mm_dtype="float32")
    features = rendered(service, alone(name), mm_dtype="float32")
    assert patches(features).tobytes() == patches(own).tobytes()
    assert features["mm_placeholders"] == own["mm_placeholders"]
    assert hash_of(features) == told["hash"] != hash_of(own)
    refused = chat(service, alone(name))
    assert (refused.status, refused.error["param"]) == (404, "messages[0].content[0].uuid")
    assert "float32" in refused.error["message"]


def test_a_name_stands_for_what_came_last_with_it_sent_or_injected(service, token, name):
    first, second = image(picture(1), "png"), image(picture(2), "png")
    own = hash_of(rendered(service, {**first, "uuid": name}))
    told = injected(service, made(name, token))
    assert hash_of(rendered(service, alone(name))) == told["hash"]
    assert hash_of(rendered(service, first)) == own, "a native render of the medium is still right"
    last = hash_of(rendered(service, {**second, "uuid": name}))
    assert hash_of(rendered(service, alone(name))) == last
    # Within a request parts mean what they would mean one after the other.
    injected(service, made(name, token))
    assert rendered(service, alone(name), {**first, "uuid": name}, alone(name))["mm_hashes"]["image"] == [
        told["hash"],
        own,
        own,
    ]


def test_other_content_under_a_name_has_another_hash_and_who_holds_the_former_reads_it(service, token, name):
    first = injected(service, made(name, token, seed=1))
    with Backend(service.endpoint, id="engine-1") as backend:
        features = rendered(service, alone(name), mm_payload="shm", backend_id="engine-1")
        item = backend.open(features["mm_addresses"]["image"][0])
        second = injected(service, made(name, token, seed=2))
        assert second["hash"] != first["hash"]
        assert not second["cached"]
        assert np.array_equal(patches(rendered(service, alone(name))), pixels(2))
        assert np.array_equal(item.materialize()["pixel_values"], pixels(1))
        item.release()


def test_nobody_else_finds_it_and_it_is_never_served_for_a_picture(service, token, name):
    own = hash_of(rendered(service, photo("cat.png")))
    told = injected(service, made(own, token))
    assert hash_of(rendered(service, photo("cat.png"))) == own
    assert hash_of(rendered(service, alone(own))) == told["hash"]
    injected(service, made(name, token))
    assert chat(service, alone(name), key=SAME).status == 200
    for other in ({"key": OTHER}, {"cache_salt": "tenant"}):
        for known in (name, own, told["hash"]):
            refused = chat(service, alone(known), **other)
            assert (refused.status, refused.error["param"]) == (404, "messages[0].content[0].uuid")
    salted = injected(service, made(name, token, seed=3, cache_salt="tenant"))
    assert hash_of(rendered(service, alone(name), cache_salt="tenant")) == salted["hash"]


def test_a_native_client_injects_for_itself(service, token, name):
    bits = (pixels(1).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    fields = {"pixel_values": bits, "image_grid_thw": np.array(GRID)}
    with Client(service.endpoint) as client:
        given = {"expansion": [token] * 6, "dtypes": {"pixel_values": "bfloat16"}, "kinds": {"pixel_values": "flat"}}
        told = client.inject(name, fields, **given)
        item = client.chat(user(alone(name)), mm_dtype="bfloat16").items["image"][0]
        assert (item.hash, item.cached, item.length) == (told["hash"], True, 6)
        assert np.array_equal(item.materialize()["pixel_values"], bits)
        item.release()
        with pytest.raises(InvalidRequest, match="flat") as caught:
            client.inject(name, fields, **{**given, "kinds": {"pixel_values": "batched"}})
        assert caught.value.param == "fields.pixel_values"
        assert client.inject(bytes(32), fields, **given)["hash"] != told["hash"]
        assert client.chat(user(alone("00" * 32)), mm_dtype="bfloat16", payload="none").items["image"][0].cached
    assert chat(service, alone(name), mm_dtype="bfloat16").status == 404


# --- what ends ----------------------------------------------------------------------------------------------------------


def test_an_item_is_evicted_as_others_are_and_then_its_part_is_not_found_unless_it_is_leased(service, token, name):
    held = f"{name}-held"
    injected(service, made(held, token))
    injected(service, made(name, token, grid=(1, 8, 12)))
    with Backend(service.endpoint, id="engine-2") as backend:
        features = rendered(service, alone(held), mm_payload="shm", backend_id="engine-2")
        item = backend.open(features["mm_addresses"]["image"][0])
        for number in range(150):  # 110 kB each, twice the ring
            injected(service, made(f"{name}-{number}", token, seed=number, grid=(1, 8, 12)))
        gone = chat(service, text("?"), alone(name))
        assert (gone.status, gone.error["type"]) == (404, "NotFoundError")
        assert gone.error["param"] == "messages[0].content[1].uuid"
        assert np.array_equal(item.materialize()["pixel_values"], pixels(1))
        assert rendered(service, alone(held))
        item.release()
    assert rendered(service, alone(name), mm_payload="none"), "its plan outlives its tensors, as others' do"


def test_an_item_outlives_the_writer(service, token, name):
    told = injected(service, made(name, token))
    before = service.status()["worker"]
    os.kill(before["pid"], signal.SIGKILL)
    service.status_when(lambda status: status.get("worker", before)["pid"] != before["pid"], "another writer")
    features = rendered(service, alone(name))
    assert hash_of(features) == told["hash"]
    assert np.array_equal(patches(features), pixels(1))
    assert injected(service, made(name, token))["cached"]


# --- what is refused ----------------------------------------------------------------------------------------------------


def changed(path, value):
    """Return what changes a body at a place."""

    def change(body):
        *way, last = path
        for step in way:
            body = body[step]
        if value is LEFT_OUT:
            del body[last]
        else:
            body[last] = value

    return change


LEFT_OUT = object()
PIXELS, SHAPE = ("fields", "pixel_values", "data"), ("fields", "pixel_values", "data", 1)
IDS = ("expansion", "token_ids")
GRIDS = ("fields", "image_grid_thw", "data", 2)


def grid_of(*sides):
    return msgpack.ExtType(3, np.array(sides, "<i8").tobytes())


WRONG = [
    (("modality",), "video-call", "modality", 400),
    (("key",), "", "key", 400),
    (("key",), "k" * 1025, "key", 400),
    (("key",), 7, "key", 400),
    (("key",), LEFT_OUT, "key", 400),
    (("colour",), 1, "colour", 400),
    (("model",), "another", "model", 404),
    (("deadline_ms",), 0, "deadline_ms", 400),
    (("cache_salt",), "", "cache_salt", 400),
    (("fields",), [], "fields", 400),
    (("fields", "pixel_values"), LEFT_OUT, "fields", 400),
    (("fields", "more"), {"data": ["uint8", [1], msgpack.ExtType(3, b"1")]}, "fields", 400),
    (("fields", "pixel_values", "data"), LEFT_OUT, "fields.pixel_values", 400),
    (("fields", "pixel_values", "extra"), 1, "fields.pixel_values", 400),
    ((*PIXELS, 0), "int32", "fields.pixel_values.data", 400),
    ((*PIXELS, 0), "object", "fields.pixel_values.data[0]", 400),
    ((*PIXELS, 0), "bool", "fields.pixel_values", 400),
    (SHAPE, [24, 1175], "fields.pixel_values.data", 400),
    (SHAPE, [24 * 1176], "fields.pixel_values", 400),
    (SHAPE, [48, 588], "fields.pixel_values", 400),
    (SHAPE, [-24, -1176], "fields.pixel_values.data[1]", 400),
    (SHAPE, [2**63, 2**63], "fields.pixel_values.data[1]", 400),
    (SHAPE, [2**40, 2**40], "fields.pixel_values.data", 400),
    (SHAPE, [1] * 9, "fields.pixel_values.data[1]", 400),
    (SHAPE, "24", "fields.pixel_values.data[1]", 400),
    ((*PIXELS, 2), b"bytes", "fields.pixel_values.data[2]", 400),
    ((*PIXELS, 2), msgpack.ExtType(4, b"1" * 24 * 1176), "fields.pixel_values.data[2]", 400),
    ((*PIXELS, 2), msgpack.Timestamp(1), "fields.pixel_values.data[2]", 400),
    (("fields", "pixel_values", "field"), ["batched", {}], "fields.pixel_values", 400),
    (("fields", "pixel_values", "field"), ["flat", {"keep_on_cpu": True}], "fields.pixel_values", 400),
    (("fields", "pixel_values", "field"), ["flat", {"dim": 1}], "fields.pixel_values.field[1].dim", 400),
    (("fields", "pixel_values", "field"), ["round", {}], "fields.pixel_values.field[0]", 400),
    (GRIDS, grid_of(1, 4, 4), "fields.image_grid_thw", 400),
    (GRIDS, grid_of(2, 4, 3), "fields.image_grid_thw", 400),
    (GRIDS, grid_of(2, 2, 6), "fields.image_grid_thw", 400),
    (GRIDS, grid_of(-1, -4, 6), "fields.image_grid_thw", 400),
    (GRIDS, grid_of(2**62, 4, 6), "fields.image_grid_thw", 400),
    (("expansion",), [], "expansion", 400),
    (("expansion", "ranges"), [], "expansion", 400),
    (IDS, [], "expansion.token_ids", 400),
    (IDS, [1] * 6, "expansion.token_ids[0]", 400),
    (IDS, [2**31] * 6, "expansion.token_ids[0]", 400),
    (IDS, [-1] * 6, "expansion.token_ids[0]", 400),
    (IDS, ["a"], "expansion.token_ids", 400),
    (IDS, [0] * 4097, "expansion.token_ids", 400),
    (("expansion", "is_embed"), [True], "expansion.is_embed", 400),
    (("expansion", "is_embed"), [True] * 5 + [False], "expansion.token_ids[5]", 400),
    (("expansion", "is_embed"), [True] * 5000, "expansion.is_embed", 400),
]


@pytest.mark.parametrize(("path", "value", "param", "status"), WRONG)
def test_a_wrong_body_is_refused_by_the_name_of_what_is_wrong(service, token, path, value, param, status):  # noqa: PLR0917
    body = made("wrong", token)
    changed(path, value)(body)
    refused = inject(service, body)
    assert refused.status == status, refused.body
    assert refused.error["param"] == param
    assert chat(service, alone("wrong")).status == 404


def test_bodies_that_are_no_messages_are_refused_and_leave_nothing(service, token):
    whole = msgpack.packb(made("wrong", token))
    twice = whole[:1] + b"\xa3key\xa1a" + whole[1:]
    twice = bytes([whole[0] + 1]) + twice[1:]
    nested = b"\x91" * 100_000
    for body in (
        b"",
        whole[:-1],
        whole[: len(whole) // 2],
        whole + b"\xc0",
        twice,
        nested,
        b"\xdf\xff\xff\xff\xff",
        b"{}",
    ):
        refused = inject(service, body)
        assert (refused.status, refused.error["type"]) == (400, "BadRequestError")
    assert chat(service, alone("wrong")).status == 404


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 0x7FC00000), ("float16", 0xFC00), ("bfloat16", 0x7F80)])
def test_what_is_no_finite_number_is_refused(service, token, dtype, bits):
    width = 4 if dtype == "float32" else 2
    values = np.zeros((24, 1176), f"<u{width}")
    values[-1, -1] = bits
    body = made("wrong", token)
    body["fields"]["pixel_values"] = field(values, dtype)
    refused = inject(service, body)
    assert (refused.status, refused.error["param"]) == (400, "fields.pixel_values")
    assert "finite" in refused.error["message"]


def test_an_expansion_that_the_grid_does_not_give_is_refused_and_one_with_text_around_it_is_not(service, token, name):
    body = made(name, token)
    body["expansion"]["token_ids"] = [token] * 5
    refused = inject(service, body)
    assert (refused.status, refused.error["param"]) == (400, "expansion")
    body["expansion"] = {"token_ids": [5, *[token] * 6, 7, 7], "is_embed": [False, *[True] * 6, False, False]}
    assert injected(service, body)["length"] == 9
    (place,) = rendered(service, alone(name))["mm_placeholders"]["image"]
    assert place["is_embed"] == body["expansion"]["is_embed"]


def test_what_is_too_large_for_the_service_is_refused(service, token, name):
    large = inject(service, made(name, token, grid=(1, 60, 60)))  # 4.2 MB, beyond --max-media-size
    assert (large.status, large.error["param"]) == (413, "fields")
    runs = made(name, token)
    runs["expansion"] = {"token_ids": [5, 6] * 2000 + [token] * 6, "is_embed": [False] * 4000 + [True] * 6}
    assert inject(service, runs).status == 200
    beyond = inject(
        service, made(f"{name}-large", token, grid=(1, 40, 60))
    )  # 2.8 MB, and a quarter of the ring is 2 MiB
    assert beyond.status == 413
    assert "--cache-size" in beyond.error["message"]
    assert chat(service, alone(f"{name}-large"), mm_payload="none").status == 404


def test_only_an_admin_key_injects(service, token, name):
    assert inject(service, made(name, token), key=KEY).error["type"] == "AuthenticationError"
    assert chat(service, alone(name)).status == 404


def test_of_two_who_inject_under_one_name_at_once_each_is_told_the_truth(service, token, name):
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(inject, service, made(name, token, seed=seed)) for seed in (1, 2) * 10]
        answers = [(seed, job.result()) for seed, job in zip((1, 2) * 10, jobs, strict=True)]
    assert {answer.status for _, answer in answers} <= {200, 429}
    hashes = {(seed, answer.json["hash"]) for seed, answer in answers if answer.status == 200}
    assert len({seed for seed, _ in hashes}) == len(hashes)
    features = rendered(service, alone(name))
    (seed,) = [seed for seed, known in hashes if known == hash_of(features)]
    assert np.array_equal(patches(features), pixels(seed))
