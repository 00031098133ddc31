"""The compiled loops as functions. The GIL is free while they run.

Importing this module loads their machine code, or compiles it (seconds, once a machine). They take arrays as
:class:`Placed`, which is checked once for what the loops take for granted: element type, dimensions, no gaps. What lies in
an array is not checked: the callers own the sizes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mmprep_worker.images import machine_code
from mmprep_worker.images.resample import CHUNK, Coefficients

_U8 = np.dtype(np.uint8)
_AT, _N = ctypes.c_void_p, ctypes.c_ssize_t


def _function(address: int, arguments: str) -> Any:
    """Return what is at ``address`` as a function; of ``arguments``, ``*`` stands for an address and ``n`` for a number."""
    return ctypes.CFUNCTYPE(None, *(_AT if kind == "*" else _N for kind in arguments))(address)


_combine = _function(machine_code.address("combine"), "*nnn*nnnnn***nn*")
_turn = _function(machine_code.address("turn"), "*nnnnn*nnn")


class Placed(NamedTuple):
    """An array as a loop takes it: where it begins, and its lengths. It keeps the array, and so the memory."""

    address: int
    lengths: tuple[int, ...]
    array: NDArray[Any]


def place(array: NDArray[Any], element: DTypeLike, *, written: bool = False) -> Placed:
    """Return where an array of ``element`` lies, which is ``written`` or only read.

    Raises
    ------
    TypeError
        It has another element type, or gaps, or is to be written and must not be.
    """
    if array.dtype != element or not array.flags.c_contiguous or (written and not array.flags.writeable):
        raise TypeError(f"a loop takes an array of {element} without gaps, not {array.dtype} of {array.shape}")
    return Placed(array.ctypes.data, array.shape, array)


class Weights(NamedTuple):
    """The arrays of :class:`mmprep_worker.images.resample.Coefficients`, placed, with room for a loop's sums."""

    first: Placed
    taps: Placed
    weight: Placed
    sums: Placed


def weights(coefficients: Coefficients) -> Weights:
    """Place coefficients."""
    return Weights(*(place(array, np.int32) for array in (*coefficients, np.empty(CHUNK, np.int32))))


def combine(  # noqa: PLR0917, called as the loop is
    source: Placed, above: int, out: Placed, top: int, rows: int, length: int, by: Weights
) -> None:
    """Fill ``out[:rows]`` with the target rows from ``top``: weighted sums of rows of ``source``, rounded and clipped.

    ``source`` and ``out``, uint8 of two dimensions, begin with row ``above`` and row ``top`` of the whole; ``length``
    bytes of each row are used. Sums have 32 bits, as Pillow's: 22 of fraction, 8 of pixel, and 2 spare ones for the
    overshoot of negative weights.
    """
    _combine(
        source.address,
        *source.lengths,
        above,
        out.address,
        *out.lengths,
        top,
        rows,
        length,
        by.first.address,
        by.taps.address,
        by.weight.address,
        *by.weight.lengths,
        by.sums.address,
    )


def turn(  # noqa: PLR0917, as above
    source: Placed, start: int, step: int, blocks: int, out: Placed, column: int
) -> None:
    """Transpose bytes; ``source`` and ``out`` are bytes seen as 64-bit words, of two dimensions.

    Byte ``i`` of row ``start + step * r`` of ``source`` goes to byte ``8 * column + r`` of row ``i`` of ``out``, for
    all ``i`` and for ``r < 8 * blocks``. Blocks of eight by eight bytes are transposed in registers: three rounds of
    exchanges, between words 4, 2 and 1 apart.
    """
    _turn(source.address, *source.lengths, start, step, blocks, out.address, *out.lengths, column)


@functools.cache
def patch_writer(element: str, patch: int) -> Callable[[NDArray[Any], NDArray[Any]], Callable[..., None]]:
    """Return the loop that writes planar rows into patches, for one element type and patch size.

    It is given ``(out, tables)``, and gives a function of ``(planes, band, merge, across, first, end)``: ``planes`` uint8 (rows, 3, stride),
    rows a multiple of ``patch``; ``out`` (N, 3, times, patch, patch) of ``element`` (``uint8``, ``uint16``, ``uint32``); ``tables`` of
    ``element`` (3, 256), what becomes of each value of each channel, not looked at for ``uint8``; ``band`` the first
    row of patches. Patches come in groups of ``merge`` by ``merge``, row by row within and outside the groups. The
    number of patches in a row is that of ``out`` over that of its rows, hence an argument ``across``. Of the time axis
    the indices from ``first`` to below ``end`` are written.
    """
    kind = np.dtype(element)
    loop = _function(machine_code.address("patch_writer", element, patch), "*nn*nn*nnnnn")

    def writes(out: NDArray[Any], tables: NDArray[Any]) -> Callable[..., None]:
        if out.shape[1:2] + out.shape[3:] + tables.shape != (3, patch, patch, 3, 256):
            raise TypeError(
                f"the loop writes into patches of {patch} with tables of 256, not {out.shape}, {tables.shape}"
            )
        to, values = place(out, kind, written=True), place(tables, kind)

        def write(  # noqa: PLR0917, as above
            planes: NDArray[np.uint8], band: int, merge: int, across: int, first: int, end: int
        ) -> None:
            rows, _, stride = planes.shape
            at, patches, times = place(planes, _U8).address, out.shape[0], out.shape[2]
            loop(at, rows, stride, to.address, patches, times, values.address, band, merge, across, first, end)

        return write

    return writes
