"""The head of a rendered request comes back as it was packed, or is a ProtocolError."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.wire_strategies import instances

from mmprep.errors import ProtocolError
from mmprep.rendered import Result
from mmprep.result import Head, ids_from_bytes, ids_to_bytes, unpack_head

HEADS = instances(Head)


@given(HEADS)
def test_a_head_comes_back_as_it_was_packed(head):
    assert unpack_head(head.pack()) == head


@given(HEADS, st.data())
def test_a_damaged_head_is_a_head_or_a_protocol_error(head, data):
    frame = bytearray(head.pack())
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        unpack_head(bytes(frame[: data.draw(st.integers(0, len(frame)))]))


@given(st.binary(max_size=100))
def test_bytes_that_are_no_head_are_a_protocol_error(frame):
    with pytest.raises(ProtocolError):
        unpack_head(frame)


def test_a_head_with_ids_of_a_million_tokens_fits():
    ids = list(range(1_000_000))
    head = Head(b"{}", ids_to_bytes(ids), b"", (), 1, "s", bytes(16))
    assert ids_from_bytes(unpack_head(head.pack()).token_ids)[-1] == 999_999


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_token_ids_come_back_and_are_little_endian(ids):
    packed = ids_to_bytes(ids)
    assert ids_from_bytes(packed).tolist() == ids
    assert packed == b"".join(token.to_bytes(4, "little") for token in ids)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_an_id_that_is_no_uint32_is_an_error_and_not_another_id(token):
    with pytest.raises(OverflowError):
        ids_to_bytes([token])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_bytes_that_end_within_an_id_are_a_value_error(size):
    with pytest.raises(ValueError):
        ids_from_bytes(bytes(size))


@pytest.mark.parametrize("request_", [b"", b"[]", b"{}", b'{"request_id": "r", "sampling_params": 5}', b"\xff"])
def test_a_head_without_a_request_is_a_protocol_error(request_):
    with pytest.raises(ProtocolError):
        Result(Head(request_, b"", b"", (), 0, "", bytes(16)), {})
