"""vLLM's multimodal items from ours; torch and vLLM are imported when a function is called.

WARNING: without ``copy`` the tensors are the shared memory itself. torch has no read-only tensors: whoever writes to one is
killed by the kernel. vLLM only reads them, to send them to its engine's process or to copy them to the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from mmprep.item import Item
from mmprep.items import FieldSpec

if TYPE_CHECKING:
    import torch
    from vllm.multimodal.inputs import MultiModalKwargsItem


def to_mm_kwargs_item(item: Item, *, batch_size: int = 1, copy: bool = False) -> MultiModalKwargsItem:
    """Return an item as vLLM's ``MultiModalKwargsItem``.

    Parameters
    ----------
    item:
        Of a blocking client or backend.
    batch_size:
        Items of its modality in the request; only *shared* fields hold it.
    copy:
        Private tensors. Otherwise they are the shared memory, which is not reused for as long as one of them lives: the
        item is released when the last of them is gone, and not before, so do not release it.

    Raises
    ------
    StaleAddress, LeaseLost
        The content or the lease is gone.
    InvalidRequest
        The item has no tensors.
    """
    from vllm.multimodal.inputs import MultiModalFieldElem, MultiModalKwargsItem  # noqa: PLC0415 -- the engine's own

    arrays = item.materialize() if copy else item.view().__enter__()
    keeper = None if copy else _Keeper(item)
    elements = {
        spec.name: MultiModalFieldElem(
            data=_tensor(arrays[spec.name], spec.dtype, keeper), field=_field(spec, batch_size)
        )
        for spec in item.fields
    }
    return MultiModalKwargsItem(elements)


def inject_into_mm_cache(
    input_processor: Any, items: Mapping[str, Sequence[Item]]
) -> tuple[dict[str, list[str]], dict[str, list[Any]]]:
    """Put items into the cache of a vLLM ``InputProcessor``, under their hashes; its metrics count them.

    Parameters
    ----------
    input_processor:
        Of the engine that shall have them.
    items:
        By modality, as in :attr:`mmprep.client.Result.items`. They are copied: the cache may keep them for long.

    Returns
    -------
    ``(mm_hashes, mm_kwargs)`` for an engine input of ``type`` ``multimodal``, as the processor left them: an element can be
    ``None``, or a handle, where the engine's process has the tensors already.
    """
    hashes = {modality: [item.hash for item in ones] for modality, ones in items.items()}
    kwargs = {
        modality: [to_mm_kwargs_item(item, batch_size=len(ones), copy=True) for item in ones]
        for modality, ones in items.items()
    }
    input_processor.inject_into_mm_cache(hashes, kwargs)
    return hashes, kwargs


def _field(spec: FieldSpec, batch_size: int) -> Any:
    from vllm.multimodal.inputs import (  # noqa: PLC0415
        MultiModalBatchedField,
        MultiModalFlatField,
        MultiModalSharedField,
    )

    if spec.kind == "flat":
        return MultiModalFlatField(slices=[[slice(0, spec.shape[0])]], dim=0, keep_on_cpu=spec.keep_on_cpu)
    if spec.kind == "shared":
        return MultiModalSharedField(batch_size=batch_size, keep_on_cpu=spec.keep_on_cpu)
    return MultiModalBatchedField(keep_on_cpu=spec.keep_on_cpu)


class _Keeper:
    """Keeps an item viewed; the item is released when the last reference to this is gone, on whatever thread that is."""

    def __init__(self, item: Item) -> None:
        weakref.finalize(self, item.release).atexit = False


def _tensor(array: NDArray[Any], dtype: str, keeper: _Keeper | None) -> torch.Tensor:
    import numpy as np  # noqa: PLC0415

    from mmprep.bridges.shared_tensor import Memory, typed  # noqa: PLC0415 -- brings torch

    tensor: torch.Tensor = typed(array if keeper is None else np.asarray(Memory(array, keeper)), dtype)
    return tensor
