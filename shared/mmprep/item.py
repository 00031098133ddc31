"""What a client gets for one medium: its range in the prompt, and its tensors wherever they lie."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from collections.abc import Mapping as AnyMapping
from typing import Any, Protocol

import zmq
from numpy.typing import NDArray

from mmprep import tensors
from mmprep.address import Address
from mmprep.errors import InvalidRequest, LeaseLost, ServiceUnavailable
from mmprep.items import FieldSpec, ItemMeta, align
from mmprep.registration import Lease, Mapping, Registration


class Source(Protocol):
    """Where an item's tensors come from."""

    def check(self) -> None:
        """Raise LeaseLost where what :meth:`hold_now` or :meth:`hold` returned can't be read any more, InvalidRequest where the client is closed."""

    def copy(self) -> memoryview:
        """Return the tensor region, private to the caller and checked."""

    def hold_now(self) -> memoryview | None:
        """Return the tensor region without a copy, valid until :meth:`release`; ``None`` where that takes a :meth:`hold`."""

    async def hold(self) -> memoryview:
        """Return the tensor region without a copy, valid until :meth:`let_go`."""

    async def let_go(self) -> None:
        """End :meth:`hold`."""

    def release(self) -> None:
        """Give up the tensors."""


class Inline:
    """Tensors that travelled with the answer."""

    def __init__(self, region: memoryview) -> None:
        self._region = region.toreadonly()

    def check(self) -> None:
        return None

    def copy(self) -> memoryview:
        return memoryview(bytearray(self._region))

    def hold_now(self) -> memoryview:
        return self._region

    async def hold(self) -> memoryview:
        return self._region

    async def let_go(self) -> None:
        return None

    def release(self) -> None:
        return None


class Shared:
    """Tensors in a segment, under a lease of this process's registration."""

    def __init__(self, registration: Registration, mapping: Mapping, address: Address, lease: Lease) -> None:
        self._registration = registration
        self._mapping: Mapping | None = mapping
        self._address = address
        self._lease = lease
        self._turn = asyncio.Lock()
        # A lease that was granted as a view needs no word with the writer before and after.
        self._always_view = address.lease_kind == "view"
        self._views = 0

    def _start(self) -> int:
        return align(self._address.metadata_length)

    def _checked(self) -> Mapping:
        if self._mapping is None:
            raise LeaseLost("the item was released; ask for it again")
        if not self._mapping.frozen:
            self._registration.check_held(self._lease.id)
        return self._mapping

    def check(self) -> None:
        self._checked()

    def copy(self) -> memoryview:
        return self._checked().copy(self._address)[self._start() :]

    def part(self, start: int, stop: int) -> zmq.Frame:
        """Return a private copy of a part of the tensor region, in bytes from its start, as a frame to be sent.

        Raises
        ------
        StaleAddress
            The content was evicted or replaced.
        LeaseLost
            The lease is over.
        """
        first = self._start()
        return self._checked().part(self._address, first + start, first + stop)

    def hold_now(self) -> memoryview | None:
        mapping = self._checked()
        return self._region(mapping) if self._always_view or mapping.frozen else None

    async def hold(self) -> memoryview:
        async with self._turn:
            mapping = self._checked()
            mapping.check(self._address)
            if self._views == 0 and not mapping.frozen:
                try:
                    await self._registration.upgrade(self._lease.id, "view")
                except LeaseLost:
                    if not mapping.frozen:  # else a writer that does not know it has begun another segment meanwhile
                        raise
                self._checked()  # it may have been released while the writer was asked
            self._views += 1
            return self._region(mapping)

    async def let_go(self) -> None:
        async with self._turn:
            self._views -= 1
            if self._views == 0 and self._mapping is not None and not self._mapping.frozen:
                # Nobody reads any more, whatever it is; InvalidRequest: the client was closed, and its leases ended.
                with contextlib.suppress(LeaseLost, ServiceUnavailable, InvalidRequest):
                    await self._registration.upgrade(self._lease.id, "copy")

    def _region(self, mapping: Mapping) -> memoryview:
        mapping.check(self._address)
        return mapping.extent(self._address)[self._start() :]

    def release(self) -> None:
        self._lease.release()
        self._mapping = None  # a former segment's memory goes with the last reference to it


Runner = Callable[[Coroutine[Any, Any, Any]], Any]


class View:
    """Zero-copy, read-only arrays for the time of a ``with`` (or ``async with``) block."""

    def __init__(self, item: Item, run: Runner | None) -> None:
        self._item = item
        self._run = run
        self._held = False

    def __enter__(self) -> dict[str, NDArray[Any]]:
        if self._run is None:
            raise InvalidRequest("this item belongs to an asynchronous client: use `async with item.view()`")
        region = self._item.source.hold_now()
        if region is None:
            region = self._run(self._hold())
        return tensors.arrays(self._item.meta, region)

    def __exit__(self, *_: object) -> None:
        if self._held:
            assert self._run is not None
            with contextlib.suppress(InvalidRequest):  # the client was closed inside of the block
                self._run(self._item.source.let_go())

    async def __aenter__(self) -> dict[str, NDArray[Any]]:
        region = self._item.source.hold_now()
        if region is None:
            region = await self._hold()
        return tensors.arrays(self._item.meta, region)

    async def __aexit__(self, *_: object) -> None:
        if self._held:
            await self._item.source.let_go()

    async def _hold(self) -> memoryview:
        region = await self._item.source.hold()
        self._held = True
        return region


class Item:
    """One processed medium.

    Attributes
    ----------
    modality: ``image``, ``video`` or ``audio``.
    hash: 64 hex digits; equal for equal content processed in the same way.
    offset, length: the range of token ids that stands for it.
    is_embed: which of those positions take an embedding, or ``None``: all.
    fields: the tensors' names, dtypes, shapes and field kinds.
    address: where the tensors lie, or ``None`` where they came inline: asked for, or no shared memory was free.
    cached: whether they were there before this request.
    """

    def __init__(
        self,
        meta: ItemMeta,
        source: Source | None,
        *,
        hash: str,  # noqa: A002 -- the interface's name
        offset: int,
        length: int,
        cached: bool,
        address: Address | None,
        run: Runner | None,
    ) -> None:
        self.meta = meta
        self.hash = hash
        self.modality = meta.modality
        self.offset = offset
        self.length = length
        self.is_embed = meta.plan.is_embed()
        self.fields: tuple[FieldSpec, ...] = meta.fields
        self.cached = cached
        self.address = address
        self._source = source
        self._run = run

    @property
    def source(self) -> Source:
        """Where the tensors come from; raises InvalidRequest where none were asked for."""
        if self._source is None:
            raise InvalidRequest('this item has no tensors: it was asked for with payload="none"')
        return self._source

    def materialize(self, *, normalize: bool = False) -> dict[str, NDArray[Any]]:
        """Return private copies of the tensors, by field name.

        Parameters
        ----------
        normalize:
            Turn uint8 pixels into the float32 ones that transformers' processor gives, equal to the bit.

        Returns
        -------
        Arrays of the fields' shapes; a bfloat16 field comes as its bit patterns in uint16.

        Raises
        ------
        StaleAddress
            The content was evicted or replaced.
        LeaseLost
            The lease is over.
        InvalidRequest
            The item has no tensors, or none to normalise.
        """
        found = tensors.arrays(self.meta, self.source.copy())
        return tensors.normalized(self.meta, found) if normalize else found

    def view(self) -> View:
        """Return a context manager over the tensors as they lie, read-only and without a copy.

        The lease is a *view* for that time: the memory is not reused while this process lives, however slow it is.
        """
        return View(self, self._run)

    def release(self) -> None:
        """Give up the tensors; the arrays of :meth:`materialize` stay good."""
        if self._source is not None:
            self._source.release()


def features_of(items: AnyMapping[str, Sequence[Item]]) -> dict[str, Any] | None:
    """Return what a GenerateRequest says of its media, without their tensors; ``None`` where there are none.

    Parameters
    ----------
    items:
        By modality, in the order of the prompt.
    """
    if not items:
        return None
    return {
        "mm_hashes": {m: [item.hash for item in ones] for m, ones in items.items()},
        "mm_placeholders": {m: [_range(item) for item in ones] for m, ones in items.items()},
        "kwargs_data": None,
        "mm_metadata": None,
        "mm_addresses": None,
    }


def _range(item: Item) -> dict[str, Any]:
    placed: dict[str, Any] = {"offset": item.offset, "length": item.length}
    if item.is_embed is not None:
        placed["is_embed"] = item.is_embed
    return placed
