"""Tensors of torch on the shared memory, without a copy.

``with view(item) as tensors`` (or ``view(job)``) lends them for a block, as ``item.view()`` lends arrays. They are read-only,
and using them after the block, after the item's or the job's end, or after the backend was closed is a
:class:`~mmprep.errors.LeaseLost` or an :class:`~mmprep.errors.InvalidRequest`; :mod:`mmprep.bridges.shared_tensor` says how,
and what they are not for. What is computed from them (by a layer of a model, say) is plain tensors.

:func:`materialize` and :func:`to_device` make plain tensors, which stay good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

from numpy.typing import NDArray

from mmprep.errors import InvalidRequest
from mmprep.item import Item, View
from mmprep.items import FieldSpec
from mmprep.job import AsyncJob, Job, JobView
from mmprep.tensors import normalization_table

try:
    import torch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("this bridge needs torch: pip install mmprep[torch]", name=error.name) from None

from mmprep.bridges.shared_tensor import Block, Loan, lend, typed

Tensors = dict[str, torch.Tensor]
_T = TypeVar("_T")


class TensorView(Generic[_T]):
    """Tensors without a copy for the time of one ``with`` (or ``async with``) block; made by :func:`view`."""

    def __init__(self, arrays: View | JobView, lent: Callable[[Any, Block], _T]) -> None:
        self._arrays = arrays
        self._lent = lent
        self._block = Block()

    def __enter__(self) -> _T:
        return self._lent(self._arrays.__enter__(), self._block)

    def __exit__(self, *_: object) -> None:
        self._block.over = True
        self._arrays.__exit__()

    async def __aenter__(self) -> _T:
        return self._lent(await self._arrays.__aenter__(), self._block)

    async def __aexit__(self, *_: object) -> None:
        self._block.over = True
        await self._arrays.__aexit__()


@overload
def view(source: Item) -> TensorView[Tensors]: ...
@overload
def view(source: Job | AsyncJob) -> TensorView[dict[str, list[Tensors]]]: ...
def view(source: Item | Job | AsyncJob) -> TensorView[Any]:
    """Return a context manager over the tensors of an item or a job as they lie, read-only and without a copy.

    Parameters
    ----------
    source:
        An item gives a dictionary by field name, a job a list of them for each modality. With an asynchronous client or
        backend it is ``async with``.

    Returns
    -------
    Gives tensors on the CPU of the fields' dtypes and shapes, bfloat16 included. In the block they are torch tensors that
    cannot be written to. They are not for what wants a pointer: NumPy (``item.view()`` has arrays), DLPack, ``torch.compile``,
    kernels of one's own. ``clone()`` and :func:`to_device` give tensors that are for everything, and stay good.

    Raises
    ------
    LeaseLost
        On entering, and on any use: the block, the item, the job or the lease is over.
    InvalidRequest
        On any use: it writes, wants a pointer, or the client is closed. On entering: there are no tensors.
    """
    if isinstance(source, Item):
        item = source
        return TensorView(item.view(), lambda arrays, block: _lend(item, arrays, block))
    items = source.items
    return TensorView(
        source.view(),
        lambda arrays, block: {
            modality: [_lend(item, of_item, block) for item, of_item in zip(items[modality], found, strict=True)]
            for modality, found in arrays.items()
        },
    )


def _lend(item: Item, arrays: Mapping[str, NDArray[Any]], block: Block) -> Tensors:
    loan = Loan(block, item.source.check)
    return {spec.name: lend(arrays[spec.name], spec.dtype, loan) for spec in item.fields}


def materialize(item: Item, *, normalize: bool = False) -> Tensors:
    """Return private copies of an item's tensors on the CPU; see :meth:`mmprep.item.Item.materialize`.

    Parameters
    ----------
    normalize:
        Turn uint8 pixels into the float32 ones that transformers' processor gives, equal to the bit.
    """
    arrays = item.materialize(normalize=normalize)
    return {spec.name: typed(arrays[spec.name], spec.dtype) for spec in item.fields}


def to_device(tensors: Mapping[str, torch.Tensor], device: torch.device | str) -> Tensors:
    """Return copies on a device, which stay good when the lease is over.

    To a CUDA device they go by way of pinned memory, and the copy into the device goes on while this returns: kernels of the
    current stream see it whole. The shared memory is not read any more then. To other devices it is a plain copy.

    Parameters
    ----------
    tensors:
        By field name, as :func:`view` gives them.
    device:
        As ``"cuda:0"``.
    """
    target = torch.device(device)
    return {name: _to_device(tensor, target) for name, tensor in tensors.items()}


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return tensor.to(device, copy=True)
    # torch keeps the pinned memory of a copy that is under way from being used again.
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return pinned.to(device, non_blocking=True)


def normalized(item: Item, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return ``tensors`` with the uint8 pixels replaced by the float32 ones that transformers' processor gives.

    A table does it, on the device where they lie, so they are equal to the bit everywhere.

    Parameters
    ----------
    item:
        Whose tensors they are.
    tensors:
        From :func:`view`, :func:`materialize` or :func:`to_device`.

    Raises
    ------
    InvalidRequest
        The item has no uint8 pixels.
    """
    constants = item.meta.normalization
    if constants is None or tensors[constants.field].dtype != torch.uint8:
        raise InvalidRequest("this item has no uint8 pixels to normalise; its pixels are floats already")
    pixels = tensors[constants.field]
    table = torch.from_numpy(normalization_table(constants.scale, constants.mean, constants.std)).to(pixels.device)
    found = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    for channel, values in enumerate(table):
        if constants.run:
            where: Any = (..., slice(channel * constants.run, (channel + 1) * constants.run))
        else:
            where = (channel,)
        found[where] = values[pixels[where].int()]
    return {**tensors, constants.field: found}


def join(fields: Sequence[FieldSpec], tensors: Sequence[Mapping[str, torch.Tensor]]) -> Tensors:
    """Return the tensors of several items of one modality as a model takes them.

    Parameters
    ----------
    fields:
        Of any of the items: their kinds say how they are joined. *batched* ones are stacked, *flat* ones concatenated, of
        *shared* ones the first is taken. One item's are not copied.
    tensors:
        Of each item, at least one.
    """
    joined: Tensors = {}
    for spec in fields:
        parts = [of_item[spec.name] for of_item in tensors]
        if spec.kind == "batched":
            joined[spec.name] = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
        else:
            joined[spec.name] = parts[0] if spec.kind == "shared" or len(parts) == 1 else torch.cat(parts)
    return joined
