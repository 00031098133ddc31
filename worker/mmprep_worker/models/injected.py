"""Items that were processed elsewhere: a lane checks them as the model's family knows its own, and copies them.

The frontend has checked that names, dtypes, kinds and shapes are those of the card, and the ids of the expansion. What hangs
together by its content is the family's matter (:meth:`~mmprep_worker.models.family.Family.check_injected`). Floats must be
finite: what is not a number would spread over the whole answer of an engine.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mmprep.errors import InvalidRequest, ProtocolError
from mmprep.injected import check_forms, unpack_item
from mmprep.items import Plan, field_array
from mmprep_worker.models.family import Family
from mmprep_worker.models.ready import ReadyItem

#: Elements that are looked at in one go, so that looking needs little memory.
_PIECE = 1 << 20
#: Bits of a bfloat16 that are all set in what is no finite number.
_EXPONENT = np.uint16(0x7F80)


def open_injected(family: Family, modality: str, frame: memoryview, digest: bytes) -> ReadyItem:
    """Return an item that was packed by :func:`mmprep.injected.pack_item`.

    Parameters
    ----------
    family:
        Of the model.
    modality:
        Of the task.
    frame:
        The item; the result keeps a reference.
    digest:
        Of the frame, 32 bytes; the item's metadata hold it.

    Raises
    ------
    mmprep.errors.InvalidRequest
        It is no item of this model; ``param`` names what is wrong.
    mmprep.errors.ProtocolError
        The frame is no item at all.
    """
    meta, region = unpack_item(frame)
    if meta.modality != modality:
        raise ProtocolError("an injected item is of another modality than it was offered as")
    check_forms(family.card, meta)
    arrays = {spec.name: field_array(region, spec) for spec in meta.fields}
    for spec in meta.fields:
        if not _is_finite(arrays[spec.name], spec.dtype):
            raise InvalidRequest("it holds values that are no finite numbers", param=f"fields.{spec.name}")
    family.check_injected(modality, meta.plan, arrays)
    return ReadyItem(msgspec.structs.replace(meta, injected=digest), arrays)


def embeds(plan: Plan) -> int:
    """Return how many positions of a plan take an embedding."""
    return sum(run.count for run in plan.runs if run.embed)


def _is_finite(array: NDArray[Any], dtype: str) -> bool:
    flat = array.reshape(-1)
    pieces = (flat[start : start + _PIECE] for start in range(0, len(flat), _PIECE))
    if dtype == "bfloat16":
        return all(bool(np.all(piece & _EXPONENT != _EXPONENT)) for piece in pieces)
    return array.dtype.kind != "f" or all(bool(np.isfinite(piece).all()) for piece in pieces)
