"""How a backend reaches the service: on its host, by shared memory, or from another one.

A :class:`Reader` registers the backend, gives items for addresses, and keeps their leases. :class:`LocalReader` is the one
on the service's host; :class:`mmprep.remote.reader.RemoteReader` is the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import msgspec
import zmq

from mmprep.address import Address
from mmprep.errors import InvalidRequest
from mmprep.item import Item, Runner, Shared, Source
from mmprep.items import ItemMeta, unpack_meta
from mmprep.registration import Lease, Mapping, Pulls, Registration
from mmprep.runtime import RuntimeDir
from mmprep.wire.messages import LeaseKind


class Reader(Protocol):
    """A registered backend's way to its items, on one asyncio loop; what other threads may call says so."""

    async def ready(self, seconds: float) -> None:
        """Wait until the backend is registered; raises ServiceUnavailable where nobody answers within ``seconds``."""

    async def close(self) -> None:
        """Release every lease and leave; again is no error."""

    async def call(self, make: Callable[[int], msgspec.Struct]) -> Any:
        """Say something to the service and return its answer."""

    def tell(self, make: Callable[[int], msgspec.Struct], told: Callable[[Any], None]) -> Callable[[], bool]:
        """Say something to the service, if it is there, once; ``told`` is called with the answer or the error.

        Returns what gives up waiting, and says whether there was no outcome yet. Raises WriterLostError where nobody is there.
        """

    def open_now(self, address: Address) -> Item | None:
        """Return the item at a leased address where that takes no word with the service. May be called from any thread."""

    async def open(self, address: Address) -> Item:
        """Return the item at a leased address; raises StaleAddress."""

    async def acquire(self, address: Address, kind: LeaseKind) -> Item:
        """Lease the content of an address and return the item; raises StaleAddress."""

    async def sources(self, wanted: Sequence[tuple[Address, ItemMeta]]) -> list[tuple[Address, Source]]:
        """Return the addresses as they are leased, and the tensors, of all items of a job; raises StaleAddress."""

    def sources_now(self, wanted: Sequence[tuple[Address, ItemMeta]]) -> list[tuple[Address, Source]] | None:
        """Return what :meth:`sources` does where that is sure to take no wait, else ``None``; raises StaleAddress."""

    async def renew(self, leases: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Prolong leases from now and return those that are over."""

    def drop(self, lease: bytes) -> None:
        """Release a lease soon. May be called from any thread."""


def item_of(address: Address, lease: bytes, meta: ItemMeta, source: Source, run: Runner | None) -> Item:
    """Return the item at an address that is leased as ``lease``, outside of any prompt."""
    return Item(
        meta,
        source,
        hash="",
        offset=0,
        length=meta.plan.length,
        cached=True,
        address=msgspec.structs.replace(address, lease=lease.hex()),
        run=run,
    )


def read_meta(mapping: Mapping, address: Address) -> tuple[bytes, ItemMeta]:
    """Return the metadata at an address, packed and unpacked; raises StaleAddress or InvalidRequest."""
    mapping.check(address)
    blob = bytes(mapping.extent(address)[: address.metadata_length])
    mapping.check(address)
    try:
        return blob, unpack_meta(blob)
    except ValueError:
        raise InvalidRequest("the address's metadata_length is not that of the item", param="address") from None


class LocalReader:
    """A backend on the service's host: its tensors are where they lie.

    Parameters
    ----------
    run:
        How other threads run coroutines on the loop, ``None`` where the program is on it.

    Raises
    ------
    InvalidRequest
        A living process has registered under the same id.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        runtime: RuntimeDir,
        backend_id: str,
        pulls: Pulls | None,
        run: Runner | None,
    ) -> None:
        self.registration = Registration(context, runtime, backend_id, pulls)
        self._run = run

    async def ready(self, seconds: float) -> None:
        await self.registration.ready(seconds)

    async def close(self) -> None:
        await self.registration.close()

    async def call(self, make: Callable[[int], msgspec.Struct]) -> Any:
        return await self.registration.call(make)

    def tell(self, make: Callable[[int], msgspec.Struct], told: Callable[[Any], None]) -> Callable[[], bool]:
        return partial(self.registration.forget, self.registration.tell(make, told))

    def open_now(self, address: Address) -> Item | None:
        held = self.registration.hold_now(address, None)
        return None if held is None else self._item(address, *held)

    async def open(self, address: Address) -> Item:
        return self._item(address, *await self.registration.hold(address, None))

    async def acquire(self, address: Address, kind: LeaseKind) -> Item:
        held = await self.registration.acquire(address, kind)
        return self._item(msgspec.structs.replace(address, lease_kind=kind), *held)

    async def sources(self, wanted: Sequence[tuple[Address, ItemMeta]]) -> list[tuple[Address, Source]]:
        return [await self._source(address) for address, _ in wanted]

    def sources_now(self, wanted: Sequence[tuple[Address, ItemMeta]]) -> list[tuple[Address, Source]] | None:
        if len(wanted) > 1:
            return None  # one of them may need a word, and the leases of the others would end with this try
        held = [self.registration.hold_now(address, None) for address, _ in wanted]
        if None in held:
            return None
        return [self._held(address, *found) for (address, _), found in zip(wanted, held, strict=True) if found]

    async def _source(self, address: Address) -> tuple[Address, Source]:
        return self._held(address, *await self.registration.hold(address, None))

    def _held(self, address: Address, mapping: Mapping, lease: Lease) -> tuple[Address, Source]:
        address = msgspec.structs.replace(address, lease=lease.id.hex())
        return address, Shared(self.registration, mapping, address, lease)

    async def renew(self, leases: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return await self.registration.renew(leases)

    def drop(self, lease: bytes) -> None:
        self.registration.give_up(lease)

    def _item(self, address: Address, mapping: Mapping, lease: Lease) -> Item:
        try:
            _, meta = read_meta(mapping, address)
            return item_of(address, lease.id, meta, Shared(self.registration, mapping, address, lease), self._run)
        except BaseException:
            lease.release()
            raise
