"""Writing resized pictures into patches: the last step, fused with resampling, of models that flatten patches."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmprep_worker.images.resample import NumbaResampler, Pixels, Resampler


def _write(  # noqa: PLR0917, called as the compiled loop is
    out: NDArray[Any], tables: NDArray[Any], planes: Pixels, band: int, merge: int, across: int, first: int, end: int
) -> None:
    """Do in numpy what :func:`mmprep_worker.images.compiled.patch_writer`'s loop does, once it has ``out`` and ``tables``."""
    patch = out.shape[-1]
    rows = planes.shape[0] // patch
    grid = planes[:, :, : across * patch].reshape(rows, patch, 3, across, patch).transpose(0, 3, 2, 1, 4)
    row, column = np.meshgrid(np.arange(band, band + rows), np.arange(across), indexing="ij")
    n = ((row // merge * (across // merge) + column // merge) * merge + row % merge) * merge + column % merge
    channel = np.arange(3)[:, None, None]
    out[n, :, first:end] = tables[channel, grid][:, :, :, None]


def write_patches(
    resampler: Resampler,
    pixels: Pixels,
    grid: tuple[int, int],
    *,
    merge: int,
    out: NDArray[Any],
    tables: NDArray[Any],
    times: range | None = None,
) -> None:
    """Resize ``pixels`` and write them into patches.

    Parameters
    ----------
    pixels:
        uint8 (h, w, 3), C-contiguous.
    grid:
        Patches down and across, multiples of ``merge``.
    merge:
        Patches lie in groups of ``merge`` by ``merge``; groups, and patches in a group, lie row by row.
    out:
        (patches, 3, times, patch, patch), C-contiguous.
    tables:
        (3, 256) of ``out``'s dtype: what becomes of each value of each channel.
    times:
        Which indices of the time axis the picture is written to; ``None``: all.
    """
    down, across = grid
    patch = out.shape[-1]
    times = range(out.shape[2]) if times is None else times
    write: Any = functools.partial(_write, out, tables)
    if isinstance(resampler, NumbaResampler):
        # The loop moves bits, it does not calculate: one for each element size.
        bits = np.dtype(f"uint{8 * out.dtype.itemsize}")
        write = _compiled_writer(bits.name, patch)(out.view(bits), tables.view(bits))
    for top, planes in resampler.planes(pixels, across * patch, down * patch, patch):
        write(planes, top // patch, merge, across, times.start, times.stop)


@functools.cache
def _compiled_writer(element: str, patch: int) -> Any:
    from mmprep_worker.images import compiled  # noqa: PLC0415, numba is optional

    return compiled.patch_writer(element, patch)
