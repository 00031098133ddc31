"""The two encodings of answers, read by decoders that are not ours."""

import base64
import json

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.encodings import JSON, MSGPACK
from mmprep_frontend.render.packing import array_head, bin_head, ext_head, map_head
from mmprep_frontend.render.written import Base64, Packed, written

SIZES = [0, 1, 2, 3, 4, 8, 15, 16, 17, 31, 255, 256, 65_535, 65_536, 70_000]
ENCODINGS = [JSON, MSGPACK]


def decoded(encoding, encoded):
    whole = b"".join(written(encoded))
    return json.loads(whole) if encoding is JSON else msgpack.unpackb(whole)


@pytest.mark.parametrize("size", SIZES)
def test_heads_are_those_that_a_packer_writes(size):
    packer = msgpack.Packer()
    assert map_head(size) == packer.pack_map_header(size)
    assert array_head(size) == packer.pack_array_header(size)
    data = bytes(size)
    assert bin_head(size) + data == msgpack.packb(data)
    assert ext_head(3, size) + data == msgpack.packb(msgpack.ExtType(3, data))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 16_383, 16_384, 16_385, 50_000, 70_000])
def test_a_long_list_is_encoded_as_in_one_piece(encoding, length):
    ids = list(range(length))
    assert decoded(encoding, [encoding.encode(encoding.long_list(ids))]) == ids
    strings = [f'"{n}ß' for n in ids]
    assert decoded(encoding, [encoding.encode(encoding.long_list(strings))]) == strings


items = st.none() | st.lists(st.binary(max_size=70) | st.binary(max_size=70).map(memoryview), max_size=4)
by_modality = st.dictionaries(st.sampled_from(["image", "video", "audio"]), st.lists(items, max_size=3), max_size=3)


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(tensors=st.none() | by_modality, metadata=st.none() | by_modality, ids=st.integers(0, 20_000))
def test_an_answer_has_its_items_as_bytes_or_as_base64_and_all_else_as_it_is(encoding, tensors, metadata, ids):
    def told(items):
        if items is None:
            return None
        joined = {name: [item if item is None else b"".join(item) for item in of] for name, of in items.items()}
        if encoding is MSGPACK:
            return joined
        return {n: [i if i is None else base64.b64encode(i).decode() for i in of] for n, of in joined.items()}

    packed = tensors and {n: [i if i is None else Packed(i) for i in of] for n, of in tensors.items()}
    features = {"mm_hashes": {"image": ["ff"]}, "kwargs_data": packed, "mm_metadata": metadata, "mm_addresses": None}
    answer = {"request_id": "a", "token_ids": list(range(ids)), "features": features, "sampling_params": {"t": 0.1}}
    expected = {**answer, "features": {**features, "kwargs_data": told(tensors), "mm_metadata": told(metadata)}}
    assert decoded(encoding, encoding.generate_request(answer)) == expected
    assert decoded(encoding, encoding.generate_request({**answer, "features": None})) == {**answer, "features": None}


@pytest.mark.parametrize(("encoding", "kind"), [(JSON, Base64), (MSGPACK, Packed)])
def test_tensors_are_not_encoded_before_they_are_written(encoding, kind):
    tensor = bytearray(100)
    features = {"kwargs_data": {"image": [Packed([b"before", memoryview(tensor)])]}, "mm_metadata": None}
    parts = encoding.generate_request({"token_ids": [1], "features": features})
    assert [type(part) for part in parts] == [bytes, kind, bytes]
    tensor[:] = b"x" * 100
    told = decoded(encoding, parts)["features"]["kwargs_data"]["image"][0]
    assert (base64.b64decode(told) if encoding is JSON else told) == b"before" + tensor


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 20])
def test_answers_are_joined_to_a_list(encoding, count):
    answers = [{"token_ids": [number], "features": None} for number in range(count)]
    assert decoded(encoding, [encoding.join([encoding.generate_request(answer) for answer in answers])]) == answers


def test_a_number_that_messagepack_does_not_have_is_refused_with_a_way_out():
    assert msgpack.unpackb(MSGPACK.encode([2**64 - 1, -(2**63)])) == [2**64 - 1, -(2**63)]
    for number in (2**64, -(2**63) - 1, 10**40):
        with pytest.raises(InvalidRequest, match="ask for JSON"):
            MSGPACK.encode({"xargs": number})
