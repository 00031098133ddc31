"""Resampling equals the installed Pillow to the bit, whichever implementation runs."""

import logging
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmprep_worker.images import resample
from mmprep_worker.images.resample import (
    NumbaResampler,
    PillowResampler,
    coefficients,
    make_resampler,
    resized,
    vertical_first,
)

BICUBIC = Image.Resampling.BICUBIC
RANDOM = np.random.default_rng(20)


def noise(width, height):
    """Extreme values beside random ones: clipping shows, and so does the order of the passes."""
    pixels = RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)
    extreme = RANDOM.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    return np.where(RANDOM.integers(0, 2, (height, width, 1)) == 0, pixels, extreme).astype(np.uint8)


def by_pillow(pixels, width, height):
    return np.asarray(Image.fromarray(pixels).resize((width, height), BICUBIC))


@pytest.fixture(scope="module")
def kernel():
    return NumbaResampler()


@pytest.mark.parametrize(
    "size",
    [
        (640, 480, 644, 476),
        (1920, 1080, 1316, 728),
        (1333, 777, 1344, 784),
        (4032, 3024, 1148, 868),
        (300, 200, 644, 100),
        (1, 1, 56, 56),
        (1, 200, 28, 784),
        (200, 1, 784, 28),
        (1, 5000, 3, 7),
        (5000, 1, 7, 3),
        (50, 3000, 40, 100),
        (3000, 50, 100, 40),
        (28, 28, 28, 28),
        (640, 480, 640, 300),
        (640, 480, 300, 480),
        (64, 64, 1, 1),
        (63, 65, 2048, 8),
        (700, 9, 1365, 9),
    ],
)
def test_the_kernel_equals_pillow(kernel, size):
    width, height, new_width, new_height = size
    pixels = noise(width, height)
    assert np.array_equal(resized(kernel, pixels, new_width, new_height), by_pillow(pixels, new_width, new_height))


def test_the_kernel_equals_pillow_on_thousands_of_random_sizes(kernel):
    for _ in range(4000):
        width, height, new_width, new_height = (int(n) for n in RANDOM.integers(1, RANDOM.choice([8, 40, 150]), 4))
        pixels = noise(width, height)
        expected = by_pillow(pixels, new_width, new_height)
        got = resized(kernel, pixels, new_width, new_height)
        assert np.array_equal(got, expected), (width, height, new_width, new_height)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 700), st.integers(1, 700))
def test_the_kernel_equals_pillow_on_any_size(kernel, width, height, new_width, new_height):
    pixels = noise(width, height)
    assert np.array_equal(resized(kernel, pixels, new_width, new_height), by_pillow(pixels, new_width, new_height))


@pytest.mark.parametrize("multiple", [1, 14, 16, 28, 30])
@pytest.mark.parametrize("size", [(100, 90, 420, 840), (300, 400, 420, 420), (300, 900, 310, 420)])
def test_blocks_are_whole_multiples_and_cover_the_picture_once(kernel, size, multiple):
    width, height, new_width, new_height = size
    new_height = new_height // multiple * multiple
    for resampler in (kernel, PillowResampler()):
        following = 0
        for top, planes in resampler.planes(noise(width, height), new_width, new_height, multiple):
            assert top == following
            assert len(planes) % multiple == 0
            assert planes.shape[1] == 3
            assert planes.shape[2] >= new_width
            following = top + len(planes)
        assert following == new_height


def test_a_read_only_picture_is_resized(kernel):
    pixels = noise(30, 20)
    pixels.flags.writeable = False
    assert np.array_equal(resized(kernel, pixels, 28, 28), by_pillow(pixels, 28, 28))


@pytest.mark.parametrize(
    ("source", "target"), [(n, m) for n in (1, 2, 7, 29, 480, 1000) for m in (1, 3, 28, 476, 1316) if n != m]
)
def test_coefficients_are_pillows_to_the_last_bit(source, target):
    # Each row holds one impulse of 1.0 in fixed point; resizing 32-bit pixels shows its rounded coefficients.
    impulses = Image.fromarray((np.eye(source) * (1 << resample.PRECISION)).astype(np.int32))
    expected = np.asarray(impulses.resize((target, source), BICUBIC)).T
    first, taps, weight = coefficients(source, target)
    got = np.zeros((target, source), np.int32)
    for i in range(target):
        got[i, first[i] : first[i] + taps[i]] = weight[i, : taps[i]]
    assert np.array_equal(got, expected)


def test_coefficients_in_cache_are_bounded():
    assert coefficients.cache_info().maxsize is not None


def test_the_order_of_passes_is_the_one_that_pillow_shows():
    decided = {True: 0, False: 0}
    for _ in range(1500):
        width, height, new_width, new_height = (int(n) for n in RANDOM.integers(2, 90, 4))
        image = Image.fromarray(noise(width, height))
        result = image.resize((new_width, new_height), BICUBIC).tobytes()
        horizontal = image.resize((new_width, height), BICUBIC).resize((new_width, new_height), BICUBIC).tobytes()
        vertical = image.resize((width, new_height), BICUBIC).resize((new_width, new_height), BICUBIC).tobytes()
        if horizontal == vertical:
            continue
        expected = result == vertical
        assert expected or result == horizontal
        assert vertical_first(width, height, new_width, new_height) == expected, image.size
        decided[expected] += 1
    assert min(decided.values()) > 200


def test_the_compiled_kernel_is_taken_where_it_equals_pillow():
    assert make_resampler().name == "numba"


def test_pillow_is_taken_where_the_order_of_passes_differs(monkeypatch, caplog):
    monkeypatch.setattr(resample, "vertical_first", lambda *_: False)
    with caplog.at_level(logging.WARNING):
        assert make_resampler.__wrapped__().name == "pillow"
    assert "differs from Pillow" in caplog.text


def test_pillow_is_taken_where_numba_is_missing(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "mmprep_worker.images.compiled", raising=False)
    monkeypatch.delattr("mmprep_worker.images.compiled", raising=False)
    with caplog.at_level(logging.WARNING):
        assert make_resampler.__wrapped__().name == "pillow"
    assert "does not load" in caplog.text


def test_both_paths_count_in_the_same_fraction_bits():
    """numba does not see a constant of another module change, so each path has its own."""
    compiled = pytest.importorskip("mmprep_worker.images.compiled")
    assert compiled.PRECISION == resample.PRECISION
