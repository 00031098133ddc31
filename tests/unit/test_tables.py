"""Tables equal transformers' own operations, and the narrow types are rounded to nearest, ties to even."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.image_transforms import normalize, rescale

from mmprep_worker.images.tables import bfloat16_bits, cast, lookup_tables

CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def rounded_to_bfloat16(value):
    """Round by comparing with the two neighbours, as the definition says."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    low, rest = bits >> 16, bits & 0xFFFF
    if rest > 0x8000 or (rest == 0x8000 and low % 2 == 1):
        low += 1
    return low


@pytest.mark.parametrize(
    ("mean", "std"), [CLIP, ([0.5] * 3, [0.5] * 3), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
)
@pytest.mark.parametrize("scale", [1 / 255, 0.00392156862745098, 1 / 127.5])
def test_float32_equals_transformers_to_the_bit(scale, mean, std):
    pixels = np.repeat(np.arange(256, dtype=np.uint8)[None, None], 3, axis=0)
    scaled = rescale(pixels, scale, input_data_format="channels_first")
    expected = normalize(scaled, mean, std, input_data_format="channels_first")[:, 0]
    got = lookup_tables(scale, mean, std, "float32")
    assert got.dtype == expected.dtype == np.float32
    assert got.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_narrow_types_are_float32_rounded_to_nearest_even():
    exact = lookup_tables(1 / 255, *CLIP, "float32")
    half = lookup_tables(1 / 255, *CLIP, "float16")
    assert half.dtype == np.float16
    assert half.tobytes() == b"".join(struct.pack("<e", float(value)) for value in exact.ravel())
    brain = lookup_tables(1 / 255, *CLIP, "bfloat16")
    assert brain.dtype == np.uint16
    assert brain.ravel().tolist() == [rounded_to_bfloat16(float(value)) for value in exact.ravel()]


def test_uint8_leaves_values_as_they_are():
    assert np.array_equal(lookup_tables(1 / 255, *CLIP, "uint8"), np.repeat(np.arange(256)[None], 3, axis=0))


@given(st.floats(width=32, allow_nan=False))
def test_bfloat16_rounds_any_number_to_nearest_even(value):
    assert bfloat16_bits(np.array([value], np.float32))[0] == rounded_to_bfloat16(value)


def test_bfloat16_keeps_not_a_number():
    quiet = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan((bfloat16_bits(quiet).astype(np.uint32) << 16).view(np.float32)).all()


def test_float16_beyond_its_range_becomes_infinite():
    assert cast(np.array([1e9, -1e9], np.float32), "float16").tolist() == [float("inf"), float("-inf")]
