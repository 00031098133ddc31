"""Reading embeddings: numpy's own files, everything else refused, and nothing but the documented error from any bytes."""

import base64
import contextlib
import io
import pickle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmprep.card import Embeds
from mmprep.errors import InvalidRequest
from mmprep.items import field_array
from mmprep_frontend.media.embeddings import embedded_item, read_npy

HOW = Embeds("image_embeds", 8, "image_grid_thw", 2)
GRID = (1, 4, 6)


def npy(array, version=None):
    into = io.BytesIO()
    np.lib.format.write_array(into, np.asanyarray(array), version=version)
    return into.getvalue()


def rows(count=6, width=8, dtype="<f4"):
    return np.random.default_rng(1).standard_normal((count, width)).astype(dtype)


def item(data=None, grid=GRID, how=HOW):
    data = npy(rows()) if data is None else data
    return embedded_item("image", data, grid, how, token_id=7, param="p")


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
    told, sides = embedded.meta.fields
    assert (told.name, told.kind, told.keep_on_cpu) == ("image_embeds", "flat", False)
    assert np.array_equal(field_array(embedded.region, told), rows(dtype=dtype))
    assert (sides.name, sides.dtype, sides.shape, sides.keep_on_cpu) == ("image_grid_thw", "int64", (3,), True)
    assert field_array(embedded.region, sides).tolist() == list(GRID)
    assert embedded.meta.cpu == {"image_grid_thw": np.array(GRID, "<i8").tobytes()}
    assert (embedded.meta.plan.token_ids(), embedded.meta.plan.is_embed()) == ([7] * 6, None)


def test_a_batch_of_one_is_one():
    assert item(npy(rows()[None])).meta.fields == item().meta.fields


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
        (npy(rows()), base64.b64encode(b"x").decode(), "p.image_grid_thw"),
        (npy(rows()), base64.b64encode(npy(np.array([1.5, 4, 6], "<f4"))).decode(), "p.image_grid_thw"),
    ],
)
def test_what_contradicts_itself_or_the_model_is_refused_at_its_place(data, grid, param):
    with pytest.raises(InvalidRequest) as refused:
        item(data, grid)
    assert refused.value.param == param
