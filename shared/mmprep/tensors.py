"""An item's tensors as arrays: copied or viewed, as they are or normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmprep.errors import InvalidRequest
from mmprep.items import ItemMeta, field_array


def arrays(meta: ItemMeta, region: memoryview) -> dict[str, NDArray[Any]]:
    """Return every field of an item as an array over ``region``, the tensor region of its extent, without a copy."""
    return {spec.name: field_array(region, spec) for spec in meta.fields}


def normalization_table(scale: float, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """Return the float32 value of every uint8 value in every channel, shape ``(channels, 256)``.

    The operations and their order are those of transformers' PIL backend (``image_transforms.rescale`` in float64, rounded
    to float32, then ``normalize`` in float32), so the result equals its output to the bit.
    """
    pixels = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
    centre = np.asarray(mean, dtype=np.float32)[:, None]
    spread = np.asarray(std, dtype=np.float32)[:, None]
    table: NDArray[np.float32] = (pixels[None, :] - centre) / spread
    return table


def normalized(meta: ItemMeta, tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return ``tensors`` with the uint8 pixels replaced by normalised float32 ones.

    Raises
    ------
    InvalidRequest
        The item has no uint8 pixels with known constants.
    """
    constants = meta.normalization
    if constants is None or constants.field not in tensors or tensors[constants.field].dtype != np.uint8:
        raise InvalidRequest("normalize=True needs an item with uint8 pixels; this one's are floats already")
    table = normalization_table(constants.scale, constants.mean, constants.std)
    pixels = tensors[constants.field]
    out = np.empty(pixels.shape, dtype=np.float32)
    for channel in range(table.shape[0]):
        if constants.run:
            where: Any = (..., slice(channel * constants.run, (channel + 1) * constants.run))
        else:
            where = (channel,)
        out[where] = table[channel][pixels[where]]
    return {**tensors, constants.field: out}
