"""Answers as they are written, against the standard library's base64 and plain joins."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep_frontend.render import written as module
from mmprep_frontend.render.written import Base64, Packed, written

#: Bytes at a time in these tests, so that small tensors are cut, too.
AT_ONCE = 30


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    before, module.AT_ONCE = module.AT_ONCE, AT_ONCE
    yield
    module.AT_ONCE = before


binary = st.binary(max_size=100)
fields = st.lists(binary | binary.map(memoryview), max_size=5)
encodings = st.sampled_from(["bytes", "raw", "base64"])


@given(st.lists(st.tuples(encodings, fields), max_size=5))
def test_an_answer_is_written_as_its_parts_stand_one_behind_the_other(parts):
    encoded, expected = [], []
    for encoding, pieces in parts:
        whole = b"".join(pieces)
        packed = Packed(pieces)
        encoded.append({"bytes": whole, "raw": packed, "base64": Base64(packed)}[encoding])
        expected.append(b'"' + base64.b64encode(whole) + b'"' if encoding == "base64" else whole)
        assert len(encoded[-1]) == len(expected[-1])
    pieces = list(written(encoded))
    assert b"".join(pieces) == b"".join(expected)
    assert all(map(len, pieces)) or not any(expected)
    assert max(map(len, pieces), default=0) <= 4 * AT_ONCE


@pytest.mark.parametrize("encoding", [Packed, lambda pieces, borrowed: Base64(Packed(pieces, borrowed=borrowed))])
def test_what_is_borrowed_is_read_as_it_is_written_and_no_more_once_it_was_detached(encoding):
    ring = bytearray(b"a" * 300)
    part = encoding([b"head", memoryview(ring), b"tail"], borrowed=True)
    first = b"".join(written([part]))
    ring[:] = b"b" * 300
    second = b"".join(written([part]))
    pieces = written([part])
    begun = [next(pieces)]
    part.detach()
    part.detach()
    ring[:] = b"c" * 300
    assert b"".join([*begun, *pieces]) == second != first


def test_what_is_not_borrowed_is_not_copied():
    own = bytearray(b"a" * 100)
    part = Packed([memoryview(own)])
    part.detach()
    own[:] = b"b" * 100
    assert b"".join(written([part])) == b"b" * 100
