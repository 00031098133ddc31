"""The loops that numba compiles: everything here works on plain arrays and is exact integer arithmetic.

Importing this module imports numba, which takes as long as the rest of a lane's start: it is done only to compile
(:mod:`mmprep_worker.images.machine_code`). Array accesses are not checked, and no loop raises or allocates. Each is
compiled as a C function that takes arrays as addresses and lengths; byte order is little-endian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba as _numba
import numpy as np

#: Fraction bits of a coefficient: 32 less 8 for the pixel and 2 for sums beyond its range (Pillow's Resample.c).
PRECISION = 22
#: Bytes of a row that are added up at a time, so that their sums stay in the first-level cache.
CHUNK = 2048

#: It annotates only parts of itself.
numba: Any = _numba
types: Any = numba.types
_n = types.intp

_Loop = TypeVar("_Loop", bound=Callable[..., Any])


def _at(element: Any) -> Any:
    return types.CPointer(element)


def _inlined(loop: _Loop) -> _Loop:
    part: _Loop = numba.njit(error_model="numpy", forceinline=True)(loop)
    return part


def _compiled(*arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a C function of these arguments."""
    decorate: Callable[[Callable[..., Any]], Any] = numba.cfunc(types.void(*arguments), error_model="numpy")
    return decorate


@_inlined
def _combine(  # noqa: C901, PLR0917, one loop nest, compiled as a whole; compiled loops take no keywords
    source: Any,
    above: int,
    out: Any,
    top: int,
    rows: int,
    length: int,
    first: Any,
    counts: Any,
    weight: Any,
    sums: Any,
) -> None:
    half = np.int32(1 << (PRECISION - 1))
    for y in range(rows):
        begin = first[top + y] - above
        taps = counts[top + y]
        w = weight[top + y]
        for start in range(0, length, CHUNK):
            n = min(CHUNK, length - start)
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


def combine() -> Any:
    """Compile the loop behind :func:`mmprep_worker.images.compiled.combine`."""
    u8, i32 = _at(types.uint8), _at(types.int32)

    @_compiled(u8, _n, _n, _n, u8, _n, _n, _n, _n, _n, i32, i32, i32, _n, _n, i32)
    def loop(  # noqa: PLR0917, as above
        source: Any,
        height: int,
        width: int,
        above: int,
        out: Any,
        out_height: int,
        out_width: int,
        top: int,
        rows: int,
        length: int,
        first: Any,
        counts: Any,
        weight: Any,
        targets: int,
        most: int,
        sums: Any,
    ) -> None:
        _combine(
            numba.carray(source, (height, width)),
            above,
            numba.carray(out, (out_height, out_width)),
            top,
            rows,
            length,
            numba.carray(first, (targets,)),
            numba.carray(counts, (targets,)),
            numba.carray(weight, (targets, most)),
            numba.carray(sums, (CHUNK,)),
        )

    return loop


@_inlined
def _swap(low: Any, high: Any, shift: Any, mask: Any) -> Any:
    """Exchange the upper lanes of ``low`` with the lower lanes of ``high``; a lane is ``shift`` bits."""
    change = ((low >> shift) ^ high) & mask
    return low ^ (change << shift), high ^ change


def turn() -> Any:
    """Compile the loop behind :func:`mmprep_worker.images.compiled.turn`."""
    words = _at(types.uint64)

    @_compiled(words, _n, _n, _n, _n, _n, words, _n, _n, _n)
    def loop(  # noqa: PLR0917, as above
        from_: Any,
        height: int,
        width: int,
        start: int,
        step: int,
        blocks: int,
        to: Any,
        out_height: int,
        out_width: int,
        column: int,
    ) -> None:
        source, out = numba.carray(from_, (height, width)), numba.carray(to, (out_height, out_width))
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

    return loop


def patch_writer(element: str, patch: int) -> Any:
    """Compile the loop behind :func:`mmprep_worker.images.compiled.patch_writer`."""
    kind, u8 = getattr(types, element), types.uint8
    look_up = element != "uint8"

    @_compiled(_at(u8), _n, _n, _at(kind), _n, _n, _at(kind), _n, _n, _n, _n, _n)
    def loop(  # noqa: PLR0917, as above
        from_: Any,
        rows: int,
        stride: int,
        to: Any,
        patches: int,
        times: int,
        values: Any,
        band: int,
        merge: int,
        across: int,
        first: int,
        end: int,
    ) -> None:
        planes = numba.carray(from_, (rows, 3, stride))
        out = numba.carray(to, (patches, 3, times, patch, patch))
        tables = numba.carray(values, (3, 256))
        for v in range(rows // patch):
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

    return loop
