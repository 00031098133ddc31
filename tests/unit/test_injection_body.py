"""Bodies of injections: what they hold is read without a copy, and whatever else comes is refused within bounds."""

import contextlib
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmprep.card import FieldForm, ModelCard, Placeholder
from mmprep.errors import InvalidRequest, TooLarge
from mmprep.injected import request_body, unpack_item
from mmprep.items import Plan, Run
from mmprep_frontend.injection.body import read_injection
from mmprep_frontend.injection.item import pack

MOST = 1000
TOKEN = 7
CARD = ModelCard(
    family="made up",
    fingerprint=b"",
    placeholders=(Placeholder("image", "<image>", TOKEN, "<image>"),),
    dtypes={"image": ("uint8", "bfloat16")},
    normalization={},
    fields={
        "image": (
            FieldForm("pixels", ("uint8", "bfloat16"), (None, 4), "flat", False),
            FieldForm("scale", ("float64",), (), "batched", True),
        )
    },
)
PIXELS = np.arange(12, dtype=np.uint8).reshape(3, 4)


def client_body(**changed):
    given = {
        "fields": {"scale": np.float64(0.5), "pixels": PIXELS},
        "token_ids": [1, TOKEN, TOKEN, 2],
        "is_embed": [False, True, True, False],
        "modality": "image",
        "dtypes": {},
        "kinds": {},
        "more": {},
    }
    return request_body("cat", **{**given, **changed})


def packed(body=None):
    return pack(read_injection(client_body() if body is None else body, MOST), CARD, 1 << 20)


def test_what_a_client_packs_becomes_the_item_that_a_lane_reads():
    item = packed(client_body(kinds={"pixels": "flat"}, more={"cache_salt": "s", "priority": -1}))
    meta, region = unpack_item(memoryview(item.frame))
    assert (meta.modality, item.length) == ("image", 4)
    assert meta.plan == Plan((Run(1, 1, embed=False), Run(TOKEN, 2), Run(2, 1, embed=False)))
    assert [(s.name, s.dtype, s.shape, s.kind, s.keep_on_cpu) for s in meta.fields] == [
        ("pixels", "uint8", (3, 4), "flat", False),
        ("scale", "float64", (), "batched", True),
    ]
    assert bytes(region[:12]) == PIXELS.tobytes()
    assert meta.cpu == {"scale": np.float64(0.5).tobytes()}


def test_equal_items_have_equal_bytes_in_whatever_order_their_fields_came():
    fields = {"pixels": np.asfortranarray(PIXELS), "scale": np.array(0.5, ">f8")}
    assert packed().frame == packed(client_body(fields=fields)).frame
    assert packed().frame != packed(client_body(is_embed=[False, True, True, False], token_ids=[1, 7, 7, 3])).frame


def test_tensors_are_views_of_the_body():
    body = client_body(fields={"pixels": np.zeros((1 << 20, 4), np.uint8), "scale": np.float64(1)})
    tracemalloc.start()
    read = read_injection(body, MOST)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(read.fields["pixels"].raw) == 4 << 20
    assert most < 1 << 20


@pytest.mark.parametrize(
    "hostile",
    [
        b"\x91" * 1_000_000,
        b"\xdf\x00\x10\x00\x00" + b"\xa0\xc0" * (1 << 20),
        b"\x81\xa6fields\xdf\x00\x10\x00\x00" + b"\xa0\xc0" * (1 << 20),
        msgpack.packb({"key": "k", "modality": "image", "fields": {}, "expansion": {"token_ids": [0] * (1 << 20)}}),
        msgpack.packb({"key": "k", "modality": "image", "fields": {}, "expansion": {"token_ids": [[0] * 900] * 900}}),
        msgpack.packb(
            {"key": "k", "modality": "image", "fields": {"a": {"data": ["u", [0] * (1 << 20), 0]}}, "expansion": {}}
        ),
        msgpack.packb(
            {
                "key": "k",
                "modality": "image",
                "fields": {
                    "a": {"data": ["u", [1], msgpack.ExtType(3, b"1")], "field": ["flat", {"slices": [0] * (1 << 20)}]}
                },
                "expansion": {},
            }
        ),
    ],
)
def test_a_body_costs_no_more_memory_than_its_headers_allow(hostile):
    tracemalloc.start()
    with pytest.raises(InvalidRequest):
        read_injection(hostile, MOST)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


@given(st.binary(max_size=200))
def test_any_bytes_are_a_body_or_refused(data):
    with pytest.raises(InvalidRequest):
        read_injection(data, MOST)


@given(st.data())
def test_a_body_that_breaks_off_or_goes_on_is_refused(data):
    body = client_body()
    end = data.draw(st.integers(0, len(body) - 1))
    for broken in (body[:end], body + body[: end + 1]):
        with pytest.raises(InvalidRequest):
            read_injection(broken, MOST)


@given(st.data())
def test_a_body_with_a_changed_byte_is_an_item_or_refused(data):
    body = bytearray(client_body())
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidRequest, TooLarge):
        injection = read_injection(bytes(body), MOST)
        assume(
            all(token_id >= 0 for token_id in injection.token_ids)
        )  # the vocabulary's: seen to before an item is packed
        unpack_item(memoryview(pack(injection, CARD, 1 << 20).frame))


def test_a_field_that_stays_on_the_cpu_and_an_expansion_that_changes_all_the_time_have_bounds():
    with pytest.raises(InvalidRequest, match="1001"):
        read_injection(client_body(token_ids=[TOKEN] * 1001, is_embed=None), MOST)
    long = read_injection(client_body(token_ids=[1, 2] * 20_000, is_embed=[False] * 40_000), 100_000)
    with pytest.raises(TooLarge) as caught:
        pack(long, CARD, 1 << 20)
    assert caught.value.param == "expansion"
    with pytest.raises(TooLarge) as caught:
        pack(read_injection(client_body(), MOST), CARD, 11)
    assert caught.value.param == "fields"


@pytest.mark.parametrize(
    "wrong",
    [
        {"fields": {"pixels": np.array(["text"])}},
        {"fields": {"pixels": np.zeros(3, np.complex64)}},
        {"fields": {"pixels": PIXELS}, "dtypes": {"pixels": "bfloat16"}},
        {"fields": {"pixels": PIXELS}, "dtypes": {"others": "bfloat16"}},
        {"fields": {"pixels": PIXELS}, "kinds": {"others": "flat"}},
    ],
)
def test_a_client_refuses_arrays_that_no_item_has(wrong):
    with pytest.raises(InvalidRequest) as caught:
        client_body(**wrong)
    assert caught.value.param.startswith("fields")


@pytest.mark.parametrize("body", [b"", b"\xc1", b"{}", msgpack.packb([1])])
def test_a_body_that_is_no_map_is_told_what_it_is_to_be(body):
    with pytest.raises(InvalidRequest, match="the body is to be a map of MessagePack"):
        read_injection(body, MOST)
