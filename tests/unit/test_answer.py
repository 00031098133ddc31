import json

import msgpack
import numpy as np
import pytest

from mmprep.errors import InvalidRequest
from mmprep.items import ItemMeta, Plan, Run, lay_out, region_size
from mmprep_frontend.render.answer import (
    check_length,
    features,
    generate_request,
    kwargs_data,
    mm_metadata,
    new_request_id,
)
from mmprep_frontend.render.expansion import Range
from mmprep_frontend.render.requests import parse

FIELDS = {
    "request_id", "token_ids", "token_offsets", "features", "content_parts", "sampling_params", "model",
    "reasoning_ended", "reasoning_parser_kwargs", "return_token_ids", "output_mode", "parse_context", "stream",
    "stream_options", "cache_salt", "priority", "kv_transfer_params", "ec_transfer_params",
}  # fmt: skip


def answered(kind="chat", *, length=3, max_model_len=100, **fields):
    body = {"chat": {"messages": [{"role": "user", "content": "x"}]}, "completion": {"prompt": "x"}}[kind]
    request = parse(json.dumps({**body, **fields}).encode(), kind)
    return generate_request(
        request,
        request_id="chatcmpl-1",
        model="served",
        token_ids=[7] * length,
        max_model_len=max_model_len,
        prompt_text="the text",
    )


def sampled(kind="chat", **fields):
    return answered(kind, **fields)["sampling_params"]


def decode(pieces):
    """Read one packed item by the words of the interface page: {field: (array or raw, kind, arguments)}."""

    def extension(code, data):
        assert code == 3
        return data

    item = msgpack.unpackb(b"".join(pieces), ext_hook=extension, strict_map_key=True)
    decoded = {}
    for name, entry in item.items():
        assert set(entry) == {"data", "field"}
        dtype, shape, raw = entry["data"]
        kind, arguments = entry["field"]
        stored = "<u2" if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")
        decoded[name] = (dtype, np.frombuffer(raw, stored).reshape(shape), kind, arguments)
    return decoded


@pytest.fixture
def item():
    specs = lay_out(
        [
            ("pixel_values", "uint8", (8, 1176), "flat", False),
            ("image_grid_thw", "int64", (3,), "batched", True),
            ("halves", "bfloat16", (2, 2), "batched", False),
            ("image_token_id", "int32", (), "shared", True),
        ]
    )
    region = np.random.default_rng(0).integers(0, 256, region_size(specs), dtype=np.uint8)
    cpu = {spec.name: region[spec.offset : spec.offset + spec.nbytes].tobytes() for spec in specs if spec.keep_on_cpu}
    return ItemMeta("image", Plan((Run(5, 2),)), specs, cpu), memoryview(region)


def test_an_item_is_encoded_in_the_published_form(item):
    meta, region = item
    decoded = decode(kwargs_data(meta, region, batch_size=2))
    assert list(decoded) == ["pixel_values", "image_grid_thw", "halves", "image_token_id"]
    for spec in meta.fields:
        dtype, array, kind, _ = decoded[spec.name]
        assert (dtype, array.shape, kind) == (spec.dtype, spec.shape, spec.kind)
        assert array.tobytes() == bytes(region[spec.offset : spec.offset + spec.nbytes])
    assert decoded["pixel_values"][3] == {"slices": [[[0, 8, None]]], "dim": 0, "keep_on_cpu": False}
    assert decoded["image_grid_thw"][3] == {"keep_on_cpu": True}
    assert decoded["image_token_id"][3] == {"batch_size": 2, "keep_on_cpu": True}


def test_a_packed_item_holds_large_tensors_themselves_and_small_ones_as_copies(item):
    meta, region = item
    pieces = kwargs_data(meta, region)
    assert [type(piece) for piece in pieces] == [bytes, memoryview, bytes]
    assert pieces[1].obj is region.obj
    assert len(pieces[1]) == 8 * 1176


def test_metadata_holds_only_the_fields_on_the_cpu_and_needs_no_tensors(item):
    meta, region = item
    decoded = decode(mm_metadata(meta))
    whole = decode(kwargs_data(meta, region))
    assert list(decoded) == ["image_grid_thw", "image_token_id"]
    for name, entry in decoded.items():
        assert entry[1].tobytes() == whole[name][1].tobytes()
        assert entry[2:] == whole[name][2:]


def test_an_item_without_fields_on_the_cpu_has_no_metadata():
    meta = ItemMeta("image", Plan((Run(5, 1),)), lay_out([("x", "uint8", (1,), "batched", False)]), {})
    assert mm_metadata(meta) is None


def test_an_answer_has_exactly_the_fields_of_a_generate_request():
    answer = answered()
    assert set(answer) == FIELDS
    assert answer["model"] == "served"
    assert (answer["output_mode"], answer["stream"], answer["priority"]) == ("tokens", False, 0)
    present = {"request_id", "token_ids", "sampling_params", "model", "output_mode", "stream", "priority"}
    absent = FIELDS - present - {"parse_context"}
    assert all(answer[name] is None for name in absent)


def test_an_answer_carries_what_the_request_said():
    answer = answered(
        model="m",
        stream=True,
        stream_options={"include_usage": True},
        cache_salt="s",
        priority=-3,
        kv_transfer_params={"a": 1},
        ec_transfer_params={"b": 2},
        return_token_ids=True,
        return_prompt_text=True,
    )
    assert answer["prompt_text"] == "the text"
    assert (answer["model"], answer["stream"], answer["stream_options"]) == ("m", True, {"include_usage": True})
    assert (answer["cache_salt"], answer["priority"], answer["return_token_ids"]) == ("s", -3, True)
    assert (answer["kv_transfer_params"], answer["ec_transfer_params"]) == ({"a": 1}, {"b": 2})


def test_sampling_parameters_are_those_set_and_a_length():
    assert sampled() == {"max_tokens": 97}
    assert sampled(max_tokens=5) == {"max_tokens": 5}
    assert sampled(max_tokens=5, max_completion_tokens=6)["max_tokens"] == 6
    assert sampled("completion") == {"max_tokens": 16}
    assert sampled("completion", max_model_len=10) == {"max_tokens": 7}
    assert sampled(temperature=0, top_k=3, stop="x", n=2, seed=4) == {
        "max_tokens": 97,
        "temperature": 0,
        "top_k": 3,
        "stop": "x",
        "n": 2,
        "seed": 4,
    }


def test_log_probabilities_are_asked_for_as_each_api_does():
    assert sampled(logprobs=True, top_logprobs=3)["logprobs"] == 3
    assert sampled(logprobs=True)["logprobs"] == 0
    assert sampled("completion", logprobs=2)["logprobs"] == 2


def test_a_response_format_becomes_a_constraint():
    schema = {"type": "object"}
    assert sampled(response_format={"type": "text"}) == {"max_tokens": 97}
    assert sampled(response_format={"type": "json_object"})["structured_outputs"] == {"json_object": True}
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert sampled(response_format=named)["structured_outputs"] == {"json": schema}
    for wrong in ({"type": "xml"}, {"type": "json_schema"}, {}):
        with pytest.raises(InvalidRequest) as caught:
            sampled(response_format=wrong)
        assert caught.value.param == "response_format"
    with pytest.raises(InvalidRequest):
        sampled(response_format=named, structured_outputs={"json": schema})


def test_a_prompt_without_room_for_an_answer_is_refused_with_both_numbers():
    check_length(99, 100)
    for length in (100, 123):
        with pytest.raises(InvalidRequest, match=f"{length} tokens.*at most 100"):
            answered(length=length)


def test_features_list_the_media_by_modality_in_order():
    ranges = [Range("image", 1, 4, None), Range("video", 6, 2, [True, False]), Range("image", 9, 1, None)]
    hashes = {"image": ["aa", "bb"], "video": ["cc"]}
    answer = features(ranges, hashes, kwargs_data={"image": ["x", None], "video": ["y"]})
    assert answer == {
        "mm_hashes": hashes,
        "mm_placeholders": {
            "image": [{"offset": 1, "length": 4}, {"offset": 9, "length": 1}],
            "video": [{"offset": 6, "length": 2, "is_embed": [True, False]}],
        },
        "kwargs_data": {"image": ["x", None], "video": ["y"]},
        "mm_metadata": None,
        "mm_addresses": None,
    }
    assert features([], {}) is None


def test_request_ids_have_their_prefix_and_are_new():
    assert new_request_id("chatcmpl-").startswith("chatcmpl-")
    assert new_request_id("cmpl-") != new_request_id("cmpl-")
