"""Items: how fields are laid out, plans, and metadata that comes back as it was packed or not at all."""

from __future__ import annotations

import tracemalloc

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep.items import (
    ALIGNMENT,
    DTYPE_SIZES,
    FieldSpec,
    ItemMeta,
    Normalization,
    Plan,
    Run,
    align,
    field_array,
    lay_out,
    region_size,
    storage_dtype,
    unpack_meta,
)

SHAPES = st.lists(st.integers(0, 9), max_size=4)
FIELDS = st.lists(
    st.tuples(
        st.text("abc_", min_size=1, max_size=8),
        st.sampled_from(list(DTYPE_SIZES)),
        SHAPES,
        st.sampled_from(["batched", "flat", "shared"]),
        st.booleans(),
    ),
    max_size=6,
)
RUNS = st.lists(st.builds(Run, st.integers(0, 200_000), st.integers(0, 20), st.booleans()), max_size=6)
CONSTANTS = st.builds(
    Normalization,
    field=st.text(max_size=8),
    scale=st.floats(allow_nan=False),
    mean=st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
    std=st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
    run=st.integers(0, 2**48),
)
METAS = st.builds(
    ItemMeta,
    modality=st.sampled_from(["image", "video", "audio"]),
    plan=st.builds(Plan, RUNS.map(tuple)),
    fields=FIELDS.map(lay_out),
    cpu=st.dictionaries(st.text(max_size=8), st.binary(max_size=30), max_size=3),
    normalization=st.none() | CONSTANTS,
)
META = ItemMeta(
    "image",
    Plan((Run(5, 3),)),
    lay_out([("pixel_values", "uint8", (4, 6), "flat", False), ("image_grid_thw", "int64", (3,), "batched", True)]),
    {"image_grid_thw": b"\1" * 24},
)


def plain_meta():
    return msgspec.to_builtins(META, builtin_types=(bytes,))


@given(st.integers(0, 2**48))
def test_align_rounds_up_to_the_next_cache_line(nbytes):
    assert nbytes <= align(nbytes) < nbytes + ALIGNMENT
    assert align(nbytes) % ALIGNMENT == 0


@given(FIELDS)
def test_fields_are_aligned_in_order_and_do_not_overlap(fields):
    specs = lay_out(fields)
    assert [(s.name, s.dtype, list(s.shape), s.kind, s.keep_on_cpu) for s in specs] == [
        (name, dtype, shape, kind, cpu) for name, dtype, shape, kind, cpu in fields
    ]
    end = 0
    for spec in specs:
        assert spec.offset % ALIGNMENT == 0
        assert end <= spec.offset < end + ALIGNMENT
        assert spec.nbytes == storage_dtype(spec.dtype).itemsize * int(np.prod(spec.shape, dtype=np.int64))
        end = spec.offset + spec.nbytes
    assert region_size(specs) == end


@given(FIELDS)
def test_each_field_has_its_own_bytes_of_the_region(fields):
    specs = lay_out(fields)
    region = memoryview(bytearray(region_size(specs)))
    for number, spec in enumerate(specs):
        array = field_array(region, spec)
        assert array.shape == spec.shape
        array[...] = number % 2
    for number, spec in enumerate(specs):
        assert (field_array(region, spec) == number % 2).all()


def test_a_field_that_is_longer_than_its_region_is_a_value_error():
    (spec,) = lay_out([("x", "float32", (4,), "flat", False)])
    with pytest.raises(ValueError):
        field_array(memoryview(bytes(15)), spec)


def test_every_dtype_has_a_little_endian_storage_of_its_size():
    for name, size in DTYPE_SIZES.items():
        assert storage_dtype(name).itemsize == size
        assert storage_dtype(name).newbyteorder("<") == storage_dtype(name)
    assert storage_dtype("bfloat16") == np.dtype("<u2")


def test_an_unknown_dtype_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"float128.*known: uint8"):
        storage_dtype("float128")


@given(RUNS)
def test_a_plan_says_its_ids_and_its_mask_run_by_run(runs):
    plan = Plan(tuple(runs))
    ids, mask = plan.token_ids(), plan.is_embed()
    assert plan.length == len(ids)
    assert ids == [run.token_id for run in runs for _ in range(run.count)]
    if mask is None:
        assert all(run.embed for run in runs)
    else:
        assert mask == [run.embed for run in runs for _ in range(run.count)]


@given(METAS)
def test_metadata_come_back_as_they_were_packed(meta):
    assert unpack_meta(meta.pack()) == meta


@given(st.binary(max_size=100))
def test_bytes_that_are_no_metadata_are_a_value_error(blob):
    with pytest.raises(ValueError):
        unpack_meta(blob)


@given(METAS, st.data())
def test_damaged_metadata_are_metadata_or_a_value_error(meta, data):
    blob = bytearray(meta.pack())
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = unpack_meta(bytes(blob[: data.draw(st.integers(0, len(blob)))]))
    except ValueError:
        return
    assert region_size(found.fields) >= 0


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, 7),
        (1, [[[1, -1, True]]]),
        (1, [[[2**49, 1, True]]]),
        (1, [[[1, 1]], []]),
        (2, [["x", "float128", [1], "flat", False, 0]]),
        (2, [["x", "uint8", [-1], "flat", False, 0]]),
        (2, [["x", "uint8", [2**49], "flat", False, 0]]),
        (2, [["x", "uint8", [1] * 9, "flat", False, 0]]),
        (2, [["x", "uint8", [1], "ragged", False, 0]]),
        (2, [["x", "uint8", [1], "flat", False, -64]]),
        (2, [["", "uint8", [1], "flat", False, 0]]),
        (3, {"x": "text"}),
        (4, ["x", "1", [], [], 0]),
    ],
    ids=repr,
)
def test_metadata_with_a_forged_value_are_a_value_error(index, value):
    plain = list(plain_meta())
    plain += [None] * (5 - len(plain))
    plain[index] = value
    with pytest.raises(ValueError, match="metadata"):
        unpack_meta(msgpack.packb(plain))


@pytest.mark.parametrize(
    "blob",
    [b"\x91" * 5000 + b"\x01", b"\x95" + b"\xd6\xff\x00\x00\x00\x01" * 5, b"\x81\x90\x01", b"\xdd\xff\xff\xff\xff"],
    ids=["deep", "timestamps", "a list as a key", "a length that is not there"],
)
def test_hostile_messagepack_is_a_value_error(blob):
    with pytest.raises(ValueError):
        unpack_meta(blob)


def test_a_field_of_unknown_dtype_has_no_size():
    spec = FieldSpec("x", "float128", (1,), "flat", False, 0)
    with pytest.raises(ValueError, match="float128"):
        _ = spec.nbytes


def test_metadata_that_claim_more_than_they_have_take_no_memory_for_it():
    blob = b"\xdd\x00\x00\xf0\x00" * 1000
    blob += bytes(0xF000 - len(blob))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="metadata"):
            unpack_meta(blob)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
