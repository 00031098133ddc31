"""What a Dynamo frontend sends on: ids for the router, hashes, ranges, tensors that travel; and what it refuses."""

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep import InvalidRequest
from mmprep.bridges.dynamo import open_items, routing_token_ids, to_extra_args
from mmprep.bridges.dynamo.requests import chat_fields, preprocessed
from mmprep.item import Inline, Item
from mmprep.items import ItemMeta, Plan, Run, lay_out
from mmprep.rendered import Result
from mmprep.result import Head, ids_to_bytes

PIXELS = np.arange(12, dtype=np.uint8).reshape(3, 4)


def item(digest, offset, runs, modality="image"):
    fields = lay_out([("pixel_values", "uint8", PIXELS.shape, "flat", False)])
    meta = ItemMeta(modality, Plan(tuple(Run(9, count, embed) for count, embed in runs)), fields, {})
    length = sum(count for count, _ in runs)
    source = Inline(PIXELS.reshape(-1).data)
    return Item(meta, source, hash=digest, offset=offset, length=length, cached=False, address=None, run=None)


def result(items=None, sampling=None, length=10, **rest):
    request = {
        "request_id": "r",
        "cache_salt": None,
        "priority": 0,
        "sampling_params": {"max_tokens": 5, **(sampling or {})},
        **rest,
    }
    ids = ids_to_bytes(list(range(length)))
    return Result(Head(json.dumps(request).encode(), ids, ids, (), 0, "", bytes(16)), items or {})


def prepared(request=None, **told):
    return preprocessed(result(**told), {"model": "m", **(request or {})}, [2])


HASHES = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(HASHES, st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=4), st.integers(0, 5))
def test_every_embedded_position_holds_the_pad_value_of_its_hash(digest, runs, offset):
    mask = [embed for count, embed in runs for _ in range(count)]
    ids = list(range(offset + len(mask) + 3))
    pad = 1_000_000 + int(digest[8:16], 16) % 2**30  # the low bits of the first 64
    wanted = [
        pad if 0 <= number - offset < len(mask) and mask[number - offset] else token for number, token in enumerate(ids)
    ]
    assert routing_token_ids(ids, {"image": [item(digest, offset, runs)]}) == wanted
    assert ids == list(range(len(ids)))


def test_masks_go_with_their_ranges_and_plain_lists_are_for_images_alone():
    masked = item("a" * 64, 1, [(1, False), (2, True)])
    args = to_extra_args(result({"image": [masked], "video": [item("b" * 64, 5, [(2, True)], "video")]}))
    assert args["mm_placeholders_by_modality"] == {
        "image": [{"offset": 1, "length": 3, "is_embed": [False, True, True]}],
        "video": [{"offset": 5, "length": 2}],
    }
    assert args["mm_hashes_by_modality"] == {"image": ["a" * 64], "video": ["b" * 64]}
    assert not args.keys() & {"mm_hashes", "mm_placeholders"}
    assert to_extra_args(result({"image": [masked]}))["mm_placeholders"] == args["mm_placeholders_by_modality"]["image"]
    assert to_extra_args(result()) == {}


def test_tensors_in_no_shared_memory_travel_to_the_worker():
    travels = item("a" * 64, 1, [(2, True)])
    sent = json.loads(json.dumps(prepared(items={"image": [travels]})))
    assert sent["extra_args"]["mm_addresses"] == {"image": [None]}

    async def read():
        async with open_items(sent, None) as items:
            return items

    (found,) = asyncio.run(read())["image"]
    assert np.array_equal(found["pixel_values"], PIXELS)


@pytest.mark.parametrize(
    "args",
    [
        [1],
        {"mm_addresses": [1]},
        {"mm_addresses": {"image": 1}},
        {"mm_addresses": {"image": [None]}},
        {"mm_addresses": {"image": [None]}, "kwargs_data": {"image": ["x", "y"]}},
        {"mm_addresses": {"image": [None]}, "kwargs_data": {"image": [5]}},
        {"mm_addresses": {"image": [{}]}},
    ],
)
def test_a_worker_refuses_extra_args_that_are_not_the_bridges(args):
    async def read():
        async with open_items({"extra_args": args}, None):
            pass

    with pytest.raises(InvalidRequest):
        asyncio.run(read())


def test_sampling_goes_where_dynamo_has_it():
    sampling = {
        "stop": "x",
        "stop_token_ids": [4],
        "temperature": 0.5,
        "skip_special_tokens": False,
        "thinking_token_budget": 9,
        "structured_outputs": {"json": {"type": "string"}},
    }
    made = prepared(sampling=sampling, cache_salt="s", priority=3)
    assert made["stop_conditions"] == {
        "max_tokens": 5,
        "stop": ["x"],
        "stop_token_ids": [4],
        "max_thinking_tokens": 9,
    }
    assert made["sampling_options"] == {"temperature": 0.5, "guided_decoding": {"json": {"type": "string"}}}
    assert made["output_options"] == {"skip_special_tokens": False}
    assert made["routing"] == {"cache_salt": "s", "priority": 3}
    assert made["eos_token_ids"] == [2]
    assert made.keys().isdisjoint({"extra_args", "mm_routing_info"})


@pytest.mark.parametrize(
    ("outputs", "guide"),
    [({"json_object": True}, {"json": {"type": "object"}}), ({"choice": ["a"]}, {"choice": ["a"]}), (None, None)],
)
def test_what_guides_decoding_is_kept(outputs, guide):
    assert prepared(sampling={"structured_outputs": outputs})["sampling_options"].get("guided_decoding") == guide


@pytest.mark.parametrize(
    "sampling", [{"logit_bias": {"5": 1}}, {"bad_words": ["x"]}, {"structured_outputs": {"structural_tag": "x"}}]
)
def test_sampling_that_dynamo_has_no_place_for_is_refused_by_name(sampling):
    with pytest.raises(InvalidRequest, match="is not supported"):
        prepared(sampling=sampling)


def test_a_request_is_passed_on_without_what_is_dynamos():
    asked = {
        "model": "m",
        "messages": [],
        "stream": True,
        "nvext": {},
        "tools": None,
        "temperature": 0,
        "cache_salt": "s",
    }
    assert chat_fields(asked) == {"messages": [], "temperature": 0, "cache_salt": "s"}


@pytest.mark.parametrize("name", ["mm_payload", "backend_id", "lease_kind", "queue", "deadline_ms"])
def test_a_request_cannot_decide_over_the_delivery_of_its_tensors(name):
    with pytest.raises(InvalidRequest) as refused:
        chat_fields({"messages": [], name: "x"})
    assert refused.value.param == name


@pytest.mark.parametrize(("name", "value"), [("logprobs", True), ("top_logprobs", 2), ("n", 2)])
def test_a_request_for_what_is_not_made_here_is_refused(name, value):
    with pytest.raises(InvalidRequest) as refused:
        chat_fields({"messages": [], name: value})
    assert refused.value.param == name
