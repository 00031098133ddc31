"""The bridge to vLLM: against the form as vLLM 0.33 wrote it, and, where it is installed, against vLLM itself."""

import base64
import gc
import importlib.util
import subprocess
import sys
import warnings
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
from tests.integration.service import DATA, decode_item, environment, photo, serving, text, user

from mmprep import Backend, Client, InvalidRequest, ServiceUnavailable
from mmprep.bridges.vllm import inject_into_mm_cache, to_generate_request, to_mm_kwargs_item
from mmprep.bridges.vllm.plugin import Resolver, install
from mmprep.items import FieldSpec
from mmprep.kwargs_data import from_text, to_text

vllm = pytest.mark.vllm
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed; CONTRIBUTING.md says how these are run",
)
#: What vLLM 0.33's encode_mm_kwargs_item made of pixel_values uint8 [[0, 1, 2], [3, 4, 5]] (flat), image_grid_thw int64
#: [1, 1, 2] (batched, kept on the CPU) and h bfloat16 [1.5, -2] (shared by two).
RECORDED = (
    "g6xwaXhlbF92YWx1ZXOCpGRhdGGTpXVpbnQ4kgIDxwYDAAECAwQFpWZpZWxkkqRmbGF0g6trZWVwX29uX2NwdcKmc2xpY2VzkZGTAALAo2RpbQCuaW1h"
    "Z2VfZ3JpZF90aHeCpGRhdGGTpWludDY0kQPHGAMBAAAAAAAAAAEAAAAAAAAAAgAAAAAAAAClZmllbGSSp2JhdGNoZWSBq2tlZXBfb25fY3B1w6FogqRk"
    "YXRhk6hiZmxvYXQxNpEC1gPAPwDApWZpZWxkkqZzaGFyZWSCq2tlZXBfb25fY3B1wqpiYXRjaF9zaXplAg=="
)
FIELDS = (
    FieldSpec("pixel_values", "uint8", (2, 3), "flat", keep_on_cpu=False, offset=0),
    FieldSpec("image_grid_thw", "int64", (3,), "batched", keep_on_cpu=True, offset=64),
    FieldSpec("h", "bfloat16", (2,), "shared", keep_on_cpu=False, offset=128),
)
ARRAYS = {
    "pixel_values": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "image_grid_thw": np.array([1, 1, 2]),
    "h": np.array([0x3FC0, 0xC000], np.uint16),
}
CHAT = user(photo("cat.png"), text("and"), photo("rocket.jpg"))
CAT = (DATA / "cat.png").read_bytes()


@pytest.fixture(scope="module")
def service():
    with serving("--cache-size", "64MiB") as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    with Client(service.endpoint) as connected:
        yield connected


def chat(client, **fields):
    part = {"type": "image_url", "image_url": {"url": CAT}}
    return client.chat(user(part, text("?")), **fields)


# --- the form ---------------------------------------------------------------------------------------------------------


def test_an_item_as_text_says_what_vllms_own_serializer_says():
    ours = to_text(FIELDS, {name: array.tobytes() for name, array in ARRAYS.items()}, 2)
    assert msgpack.unpackb(base64.b64decode(ours)) == msgpack.unpackb(base64.b64decode(RECORDED))


def test_an_item_that_vllm_wrote_is_read():
    found = from_text(RECORDED)
    assert found.keys() == ARRAYS.keys()
    assert all(
        np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in ARRAYS.items()
    )


@pytest.mark.parametrize(
    "element",
    [
        "",
        "%",
        "é",
        base64.b64encode(b"\x81").decode(),
        RECORDED[:-8],
        base64.b64encode(msgpack.packb({"a": 1})).decode(),
        base64.b64encode(
            msgpack.packb({"a": {"data": ["uint8", [7], msgpack.ExtType(3, b"1")], "field": ["batched", {}]}})
        ).decode(),
        base64.b64encode(
            msgpack.packb({"a": {"data": ["object", [1], msgpack.ExtType(3, b"1")], "field": ["batched", {}]}})
        ).decode(),
        base64.b64encode(
            msgpack.packb({"a": {"data": ["uint8", [1], msgpack.ExtType(4, b"1")], "field": ["batched", {}]}})
        ).decode(),
    ],
)
def test_what_is_no_item_is_refused(element):
    with pytest.raises(InvalidRequest, match="kwargs_data"):
        from_text(element)


def test_a_result_becomes_the_request_that_http_answers(service, client):
    over_http = service.render(CHAT, temperature=0.5)
    for arrays in ({}, {"payload": "tensors"}):
        result = client.chat(CHAT, temperature=0.5, **arrays)
        made = to_generate_request(result)
        assert {**made, "request_id": 0, "features": 0} == {**over_http, "request_id": 0, "features": 0}
        for name in ("mm_hashes", "mm_placeholders", "mm_addresses"):
            assert made["features"][name] == over_http["features"][name]
        for name in ("kwargs_data", "mm_metadata"):
            for ours, theirs in zip(made["features"][name]["image"], over_http["features"][name]["image"], strict=True):
                assert msgpack.unpackb(base64.b64decode(ours)) == msgpack.unpackb(base64.b64decode(theirs))
        result.release()


def test_a_chat_without_pictures_has_no_features(client):
    result = client.chat(user(text("hello")))
    for payload in ("tensors", "shm"):
        made = to_generate_request(result, payload=payload)
        assert (made["features"], made["token_ids"]) == (None, result.token_ids)
        assert to_generate_request(made, payload=payload) == made


def test_addresses_go_without_the_lease_and_are_leased_by_who_opens_them(service, client):
    result = chat(client)
    features = to_generate_request(result, payload="shm")["features"]
    (address,) = features["mm_addresses"]["image"]
    assert not address.keys() & {"lease", "lease_kind", "lease_seconds"}
    assert features["kwargs_data"] is features["mm_metadata"] is None
    with Backend(service.endpoint) as backend:
        item = backend.open(address)
        assert item.address.lease not in {None, result.items["image"][0].address.lease}
        assert np.array_equal(
            item.materialize()["pixel_values"], result.items["image"][0].materialize()["pixel_values"]
        )
    result.release()


def test_an_item_in_no_shared_memory_goes_as_tensors_where_addresses_are_wanted(client):
    result = chat(client, payload="tensors")
    features = to_generate_request(result, payload="shm")["features"]
    assert features["mm_addresses"] == {"image": [None]}
    pixels = decode_item(features["kwargs_data"]["image"][0])["pixel_values"].array
    assert np.array_equal(pixels, result.items["image"][0].materialize()["pixel_values"])


def test_a_queued_job_becomes_a_request(service, client):
    with Backend(service.endpoint, queue="vllm") as backend:
        client.post(CHAT, queue="vllm", temperature=0.25)
        job = backend.pull()
        made = to_generate_request(job)
        assert made["request_id"] == job.id
        assert made["sampling_params"]["temperature"] == 0.25
        assert [decode_item(one).keys() for one in made["features"]["kwargs_data"]["image"]] == [
            {"pixel_values", "image_grid_thw"}
        ] * 2
        job.ack()


def test_answers_over_http_are_taken_in_both_encodings(service):
    plain = service.render(CHAT)
    packed = service.chat(CHAT, mm_payload="tensors")
    assert packed.status == 200
    as_bytes = service.post("/v1/chat/completions/render", {"messages": CHAT}, Accept="application/msgpack")
    answers = (plain, msgpack.unpackb(as_bytes.body))
    made = [to_generate_request(answer)["features"] for answer in answers]
    assert made[0] == made[1] == plain["features"]


def test_an_answer_without_what_the_engine_needs_is_refused(service):
    none = service.render(CHAT, mm_payload="none")
    with Backend(service.endpoint, id="engine"):
        shm = service.render(CHAT, mm_payload="shm", backend_id="engine")
        assert to_generate_request(shm, payload="shm")["features"] == {**shm["features"], "mm_metadata": None}
        for answer, payload, missing in (
            (none, "tensors", "no tensors"),
            (none, "shm", "neither an address nor tensors"),
            (shm, "tensors", "no tensors"),
        ):
            with pytest.raises(InvalidRequest, match=f"image 0 of the answer has {missing}"):
                to_generate_request(answer, payload=payload)


def test_a_second_process_of_an_engine_registers_under_a_name_of_its_own(service):
    with Backend(service.endpoint, id="engine"):
        resolver = Resolver(service.endpoint, "engine")
        assert resolver.resolve({}) == {}
        assert len(service.status()["backends"]) >= 2
        resolver.close()


def test_where_no_service_is_the_caller_learns_that_and_no_more(tmp_path):
    resolver = Resolver(f"ipc://{tmp_path}", None)
    for _ in range(2):
        with pytest.raises(ServiceUnavailable) as missing:
            resolver.resolve({})
        assert str(tmp_path) not in missing.value.message
    resolver.close()


# --- vLLM itself ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(service):
    """Give vLLM's modules as its server has them, with the plug-in, and an engine that keeps what it is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own
        from vllm.entrypoints.scale_out.token_in_token_out import mm_serde, protocol
        from vllm.entrypoints.scale_out.token_in_token_out import serving as module

        resolver = Resolver(service.endpoint, "vllm-engine")
        install(resolver)
        install(resolver)
        from fastapi import FastAPI
        from fastapi.testclient import TestClient
        from vllm.entrypoints.scale_out.token_in_token_out.api_router import router
        from vllm.v1 import serial_utils

    class Tokens(module.ServingTokens):
        """vLLM's own, up to the engine."""

        def __init__(self):
            self.given = []
            self.models = SimpleNamespace(model_name=lambda _: "m")
            scheduler = SimpleNamespace(max_num_seqs=8)
            self.engine_client = SimpleNamespace(
                vllm_config=SimpleNamespace(scheduler_config=scheduler), generate=self.generate
            )
            self.online_renderer = SimpleNamespace(
                renderer=SimpleNamespace(mm_processor_cache=None), preprocess_completion=self.preprocess
            )
            self.model_config = SimpleNamespace(is_encoder_decoder=False)
            self.has_tokenizer, self.force_no_detokenize, self.request_logger = True, False, None

        async def _check_model(self, _):
            return None

        def _preflight(self):
            return None

        def _maybe_get_adapters(self, *_, **__):
            return None

        async def _get_trace_headers(self, _):
            return None

        async def preprocess(self, request, **_):
            return ({"type": "token", "prompt_token_ids": request.token_ids},)

        def generate(self, given, *_, **__):
            self.given.append(given)
            return iter(())

        async def serve_tokens_full_generator(self, request, *_, **__):
            return protocol.GenerateTokensResponse(request_id=request.request_id, choices=[])

    app = FastAPI()
    app.include_router(router)
    app.state.serving_tokens = tokens = Tokens()
    app.state.enable_server_load_tracking = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield SimpleNamespace(
            http=TestClient(app),
            tokens=tokens,
            protocol=protocol,
            serde=mm_serde,
            serial=serial_utils,
            resolver=resolver,
        )
    resolver.close()


def leases(service):
    return {backend["id"]: backend["leases"] for backend in service.status()["backends"]}


def generate(engine, body):
    """Post a request and return the answer and what the engine was given, if anything."""
    engine.tokens.given.clear()
    answer = engine.http.post("/inference/v1/generate", json=body)
    return answer, engine.tokens.given.pop() if engine.tokens.given else None


@vllm
@needs_vllm
def test_vllm_takes_the_request_and_finds_the_same_items_in_it(client, engine):
    result = chat(client)
    request = engine.protocol.GenerateRequest.model_validate(to_generate_request(result))
    (decoded,) = map(engine.serde.decode_mm_kwargs_item, request.features.kwargs_data["image"])
    item = to_mm_kwargs_item(result.items["image"][0])
    assert decoded == item  # data and types of fields
    assert {name: element.field for name, element in decoded.items()} == {
        name: element.field for name, element in item.items()
    }
    assert request.sampling_params.max_tokens == result.max_tokens


@vllm
@needs_vllm
def test_an_item_of_vllm_is_the_shared_memory_until_its_last_tensor_is_gone(service, client, engine):
    result = chat(client)
    (ours,) = result.items["image"]
    with ours.view() as arrays:
        start = arrays["pixel_values"].ctypes.data
    item = to_mm_kwargs_item(ours)
    assert item["pixel_values"].data.data_ptr() == start
    frames = engine.serial.MsgpackEncoder().encode(item)  # as it goes to the engine's process
    assert any(np.frombuffer(frame, np.uint8).ctypes.data == start for frame in frames[1:])
    assert engine.serial.MsgpackDecoder(type(item)).decode(frames) == item
    del frames
    private = to_mm_kwargs_item(ours, copy=True)
    assert private["pixel_values"].data.data_ptr() != start
    assert private == item
    part = item["pixel_values"].data[3:]
    del item, ours, result
    gc.collect()
    assert sum(leases(service).values()) == 1
    assert part.data_ptr() > start
    del part
    gc.collect()
    service.quiet()


@vllm
@needs_vllm
@pytest.mark.usefixtures("engine")
def test_items_are_injected_into_vllms_cache_and_counted(client):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache
        from vllm.v1.engine.input_processor import InputProcessor
    config = SimpleNamespace(get_multimodal_config=lambda: SimpleNamespace(mm_processor_cache_gb=1))
    cache = MultiModalProcessorOnlyCache(config)
    counted = []
    renderer = SimpleNamespace(mm_processor_cache=cache, update_mm_cache_stats=lambda: counted.append(1))
    processor = object.__new__(InputProcessor)
    processor.renderer = renderer
    result = chat(client)
    hashes, kwargs = inject_into_mm_cache(processor, result.items)
    assert cache.is_cached_item(result.items["image"][0].hash)
    assert hashes == to_generate_request(result)["features"]["mm_hashes"]
    assert kwargs["image"][0] == to_mm_kwargs_item(result.items["image"][0])
    assert counted


@vllm
@needs_vllm
def test_vllms_server_resolves_addresses_as_they_are_answered(service, engine):
    engine.resolver.resolve({})  # registers
    fields = {"mm_payload": "shm", "backend_id": "vllm-engine", "lease_kind": "view"}
    body = service.render(CHAT, **fields)
    answer, given = generate(engine, body)
    assert answer.status_code == 200, answer.text
    assert given["prompt_token_ids"] == body["token_ids"]
    assert given["mm_hashes"] == body["features"]["mm_hashes"]
    reference = service.render(CHAT)["features"]["kwargs_data"]["image"]
    for item, element in zip(given["mm_kwargs"]["image"], reference, strict=True):
        assert item == engine.serde.decode_mm_kwargs_item(element)
    assert [(p.offset, p.length, p.is_embed) for p in given["mm_placeholders"]["image"]] == [
        (place["offset"], place["length"], None) for place in body["features"]["mm_placeholders"]["image"]
    ]
    assert leases(service)["vllm-engine"] == 2
    del given, item
    gc.collect()
    service.quiet()


@vllm
@needs_vllm
def test_vllms_server_leases_what_was_leased_to_another_and_keeps_masks(service, client, engine):
    result = chat(client)
    body = to_generate_request(result, payload="shm")
    (place,) = body["features"]["mm_placeholders"]["image"]
    place["is_embed"] = mask = [number % 3 > 0 for number in range(place["length"])]
    answer, given = generate(engine, body)
    assert answer.status_code == 200, answer.text
    assert given["mm_placeholders"]["image"][0].is_embed.tolist() == mask
    assert given["mm_kwargs"]["image"][0] == to_mm_kwargs_item(result.items["image"][0])
    del given, result
    gc.collect()
    service.quiet()


@vllm
@needs_vllm
def test_vllms_server_serves_requests_without_addresses_as_ever(service, client, engine):
    answer, given = generate(engine, to_generate_request(client.chat(user(text("hello")))))
    assert (answer.status_code, given["type"]) == (200, "token")
    body = service.render(CHAT)
    answer, given = generate(engine, body)
    assert answer.status_code == 200
    for item, element in zip(given["mm_kwargs"]["image"], body["features"]["kwargs_data"]["image"], strict=True):
        assert item == engine.serde.decode_mm_kwargs_item(element)


@vllm
@needs_vllm
@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"generation": 1}, 404),
        ({"epoch": "0" * 32}, 404),
        ({"segment": "/somebody-elses"}, 404),
        ({"metadata_length": 1}, 400),
        ({"offset": 2**47}, 400),
        ({"fields": 1}, 422),  # by vLLM's form, as FastAPI answers where vLLM has not told it otherwise
        ({"more": 1}, 422),
    ],
)
def test_vllms_server_refuses_addresses_of_other_lives_and_what_is_none(client, engine, change, status):
    result = chat(client)
    body = to_generate_request(result, payload="shm")
    body["features"]["mm_addresses"]["image"][0] |= change
    answer, given = generate(engine, body)
    assert (answer.status_code, given) == (status, None), answer.text
    assert "/somebody-elses" not in answer.json().get("error", {}).get("message", "")
    result.release()


@vllm
@needs_vllm
@pytest.mark.parametrize(
    "features",
    [
        {"mm_addresses": 1},
        {"mm_addresses": {"image": []}},
        {"mm_addresses": {"video": [None]}},
        {"mm_addresses": {"image": [1]}},
        {"mm_placeholders": {"image": [{"offset": 0, "length": 2, "is_embed": [True]}]}},
        {"mm_placeholders": {"image": [{"offset": 0, "length": 1, "is_embed": [1]}]}},
    ],
)
def test_vllms_server_refuses_features_that_are_none(engine, features):
    whole = {"mm_hashes": {"image": ["a"]}, "mm_placeholders": {"image": [{"offset": 0, "length": 1}]}, **features}
    answer, given = generate(engine, {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 1}, "features": whole})
    assert answer.status_code == 422
    assert given is None


LOADED = """
import warnings
warnings.simplefilter("ignore")
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
print(ServingTokens.serve_tokens.__module__.partition(".")[0])
"""


@vllm
@needs_vllm
@pytest.mark.parametrize(("told", "served_by"), [(True, "mmprep"), (False, "vllm")])
def test_vllm_loads_the_plugin_and_it_does_nothing_unless_it_is_told_of_a_service(service, told, served_by):
    env = environment({"MMPREP_ENDPOINT": service.endpoint} if told else {})
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=False, env=env)
    assert done.stdout.split()[-1:] == [served_by], done.stderr
