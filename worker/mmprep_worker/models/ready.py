"""Items whose tensors are there already: a lane copies them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from mmprep.items import ItemMeta


class ReadyItem:
    """One item, ready: filling is a copy; see :class:`mmprep_worker.models.family.Prepared`.

    Parameters
    ----------
    meta:
        Of the item.
    arrays:
        Its tensors by field, of the shapes and dtypes that ``meta`` says.
    """

    decode_ns = 0

    def __init__(self, meta: ItemMeta, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.meta = meta
        self._arrays = arrays

    def fill(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Copy the tensors."""
        for name, array in self._arrays.items():
            tensors[name][...] = array
