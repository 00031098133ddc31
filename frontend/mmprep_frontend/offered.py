"""What a frontend asks the writer for, and what it is answered.

An answer keeps what it speaks of: pins and transfers at the writer until it is released, leases until they are given back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from mmprep import failpoints, layout
from mmprep.errors import ServiceUnavailable, StaleAddress
from mmprep.wire import messages
from mmprep_frontend.tensors import TensorLink, Tensors

if TYPE_CHECKING:
    from mmprep_frontend.dispatch import WriterLink

#: Bytes of an item for each pixel of the cost that a picture of equal work has; and the least cost.
_BYTES_A_PIXEL, _LEAST_COST = 64, 4096
_REPLACED = "the worker was replaced while the answer was written; try again"


def copying_cost(nbytes: int) -> int:
    """Return what an item costs whose tensors a lane has only to check and to copy, in pixels."""
    return max(_LEAST_COST, nbytes // _BYTES_A_PIXEL)


@dataclass(frozen=True, slots=True)
class OfferItem:
    """One medium of a request, as the writer must know it.

    Attributes
    ----------
    key: of the item, 32 bytes.
    medium: the encoded bytes.
    digest: of them, 32 bytes.
    options: packed ItemOptions for the lane.
    cost: estimated pixels.
    alias: the caller's name for it, if any.
    variant: makes the key, with the digest; empty where there is no alias to recall it by.
    """

    key: bytes
    modality: str
    medium: bytes | memoryview
    digest: bytes
    options: bytes
    cost: int
    alias: messages.Alias | None = None
    variant: bytes = b""

    def offered(self) -> messages.Offered:
        """Return what the writer is told of it."""
        return messages.Offered(self.key, self.modality, self.cost, len(self.medium), self.alias)


@dataclass(frozen=True, slots=True)
class InjectedItem:
    """One item that was processed elsewhere.

    Attributes
    ----------
    key: made of its name, 32 bytes.
    medium: the packed item.
    digest: of that, 32 bytes.
    cost: estimated pixels.
    alias: what its name is as a ``uuid``, 32 bytes.
    replace: whether it takes the place of what is there.
    """

    key: bytes
    modality: str
    medium: bytes | memoryview
    digest: bytes
    cost: int
    alias: bytes
    replace: bool = False
    options: bytes = b""

    def offered(self) -> messages.Injected:
        """Return what the writer is told of it."""
        return messages.Injected(self.key, self.modality, self.cost, len(self.medium), self.alias, self.replace)


#: One item of an offer.
Wanted: TypeAlias = OfferItem | InjectedItem | messages.Recalled


class Offered:
    """An offer's answer; a context manager that lets go of what it pinned.

    Attributes
    ----------
    token: of the offer.
    items: one answer an item, in the offer's order.
    mapping: the ring, in which the places of this answer lie that are not in a spill.
    lease_ms: how long granted leases hold.
    leased_to: the backend that has leases on the items, or ``None``: they are pinned.
    """

    def __init__(self, link: WriterLink, token: int, answer: messages.Answer, items: Sequence[Any]) -> None:
        self.items: Sequence[messages.ItemAnswer] = items
        mapping = link.mapping
        assert mapping is not None
        self.mapping = mapping
        self.lease_ms = answer.lease_ms
        self.leased_to = answer.leased_to
        self._link = link
        self.token = token
        self._tensors = Tensors(mapping)

    async def fetch(self, link: TensorLink) -> None:
        """Get the tensors that found no shared memory, and let the writer forget them where nothing else is held."""
        if any(item.fault is not None for item in self.items):
            return  # the writer keeps nothing for a call that has failed
        fetched = await link.fetch(self.items)
        if fetched:
            failpoints.reach("frontend.fetched")
        self._tensors.add(fetched)
        if fetched and self.leased_to is not None:
            self._link.unpin(self.token)

    def region(self, item: messages.ItemAnswer) -> memoryview:
        """Return an item's tensors as they lie there, kept until :meth:`release`; may be read on any thread.

        Raises
        ------
        ServiceUnavailable
            The writer was replaced before they were read.
        """
        try:
            return self._tensors.region(item)
        except StaleAddress:
            raise ServiceUnavailable(_REPLACED, retry_after=1.0) from None

    def nbytes(self, item: messages.ItemAnswer) -> int:
        """Return about how many bytes :meth:`region` has; nothing is mapped for it."""
        return self._tensors.nbytes(item)

    def check(self) -> None:
        """Check, after the regions were read, that they were what they should be.

        A pin that a writer knows keeps them. This is for one that it could not be told of.

        Raises
        ------
        ServiceUnavailable
            The writer was replaced, and what was read may be something else.
        """
        buffer, geometry = self.mapping.segment.buffer, self.mapping.geometry
        for item in self.items:
            if item.spill is not None:  # written once; mapped, it stays as it is
                continue
            start = geometry.record_offset(item.slot)
            try:
                record = layout.unpack_record(buffer[start : start + layout.RECORD_SIZE], item.slot, geometry)
            except ValueError:
                record = None
            if item.length and (record is None or record.generation != item.generation):
                raise ServiceUnavailable(_REPLACED)

    def release(self) -> None:
        """Let go; again is no error."""
        self._tensors.close()
        failpoints.reach("frontend.unpin.before")
        self._link.unpin(self.token)
        failpoints.reach("frontend.unpin.after")

    def give_back(self) -> None:
        """Let go, also of leases: the answer will not reach anybody."""
        self.release()
        give_leases_back = self.lease_return()
        if give_leases_back is not None:
            give_leases_back()

    def lease_return(self) -> Callable[[], None] | None:
        """Return what gives the leases back where the answer turns out to have reached nobody; ``None`` without leases.

        It may be called on a mere suspicion: a backend that has taken them up keeps them.
        """
        leases = tuple(item.lease for item in self.items if item.lease is not None)
        if self.leased_to is None or not leases:
            return None
        return partial(self._link.release_soon, self.leased_to, leases)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
