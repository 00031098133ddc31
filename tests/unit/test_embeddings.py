"""Embeddings: numpy's own files are read, everything else is refused, and any bytes give the documented error and no other.

What a frontend reads of a file and what a lane makes of the same bytes is compared with what numpy reads.
"""

import base64
import contextlib
import io
import pickle

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st

from mmprep.card import Embeds, ItemOptions, ModelCard, Placeholder
from mmprep.embeddings import read_npy
from mmprep.errors import InvalidRequest
from mmprep.items import field_array, region_size
from mmprep.keys import item_key
from mmprep_frontend.media.embeddings import embedded_item
from mmprep_frontend.media.intake import Medium
from mmprep_frontend.media.keys import variant
from mmprep_frontend.render.conversation import MediaPart
from mmprep_worker.models.embedded import open_embedded

HOW = Embeds("image_embeds", 8, "image_grid_thw", 2)
CARD = ModelCard("any", b"f", (Placeholder("image", "<i>", 7, "<i>"),), {}, {}, embeds={"image": HOW})
GRID = (1, 4, 6)
SCOPE = b"s" * 32


def npy(array, version=None):
    into = io.BytesIO()
    np.lib.format.write_array(into, np.asanyarray(array), version=version)
    return into.getvalue()


def rows(count=6, width=8, dtype="<f4"):
    return np.random.default_rng(1).standard_normal((count, width)).astype(dtype)


def item(data=None, grid=GRID, scope=SCOPE):
    data = npy(rows()) if data is None else data
    part = MediaPart("image", "data", "p", bare=True, grid=grid)
    medium = Medium(data, blake3(data).digest(), 0.0)
    return embedded_item(part, medium, card=CARD, scope=scope, hash_name="blake3")


def filled(data, grid=GRID, card=CARD):
    """Return the metadata of what a lane makes of a file, and the memory that it fills for it, all of which was ones."""
    prepared = open_embedded(card, "image", memoryview(data), grid)
    region = memoryview(bytearray(b"\xff" * region_size(prepared.meta.fields)))
    prepared.fill({spec.name: field_array(region, spec) for spec in prepared.meta.fields})
    return prepared.meta, region


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<i8", "<i4", "<u8", "<u4"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_what_numpy_writes_is_read_as_numpy_reads_it(dtype, shape, order, version):
    array = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape), dtype=dtype, order=order)
    data = npy(array, version)
    expected = np.load(io.BytesIO(data), allow_pickle=False)
    found = read_npy(data, "p")
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        pickle.dumps({"a": 1}),
        b"PK\x03\x04" + bytes(100),
        npy(np.array(["text"])),
        npy(np.zeros(3, ">f4")),
        npy(np.zeros(3, "<f8")),
        npy(np.zeros(3, "c8")),
        npy(np.zeros(3))[:-1],
        npy(np.zeros(3, "<f4")) + b"x",
        npy(np.zeros(3, "<f4"))[:40],
        npy(np.zeros(3, "<f4")).replace(b"(3,)", b"(9,)"),
        npy(np.zeros(3, "<f4")).replace(b"(3,), }", b"(10**9)"),
        npy(np.zeros(3, "<f4")).replace(b"(3,)", b"(-3)"),
        npy(np.zeros(3, "<f4")).replace(b"'<f4'", b"open()"),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 0xFFFF,
        b"\x93NUMPY\x01\x00" + (600).to_bytes(2, "little") + npy(np.zeros(3, "<f4"))[10:128].ljust(600) + bytes(12),
        b"\x93NUMPY\x03\x00" + npy(np.zeros(3, "<f4"))[8:],
    ],
)
def test_anything_else_is_refused_at_its_place(data):
    with pytest.raises(InvalidRequest) as refused:
        read_npy(data, "p")
    assert refused.value.param == "p"


def test_an_object_array_and_a_pickled_tensor_are_refused_without_being_unpickled():
    class Loud:
        def __reduce__(self):
            return (pytest.fail, ("it was unpickled",))

    into = io.BytesIO()
    np.save(into, np.array([Loud()], dtype=object), allow_pickle=True)
    for data in (into.getvalue(), pickle.dumps(Loud())):
        with pytest.raises(InvalidRequest):
            read_npy(data, "p")


@given(st.integers(0, 200), st.binary(min_size=1, max_size=4))
@example(8, b"\xff\xff")
def test_changed_bytes_are_an_array_or_the_documented_error(place, change):
    data = bytearray(npy(rows()))
    data[place : place + len(change)] = change
    with contextlib.suppress(InvalidRequest):
        item(bytes(data))


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
@pytest.mark.parametrize("grid", [GRID, [1, 4, 6], base64.b64encode(npy(np.array(GRID))).decode()])
def test_an_item_holds_the_embeddings_as_they_came(dtype, grid):
    embedded = item(npy(rows(dtype=dtype)), grid)
    meta, region = embedded.embeddings.meta, embedded.region()
    told, sides = meta.fields
    assert (told.name, told.kind, told.keep_on_cpu) == ("image_embeds", "flat", False)
    assert np.array_equal(field_array(region, told), rows(dtype=dtype))
    assert (sides.name, sides.dtype, sides.shape, sides.keep_on_cpu) == ("image_grid_thw", "int64", (3,), True)
    assert field_array(region, sides).tolist() == list(GRID)
    assert meta.cpu == {"image_grid_thw": np.array(GRID, "<i8").tobytes()}
    assert (meta.plan.token_ids(), meta.plan.is_embed()) == ([7] * 6, None)


@given(
    st.binary(min_size=6 * 8 * 4, max_size=6 * 8 * 4),
    st.sampled_from(["<f4", "<f2"]),
    st.sampled_from("CF"),
    st.sampled_from([(1, 0), (2, 0)]),
    st.booleans(),
)
def test_a_lane_makes_of_a_file_what_numpy_reads_and_the_frontend_has_told(bits, dtype, order, version, batched):
    """Whatever the numbers are, also none: every bit of them."""
    array = np.frombuffer(bits, dtype)[:48].reshape((1, 6, 8) if batched else (6, 8), order=order)
    data = npy(np.asarray(array, order=order), version)
    meta, region = filled(data)
    told, sides = meta.fields
    expected = np.load(io.BytesIO(data), allow_pickle=False).reshape(6, 8)
    assert field_array(region, told).tobytes() == expected.tobytes()
    assert field_array(region, sides).tolist() == list(GRID)
    embedded = item(data)
    assert meta == embedded.embeddings.meta
    assert region[told.offset : told.offset + told.nbytes] == embedded.region()[told.offset : told.offset + told.nbytes]


def test_the_file_is_what_is_offered_under_a_key_of_its_digest_grid_and_dtype():
    data = npy(rows())
    wanted = item(data).wanted
    assert (wanted.medium, wanted.digest, wanted.alias) == (data, blake3(data).digest(), None)
    assert msgspec.msgpack.decode(wanted.options, type=ItemOptions) == ItemOptions("float32", grid=GRID)
    options = b"embedded" + np.array(GRID, "<i8").tobytes()
    names = {"hash_name": "blake3", "modality": "image", "fingerprint": CARD.fingerprint, "options": options}
    assert wanted.key == item_key(variant(scope=SCOPE, dtype="float32", **names), blake3(data).digest())
    others = [
        item(npy(rows() * 2)),
        item(data, (1, 6, 4)),
        item(npy(rows(dtype="<f2"))),
        item(data, scope=b"o" * 32),
    ]
    assert len({wanted.key, *(other.wanted.key for other in others)}) == 5
    written = base64.b64encode(npy(np.array(GRID))).decode()
    assert item(data, written).wanted == item(data, list(GRID)).wanted == wanted


@pytest.mark.parametrize(
    ("data", "grid"),
    [
        (npy(rows())[:-1], GRID),
        (npy(rows()) + b"\0", GRID),
        (npy(rows()).replace(b"(6, 8)", b"(9, 8)"), GRID),
        (npy(rows()).replace(b"'<f4'", b"'<f2'"), GRID),
        (npy(rows()).replace(b"(6, 8)", b"(6,-8)"), GRID),
        (npy(rows()).replace(b"(6, 8), }", b"(1<<40,)}"), GRID),
        (npy(rows())[:12], GRID),
        (b"", GRID),
        (npy(rows()), (1, 4, 4)),
        (npy(rows()), (1 << 20, 1 << 20, 1 << 20)),
        (npy(np.zeros((0, 8), "<f4")), (1 << 20, 1 << 20, 1 << 20)),
        (npy(rows(width=9)), GRID),
        (npy(rows(dtype="<i4")), GRID),
    ],
)
def test_a_lane_asks_for_no_memory_for_a_file_whose_lengths_lie(data, grid):
    with pytest.raises(InvalidRequest) as refused:
        open_embedded(CARD, "image", memoryview(data), grid)
    assert refused.value.param is None, "the place in the request is the frontend's to name"


def test_a_lane_whose_model_takes_no_embeddings_refuses_them():
    for card, modality in ((CARD, "video"), (msgspec.structs.replace(CARD, embeds={}), "image")):
        with pytest.raises(InvalidRequest, match="embedded already"):
            open_embedded(card, modality, memoryview(npy(rows())), GRID)


def test_a_batch_of_one_is_one():
    assert item(npy(rows()[None])).embeddings.meta == item().embeddings.meta


@pytest.mark.parametrize(
    ("data", "grid", "param"),
    [
        (npy(rows(5)), GRID, "p"),
        (npy(rows(6, 7)), GRID, "p"),
        (npy(rows().reshape(-1)), GRID, "p"),
        (npy(rows(12).reshape(2, 6, 8)), GRID, "p"),
        (npy(rows(dtype="<i4")), GRID, "p"),
        (npy(rows()), (1, 4, 5), "p"),
        (npy(rows(0)), (1, 1, 1), "p"),
        (npy(rows()), (1, 4), "p.image_grid_thw"),
        (npy(rows()), (0, 4, 6), "p.image_grid_thw"),
        (npy(rows()), (1, -4, -6), "p.image_grid_thw"),
        (npy(rows()), (1, 4, 1 << 40), "p.image_grid_thw"),
        (npy(rows()), "?", "p.image_grid_thw"),
        (npy(rows()), base64.b64encode(npy(np.zeros(300, "<i8"))).decode(), "p.image_grid_thw"),
        (npy(rows()), base64.b64encode(b"x").decode(), "p.image_grid_thw"),
        (npy(rows()), base64.b64encode(npy(np.array([1.5, 4, 6], "<f4"))).decode(), "p.image_grid_thw"),
    ],
)
def test_what_contradicts_itself_or_the_model_is_refused_at_its_place(data, grid, param):
    with pytest.raises(InvalidRequest) as refused:
        item(data, grid)
    assert refused.value.param == param
