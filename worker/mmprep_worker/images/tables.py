"""What becomes of each of the 256 pixel values: rescaling and normalising as tables, exact to the bit.

A resized pixel has 8 bits, so that whatever a processor computes of it is one of 256 values a channel. The tables are
computed by the reference's own operations in its own order (transformers' ``image_transforms``): ``rescale`` multiplies
in float64 and rounds to float32; ``normalize`` subtracts and divides in float32. They stand in :mod:`mmprep.tensors`,
since readers of uint8 pixels apply them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmprep.tensors import normalization_table


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return float32 ``values`` as bit patterns of bfloat16, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def cast(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Return float32 ``values`` in the storage type of ``dtype``, rounded to nearest, ties to even.

    Parameters
    ----------
    dtype:
        ``float32``, ``float16``, or ``bfloat16``, which gives uint16 bit patterns.
    """
    if dtype == "bfloat16":
        return bfloat16_bits(values)
    with np.errstate(over="ignore"):
        return values.astype(np.float16 if dtype == "float16" else np.float32)


def lookup_tables(scale: float, mean: Sequence[float], std: Sequence[float], dtype: str) -> NDArray[Any]:
    """Return what becomes of each pixel value of each channel.

    Returns
    -------
    ndarray (channels, 256)
        ``uint8`` gives the values themselves; the others as :func:`cast`.
    """
    values = np.arange(256, dtype=np.uint8)
    if dtype == "uint8":
        return np.repeat(values[None], len(mean), axis=0)
    return cast(normalization_table(scale, mean, std), dtype)
