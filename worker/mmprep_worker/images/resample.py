"""Bicubic resampling of 8-bit RGB pictures, equal to the bit to Pillow's ``Image.resize((W, H), BICUBIC)``.

Pillow resamples in two passes, one a dimension, with 8-bit pixels in between. Each pass adds up neighbours, weighted by
22-bit fixed-point coefficients, in 32-bit integers. Since the intermediate is rounded, the *order* of the passes shows
in the result; Pillow 13 chooses it by size (:func:`vertical_first`), and so does this module.

The compiled path runs both passes through one primitive, :func:`mmprep_worker.images.compiled.combine`, which adds up weighted *rows* and vectorises
along them. For the horizontal pass it works on blocks of 64 picture rows that are turned on their side first, so that
neighbouring pixels become neighbouring rows. The result leaves in blocks of planar rows, ready to be written into
whatever layout a model wants, without a resized picture ever lying in memory as a whole.

WARNING: other versions of Pillow may choose other orders. :func:`make_resampler` therefore compares the compiled path
with the installed Pillow on sizes that tell orders and roundings apart, and takes Pillow itself where anything differs
or numba is missing: the bits are the same either way, only slower.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: Part of every model card's fingerprint: raise it with any change that alters a pixel.
KERNEL_VERSION = 1

_BICUBIC = Image.Resampling.BICUBIC
#: Fraction bits of a coefficient: 32 less 8 for the pixel and 2 for sums beyond its range (Pillow's Resample.c).
PRECISION = 22
#: Bytes of a row that are added up at a time, so that their sums stay in the first-level cache.
CHUNK = 2048
#: Picture rows that are turned on their side together: 64 bytes, one cache line.
_BLOCK = 64

Pixels = NDArray[np.uint8]
_log = logging.getLogger(__name__)


class Coefficients(NamedTuple):
    """The filter of one dimension: target pixel ``i`` is the sum of ``weight[i, k] * source[first[i] + k]``.

    Attributes
    ----------
    first: int32 (m,), the first source pixel of each target pixel.
    taps: int32 (m,), how many source pixels each has.
    weight: int32 (m, most taps), fixed point with 22 fraction bits, zero from ``taps`` on.
    """

    first: NDArray[np.int32]
    taps: NDArray[np.int32]
    weight: NDArray[np.int32]


@functools.lru_cache(maxsize=32)
def coefficients(source: int, target: int) -> Coefficients:
    """Return Pillow's bicubic coefficients (a = -0.5, antialiasing) from ``source`` to ``target`` pixels.

    Computed in double precision in the order of operations of Pillow's ``precompute_coeffs``, and rounded to fixed
    point away from zero, as its ``normalize_coeffs_8bpc``.
    """
    if source == target:
        whole = np.full((target, 1), 1 << PRECISION, np.int32)
        return Coefficients(np.arange(target, dtype=np.int32), np.ones(target, np.int32), whole)
    scale = source / target
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), source)
    tap = np.arange(math.ceil(support) * 2 + 1)
    x = np.abs((tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch))
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    weight = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weight[tap >= (last - first)[:, None]] = 0.0
    total = functools.reduce(np.add, weight.T)  # in the order of the taps: pairwise summation would round otherwise
    weight /= np.where(total == 0.0, 1.0, total)[:, None]
    fixed = weight * (1 << PRECISION)
    rounded = np.where(weight < 0, fixed - 0.5, fixed + 0.5).astype(np.int32)
    return Coefficients(first.astype(np.int32), (last - first).astype(np.int32), rounded)


def vertical_first(width: int, height: int, new_width: int, new_height: int) -> bool:
    """Whether Pillow 13 runs the vertical pass first: the height shrinks, by more than twice what the width does.

    The rule behind Pillow's pull request 9549, as observed on thousands of random sizes.
    """
    return height > new_height and height - new_height > 2 * (width - new_width)


class Resampler(Protocol):
    """Resizes pictures; every implementation gives the same bits."""

    #: For the log: ``numba`` or ``pillow``.
    name: str

    def planes(self, pixels: Pixels, width: int, height: int, multiple: int) -> Iterator[tuple[int, Pixels]]:
        """Yield ``pixels`` resized to ``width`` by ``height``, in blocks of planar rows from the top.

        Parameters
        ----------
        pixels:
            uint8 (h, w, 3), C-contiguous.
        multiple:
            Every block has a multiple of this many rows; ``height`` must be one.

        Yields
        ------
        tuple of int and uint8 ndarray (rows, 3, stride)
            The block's first row, and its rows; ``stride`` is at least ``width``, what lies beyond is undefined. The
            array is reused: its content is lost with the next step.
        """


class PillowResampler:
    """Resizes by Pillow itself."""

    name = "pillow"

    def planes(self, pixels: Pixels, width: int, height: int, multiple: int) -> Iterator[tuple[int, Pixels]]:
        resized = np.asarray(Image.fromarray(pixels).resize((width, height), _BICUBIC))
        rows = -(-_BLOCK // multiple) * multiple
        for top in range(0, height, rows):
            yield top, np.ascontiguousarray(resized[top : top + rows].transpose(0, 2, 1))


class _HorizontalPass:
    """Narrows or widens blocks of picture rows, and makes them planar: rows in at :attr:`rows`, out of :meth:`run`.

    The rows of a block are turned on their side, so that ``[row][x, channel]`` becomes ``[x, channel][row]``; target
    pixels are then weighted sums of contiguous bytes; turning back channel by channel makes planes.
    """

    def __init__(self, compiled: Any, width: int, new_width: int, rows: int) -> None:
        self._compiled = compiled
        self._weights = compiled.weights(coefficients(width, new_width))
        self._width = width
        self._new_width = new_width
        # Eight bytes off a multiple of the cache line: the rows of a block must not compete for one set of the cache.
        self.rows: Pixels = np.zeros((rows, -(-3 * width // 64) * 64 + 8), np.uint8)
        self.stride = stride = -(-new_width // 8) * 8
        columns: Pixels = np.empty((self.rows.shape[1], rows), np.uint8)
        resized: Pixels = np.zeros((3 * stride, rows), np.uint8)
        self._planes: Pixels = np.empty((rows, 3 * stride), np.uint8)

        def words(array: Pixels) -> Any:
            return compiled.place(array.view(np.uint64), np.uint64, written=True)

        self._rows_in_words, self._columns_in_words, self._resized_in_words, self._planes_in_words = map(
            words, (self.rows, columns, resized, self._planes)
        )
        self._source = compiled.place(columns[: 3 * width].reshape(width, 3 * rows), np.uint8)
        self._target = compiled.place(resized.reshape(stride, 3 * rows), np.uint8, written=True)
        #: The block, for a loop that fills it.
        self.place = compiled.place(self.rows, np.uint8, written=True)

    def run(self) -> Pixels:
        """Return the block resampled, uint8 (rows, 3, stride)."""
        turn, rows = self._compiled.turn, self.rows.shape[0]
        turn(self._rows_in_words, 0, 1, rows // 8, self._columns_in_words, 0)
        self._compiled.combine(self._source, 0, self._target, 0, self._new_width, 3 * rows, self._weights)
        for channel in range(3):
            blocks = self.stride // 8
            turn(self._resized_in_words, channel, 3, blocks, self._planes_in_words, channel * blocks)
        return self._planes.reshape(rows, 3, self.stride)


class NumbaResampler:
    """Resizes by the compiled loops.

    Raises
    ------
    ImportError, RuntimeError
        numba or LLVM is missing, or not one that is known.
    """

    name = "numba"

    def __init__(self) -> None:
        from mmprep_worker.images import compiled  # noqa: PLC0415, numba is optional

        self._compiled: Any = compiled

    def planes(self, pixels: Pixels, width: int, height: int, multiple: int) -> Iterator[tuple[int, Pixels]]:
        rows = -(-_BLOCK // math.lcm(8, multiple)) * math.lcm(8, multiple)
        if vertical_first(pixels.shape[1], pixels.shape[0], width, height):
            return self._vertical_first(pixels, width, height, rows)
        return self._horizontal_first(pixels, width, height, rows)

    def _vertical_first(self, pixels: Pixels, width: int, height: int, rows: int) -> Iterator[tuple[int, Pixels]]:
        h, w, _ = pixels.shape
        packed = self._compiled.place(pixels.reshape(h, 3 * w), np.uint8)
        vertical = self._compiled.weights(coefficients(h, height))
        horizontal = _HorizontalPass(self._compiled, w, width, rows)
        for top in range(0, height, rows):
            n = min(rows, height - top)
            self._compiled.combine(packed, 0, horizontal.place, top, n, 3 * w, vertical)
            yield top, horizontal.run()[:n]

    def _horizontal_first(self, pixels: Pixels, width: int, height: int, rows: int) -> Iterator[tuple[int, Pixels]]:
        h, w, _ = pixels.shape
        packed = pixels.reshape(h, 3 * w)
        vertical = self._compiled.weights(coefficients(h, height))
        horizontal = _HorizontalPass(self._compiled, w, width, _BLOCK)
        narrow = np.empty((h, 3, horizontal.stride), np.uint8)
        for top in range(0, h, _BLOCK):
            n = min(_BLOCK, h - top)
            horizontal.rows[:n, : 3 * w] = packed[top : top + n]
            narrow[top : top + n] = horizontal.run()[:n]
        length = 3 * horizontal.stride
        block = np.empty((rows, length), np.uint8)
        source = self._compiled.place(narrow.reshape(h, length), np.uint8)
        into = self._compiled.place(block, np.uint8, written=True)
        for top in range(0, height, rows):
            n = min(rows, height - top)
            self._compiled.combine(source, 0, into, top, n, length, vertical)
            yield top, block[:n].reshape(n, 3, horizontal.stride)


#: (width, height, new width, new height) that tell apart the order of passes, both sides of its rule, and roundings.
_PROBES = (
    (64, 48, 84, 28),
    (64, 88, 35, 11),
    (64, 88, 36, 32),
    (90, 70, 56, 28),
    (30, 90, 28, 84),
    (97, 61, 140, 84),
    (1, 97, 28, 28),
    (131, 1, 28, 56),
)


def resized(resampler: Resampler, pixels: Pixels, width: int, height: int) -> Pixels:
    """Return ``pixels``, uint8 (h, w, 3), resized to uint8 (height, width, 3), in one piece."""
    whole = np.empty((height, width, 3), np.uint8)
    for top, planes in resampler.planes(pixels, width, height, 1):
        whole[top : top + len(planes)] = planes[:, :, :width].transpose(0, 2, 1)
    return whole


def _equals_pillow(resampler: Resampler) -> bool:
    random = np.random.default_rng(0)
    pillow = PillowResampler()
    for width, height, new_width, new_height in _PROBES:
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = resized(pillow, pixels, new_width, new_height)
        if not np.array_equal(resized(resampler, pixels, new_width, new_height), expected):
            return False
    return True


@functools.cache
def make_resampler() -> Resampler:
    """Return the compiled resampler where it works and equals the installed Pillow, else Pillow's own.

    Which one it is goes to the log. Takes a fraction of a second, or seconds where numba has to compile.
    """
    try:
        compiled = NumbaResampler()
    except (ImportError, RuntimeError) as error:
        _log.warning("pictures are resized by Pillow, at half the speed: the compiled kernel does not load: %s", error)
        return PillowResampler()
    if not _equals_pillow(compiled):
        version = importlib.metadata.version("pillow")
        _log.warning("pictures are resized by Pillow, at half the speed: the kernel differs from Pillow %s", version)
        return PillowResampler()
    _log.info("pictures are resized by the compiled kernel, equal to Pillow's resize on all probes")
    return compiled
