"""Resampling equals the installed Pillow to the bit, whichever implementation runs."""

import logging
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmprep_worker.images import machine_code, resample
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


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """Give the kernel as a process finds it that has loaded nothing, with an empty cache; where that lies is returned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine_code._files.cache_clear()
    for name in ("compiled", "loops"):
        monkeypatch.delitem(sys.modules, f"mmprep_worker.images.{name}", raising=False)
        monkeypatch.delattr(f"mmprep_worker.images.{name}", raising=False)
    yield tmp_path / "mmprep" / "loops"
    machine_code._files.cache_clear()


def test_pillow_is_taken_where_nothing_is_compiled_and_numba_is_missing(unloaded, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    with caplog.at_level(logging.WARNING):
        assert make_resampler.__wrapped__().name == "pillow"
    assert "does not load" in caplog.text
    assert not unloaded.exists() or not list(unloaded.iterdir())


def test_a_loop_is_compiled_once_and_then_loaded_without_numba(tmp_path):
    """What is loaded gives Pillow's pixels, the elements of patches included; a damaged file is made anew."""
    code = (
        "import sys\n"
        "from mmprep_worker.images import compiled\n"
        "from mmprep_worker.images.resample import make_resampler\n"
        "compiled.patch_writer('uint16', 14)\n"
        "print(make_resampler().name, 'numba' in sys.modules)"
    )

    def start():
        command = [sys.executable, "-c", code]
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout

    assert start() == b"numba True\n"
    files = {path: path.read_bytes() for path in (tmp_path / "mmprep" / "loops").iterdir()}
    assert len(files) == 3
    assert start() == b"numba False\n"
    for path, whole in files.items():
        path.write_bytes(whole[:-1])
    assert start() == b"numba True\n"
    assert {path: path.read_bytes() for path in files} == files


def test_where_machine_code_cannot_be_kept_it_is_compiled_at_every_start(unloaded, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("another LLVM")

    monkeypatch.setattr(machine_code, "_load", refuse)
    with caplog.at_level(logging.WARNING):
        kernel = make_resampler.__wrapped__()
    assert kernel.name == "numba"
    assert "compiled at every start: another LLVM" in caplog.text
    assert not list(unloaded.iterdir())
    pixels = noise(64, 48)
    assert np.array_equal(resized(kernel, pixels, 28, 28), by_pillow(pixels, 28, 28))


def test_the_loops_count_in_the_same_fraction_bits_and_pieces():
    """numba does not see a constant of another module change, so both paths have their own."""
    loops = pytest.importorskip("mmprep_worker.images.loops")
    assert (loops.PRECISION, loops.CHUNK) == (resample.PRECISION, resample.CHUNK)


@pytest.mark.parametrize(
    ("array", "element", "written"),
    [
        (np.zeros((4, 8), np.int8), np.uint8, False),
        (np.zeros((4, 8), np.uint8)[:, ::2], np.uint8, False),
        (np.zeros((4, 8), np.uint8).T, np.uint8, False),
        (np.frombuffer(bytes(8), np.uint8), np.uint8, True),
    ],
    ids=["another type", "with gaps", "turned", "read-only"],
)
def test_an_array_that_a_loop_would_misread_is_refused(array, element, written):
    compiled = pytest.importorskip("mmprep_worker.images.compiled")
    with pytest.raises(TypeError, match="a loop takes"):
        compiled.place(array, element, written=written)
    writer = compiled.patch_writer("uint8", 14)
    for out, tables in (((2, 3, 1, 14, 16), (3, 256)), ((2, 4, 1, 14, 14), (3, 256)), ((2, 3, 1, 14, 14), (3, 255))):
        with pytest.raises(TypeError, match="patches of 14"):
            writer(np.zeros(out, np.uint8), np.zeros(tables, np.uint8))


def test_the_place_of_an_array_keeps_its_memory():
    compiled = pytest.importorskip("mmprep_worker.images.compiled")
    array = np.arange(8, dtype=np.uint8)
    kept = weakref.ref(array)
    place = compiled.place(array.reshape(2, 4), np.uint8)
    del array
    assert kept() is not None
    assert place.address == kept().ctypes.data
    del place
    assert kept() is None
