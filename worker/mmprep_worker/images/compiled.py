"""The loops that numba compiles: everything here works on plain arrays and is exact integer arithmetic.

Importing this module needs numba, and loads the machine code from numba's cache or compiles it (seconds, once a
machine). Of processes that start together one compiles a loop, and the others wait for it and load it. Array accesses
are not checked: the callers own the sizes. Source arrays are declared read-only, which accepts
writable ones too, so that each loop is compiled once. Byte order is little-endian.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numba import types as _types

#: Fraction bits of a coefficient: 32 less 8 for the pixel and 2 for sums beyond its range (Pillow's Resample.c).
PRECISION = 22
#: Bytes of a row that are added up at a time, so that their sums stay in the first-level cache.
_CHUNK = 2048

#: Beside the machine code. Who has it locked loads or compiles.
_LOCK = "mmprep-compiling.lock"
#: Seconds that the lock is waited for, and between two looks at it. Then it is done without: twice is better than never.
_PATIENCE = 120.0
_LOOK_AGAIN = 0.005

#: numba annotates only parts of itself.
types: Any = _types

_Loop = TypeVar("_Loop", bound=Callable[..., Any])


def _compiled(signature: Any, *, inline: bool = False) -> Callable[[_Loop], _Loop]:
    """Return a decorator that compiles for one signature, without the GIL, and keeps the result in numba's cache."""

    def compile_(loop: _Loop) -> _Loop:
        ready: Any = njit(cache=True, nogil=True, error_model="numpy", forceinline=inline)(loop)
        with _alone(Path(ready.stats.cache_path)):
            ready.compile(signature)
        ready.disable_compile()
        loaded: _Loop = ready
        return loaded

    return compile_


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep other processes of this user from compiling into ``directory`` meanwhile; a dead one keeps nobody.

    numba's index of a function is read, changed and written back, so that two who compile at once also lose entries.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:  # the cache is read only: nothing is written that could be lost
        yield
        return
    try:
        _wait_for(lock)
        yield
    finally:
        os.close(lock)


def _wait_for(lock: int) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                return  # this file system has no locks
        else:
            return
        time.sleep(_LOOK_AGAIN)


def _array(element: Any, dimensions: int, *, readonly: bool = False) -> Any:
    return types.Array(element, dimensions, "C", readonly=readonly)


@_compiled(
    types.void(
        _array(types.uint8, 2, readonly=True),
        types.intp,
        _array(types.uint8, 2),
        types.intp,
        types.intp,
        types.intp,
        _array(types.int32, 1, readonly=True),
        _array(types.int32, 1, readonly=True),
        _array(types.int32, 2, readonly=True),
    )
)
def combine(  # noqa: C901, PLR0917, one loop nest, compiled as a whole; compiled loops take no keywords
    source: Any, above: int, out: Any, top: int, rows: int, length: int, first: Any, counts: Any, weight: Any
) -> None:
    """Fill ``out[:rows]`` with the target rows from ``top``: weighted sums of rows of ``source``, rounded and clipped.

    ``source`` begins with row ``above`` of the whole; ``length`` bytes of each row are used; ``first``, ``counts`` and
    ``weight`` are the arrays of :class:`mmprep_worker.images.resample.Coefficients`. Sums have 32 bits, as
    Pillow's: 22 of fraction, 8 of pixel, and 2 spare ones for the overshoot of negative weights.
    """
    sums = np.empty(_CHUNK, np.int32)
    half = np.int32(1 << (PRECISION - 1))
    for y in range(rows):
        begin = first[top + y] - above
        taps = counts[top + y]
        w = weight[top + y]
        for start in range(0, length, _CHUNK):
            n = min(_CHUNK, length - start)
            s = source[:, start : start + n]
            for j in range(n):
                sums[j] = half
            k = 0
            while k + 4 <= taps:
                a, b, c, d = w[k], w[k + 1], w[k + 2], w[k + 3]
                p, q, r, t = s[begin + k], s[begin + k + 1], s[begin + k + 2], s[begin + k + 3]
                for j in range(n):
                    sums[j] = np.int32(sums[j] + np.int32(p[j]) * a + np.int32(q[j]) * b + r[j] * c + t[j] * d)
                k += 4
            if k + 2 <= taps:
                a, b = w[k], w[k + 1]
                p, q = s[begin + k], s[begin + k + 1]
                for j in range(n):
                    sums[j] = np.int32(sums[j] + p[j] * a + q[j] * b)
                k += 2
            if k < taps:
                a = w[k]
                p = s[begin + k]
                for j in range(n):
                    sums[j] = np.int32(sums[j] + p[j] * a)
            o = out[y, start : start + n]
            for j in range(n):
                o[j] = np.uint8(min(max(sums[j] >> np.int32(PRECISION), np.int32(0)), np.int32(255)))


_word = types.uint64


@_compiled(types.UniTuple(_word, 2)(_word, _word, _word, _word), inline=True)
def _swap(low: Any, high: Any, shift: Any, mask: Any) -> Any:
    """Exchange the upper lanes of ``low`` with the lower lanes of ``high``; a lane is ``shift`` bits."""
    change = ((low >> shift) ^ high) & mask
    return low ^ (change << shift), high ^ change


@_compiled(
    types.void(
        _array(types.uint64, 2, readonly=True), types.intp, types.intp, types.intp, _array(types.uint64, 2), types.intp
    )
)
def turn(source: Any, start: int, step: int, blocks: int, out: Any, column: int) -> None:  # noqa: PLR0917, as above
    """Transpose bytes; ``source`` and ``out`` are bytes seen as 64-bit words.

    Byte ``i`` of row ``start + step * r`` of ``source`` goes to byte ``8 * column + r`` of row ``i`` of ``out``, for
    all ``i`` and for ``r < 8 * blocks``. Blocks of eight by eight bytes are transposed in registers: three rounds of
    exchanges, between words 4, 2 and 1 apart.
    """
    s4, s2, s1 = np.uint64(32), np.uint64(16), np.uint64(8)
    m4, m2, m1 = np.uint64(0x00000000FFFFFFFF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00FF00FF00FF00FF)
    for tile in range(0, blocks, 8):
        for b in range(source.shape[1]):
            for a in range(tile, min(tile + 8, blocks)):
                r = start + 8 * a * step
                w0, w4 = _swap(source[r, b], source[r + 4 * step, b], s4, m4)
                w1, w5 = _swap(source[r + step, b], source[r + 5 * step, b], s4, m4)
                w2, w6 = _swap(source[r + 2 * step, b], source[r + 6 * step, b], s4, m4)
                w3, w7 = _swap(source[r + 3 * step, b], source[r + 7 * step, b], s4, m4)
                w0, w2 = _swap(w0, w2, s2, m2)
                w1, w3 = _swap(w1, w3, s2, m2)
                w4, w6 = _swap(w4, w6, s2, m2)
                w5, w7 = _swap(w5, w7, s2, m2)
                w0, w1 = _swap(w0, w1, s1, m1)
                w2, w3 = _swap(w2, w3, s1, m1)
                w4, w5 = _swap(w4, w5, s1, m1)
                w6, w7 = _swap(w6, w7, s1, m1)
                o, x = 8 * b, column + a
                out[o, x], out[o + 1, x], out[o + 2, x], out[o + 3, x] = w0, w1, w2, w3
                out[o + 4, x], out[o + 5, x], out[o + 6, x], out[o + 7, x] = w4, w5, w6, w7


@functools.cache
def patch_writer(element: str, patch: int) -> Callable[..., None]:
    """Return the loop that writes planar rows into patches, for one element type and patch size.

    The loop takes ``(planes, out, tables, band, merge, across, first, end)``: ``planes`` uint8 (rows, 3, stride), rows a multiple of
    ``patch``; ``out`` (N, 3, times, patch, patch) of ``element`` (``uint8``, ``uint16``, ``uint32``); ``tables`` of
    ``element`` (3, 256), what becomes of each value of each channel, not looked at for ``uint8``; ``band`` the first
    row of patches. Patches come in groups of ``merge`` by ``merge``, row by row within and outside the groups. The
    number of patches in a row is that of ``out`` over that of its rows, hence an argument ``across``. Of the time axis
    the indices from ``first`` to below ``end`` are written.
    """
    kind = getattr(types, element)
    look_up = element != "uint8"

    @_compiled(
        types.void(
            _array(types.uint8, 3, readonly=True),
            _array(kind, 5),
            _array(kind, 2, readonly=True),
            types.intp,
            types.intp,
            types.intp,
            types.intp,
            types.intp,
        )
    )
    def write(  # noqa: PLR0917, as above
        planes: Any, out: Any, tables: Any, band: int, merge: int, across: int, first: int, end: int
    ) -> None:
        for v in range(planes.shape[0] // patch):
            group, inside = divmod(band + v, merge)
            for u in range(across):
                n = ((group * (across // merge) + u // merge) * merge + inside) * merge + u % merge
                for c in range(3):
                    for t in range(first, end):
                        o = out[n, c, t]
                        for i in range(patch):
                            row = planes[v * patch + i, c]
                            for j in range(patch):
                                if look_up:
                                    o[i, j] = tables[c, row[u * patch + j]]
                                else:
                                    o[i, j] = row[u * patch + j]

    return write
