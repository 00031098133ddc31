"""Answers as MessagePack: read by an independent decoder, they are what JSON says, and what transformers computes."""

import base64
import json
import socket
from contextlib import closing

import msgpack
import numpy as np
import pytest
from PIL import Image
from tests.integration.service import DATA, decode_item, photo, serving, text, user
from transformers import AutoImageProcessor

from mmprep import Backend, embedded

PHOTOS = ("astronaut.jpg", "cat.png")
PACKED = {"Accept": "application/msgpack"}
CHAT = "/v1/chat/completions/render"
PICTURES = user(text("Which is older?"), *map(photo, PHOTOS))
MESSAGES_API = [
    {
        "role": "user",
        "content": [
            {
                "type": "image",
                "source": {
                    "type": "base64",
                    "media_type": "image/png",
                    "data": base64.b64encode((DATA / "cat.png").read_bytes()).decode(),
                },
            }
        ],
    }
]
RESPONSES_API = [
    {"role": "user", "content": [{"type": "input_image", "image_url": photo("cat.png")["image_url"]["url"]}]}
]


@pytest.fixture(scope="module")
def service():
    with serving("--frontends", 1, "--cache-size", "64MiB") as running:
        yield running


def both(service, path, body):
    """Return the answer as MessagePack and as JSON, decoded."""
    packed = service.post(path, body, **PACKED)
    assert packed.status == 200, packed.body
    assert packed.headers["Content-Type"] == "application/msgpack"
    answer = service.post(path, body)
    assert answer.headers["Content-Type"] == "application/json"
    return msgpack.unpackb(packed.body), answer.json


def as_json(answer):
    """Return what JSON must say where MessagePack says ``answer``: bytes in base64, and nothing else changed."""
    match answer:
        case bytes():
            return base64.b64encode(answer).decode()
        case dict():
            return {name: as_json(value) for name, value in answer.items()}
        case list():
            return [as_json(value) for value in answer]
    return answer


@pytest.mark.parametrize("payload", ["tensors", "none", "shm"])
def test_a_chat_is_the_same_in_both_but_for_base64(service, payload):
    with Backend(service.endpoint, id="reader"):
        body = {"messages": PICTURES, "mm_payload": payload, "return_prompt_text": True, "backend_id": "reader"}
        packed, answer = both(service, CHAT, body)
        for one in (packed, answer):
            one["request_id"] = ""
            for address in (one["features"]["mm_addresses"] or {}).get("image", ()):
                assert len(bytes.fromhex(address.pop("lease"))) == 16
    items = packed["features"]["kwargs_data"]
    assert (items is None) == (payload != "tensors")
    assert items is None or [type(item) for item in items["image"]] == [bytes, bytes]
    assert as_json(packed) == answer


def test_the_bytes_hold_the_tensors_that_transformers_computes(service):
    processor = AutoImageProcessor.from_pretrained(embedded.path())
    packed, _ = both(service, CHAT, {"messages": PICTURES, "mm_dtype": "float32"})
    features = packed["features"]
    for name, item, metadata in zip(
        PHOTOS, features["kwargs_data"]["image"], features["mm_metadata"]["image"], strict=True
    ):
        expected = processor(images=[Image.open(DATA / name).convert("RGB")], return_tensors="np")
        fields = decode_item(base64.b64encode(item))
        assert fields["pixel_values"].dtype == "float32"
        np.testing.assert_array_equal(fields["pixel_values"].array, expected["pixel_values"], strict=True)
        np.testing.assert_array_equal(fields["image_grid_thw"].array, expected["image_grid_thw"][0])
        only = decode_item(base64.b64encode(metadata))
        assert set(only) == {"image_grid_thw"}


def test_who_reads_slowly_holds_nothing_of_the_ring_and_gets_what_was_there(service):
    body = json.dumps({"messages": PICTURES, "mm_dtype": "float32", "cache_salt": "slow"}).encode()
    with closing(service.connect()) as connection:
        connection.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 512 * 1024)
        connection.request("POST", CHAT, body, {"Content-Type": "application/json", **PACKED})
        response = connection.getresponse()  # its head: the rest is larger than what the kernel takes
        status = service.quiet()
        assert status["ring"]["entries"] > 0
        before = service.metrics()["mmprep_ring_evictions_total"]
        for number in range(12):  # another picture comes to lie where these lay
            service.render(user(photo("rocket.jpg")), mm_dtype="float32", cache_salt=str(number))
        assert service.metrics()["mmprep_ring_evictions_total"] > before
        slow = msgpack.unpackb(response.read())
    again = msgpack.unpackb(service.post(CHAT, body, **PACKED).body)
    assert slow["features"] == again["features"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages/render", {"messages": MESSAGES_API, "max_tokens": 5}),
        ("/v1/responses/render", {"input": RESPONSES_API}),
        ("/v1/completions/render", {"prompt": ["one", "two and three"]}),
        ("/tokenize", {"messages": PICTURES, "return_token_strs": True}),
        ("/tokenize", {"prompt": "word " * 30_000}),
        ("/detokenize", {"tokens": [5, 6, 7]}),
        (CHAT, {"messages": user(text("hello"))}),
        ("/leases/renew", {"backend_id": "engine", "leases": []}),
        ("/reset_media_cache", {}),
    ],
)
def test_every_other_answer_is_the_same_too(service, path, body):
    packed, answer = both(service, path, body)
    answers = [packed, answer]
    for one in answers:
        for request in one if isinstance(one, list) else [one]:
            request.pop("request_id", None)
    assert as_json(packed) == answer


def test_what_is_queued_and_reset_is_told_in_it_too(service):
    with Backend(service.endpoint, queue="engine") as backend:
        answer = service.post(CHAT, {"messages": user(text("hello")), "queue": "engine"}, **PACKED)
        assert (answer.status, answer.headers["Content-Type"]) == (202, "application/msgpack")
        job = backend.pull()
        assert msgpack.unpackb(answer.body) == {"request_id": job.id, "queue": "engine"}
        job.ack()
    answer = service.post("/reset_mm_cache", {}, **PACKED)
    assert answer.headers["Content-Type"] == "application/msgpack"
    assert msgpack.unpackb(answer.body).keys() == {"entries", "bytes"}


def test_errors_are_json_whatever_is_accepted(service):
    wrong = service.post(CHAT, {"messages": user(photo("cat.png")), "mm_dtype": "int3"}, **PACKED)
    assert (wrong.status, wrong.error["param"]) == (400, "mm_dtype")
    huge = {"messages": user(photo("cat.png")), "kv_transfer_params": {"number": 2**64}}
    assert service.post(CHAT, huge).status == 200
    refused = service.post(CHAT, huge, **PACKED)
    assert refused.status == 400
    assert "ask for JSON" in refused.error["message"]
    service.quiet()


def test_the_description_tells_of_both(service):
    document = json.loads(service.get("/openapi.json").body)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            kinds = set(operation["responses"]["200"]["content"])
            assert ("application/msgpack" in kinds) == (method == "post"), path
