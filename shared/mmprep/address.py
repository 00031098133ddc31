"""Addresses: where an item lies in shared memory, and the checks before anyone believes one.

An address is data from outside. :func:`resolve` checks it against the mapped segment: name, epoch, bounds, and the
directory's record of the slot, whose generation is never used twice in an epoch. After a copy the record is checked again:
a reader gets the bytes of its address, or :class:`~mmprep.errors.StaleAddress`, never another item's.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from mmprep import layout
from mmprep.errors import InvalidRequest, StaleAddress
from mmprep.items import DTYPE_SIZES, Generation, ItemMeta, Natural, align
from mmprep.schemas import prepare
from mmprep.segment import sibling_name

#: Where the extent of a segment with one slot starts.
_SPILL_OFFSET = layout.Geometry.plan(1, 1).arena_offset


class AddressField(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor; ``offset`` in bytes from the start of the extent."""

    name: str
    dtype: str
    shape: tuple[Natural, ...]
    offset: Natural


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where an item lies.

    Attributes
    ----------
    segment: name of the POSIX segment.
    epoch: 32 hex digits; another one is another life of the ring.
    slot: the item's record in the directory.
    offset, length: of the extent, in bytes of the segment.
    generation: of the record; never reused in an epoch.
    metadata_length: bytes of the packed :class:`~mmprep.items.ItemMeta` at the extent's start.
    fields: the tensors.
    lease: 32 hex digits where the address is leased to a backend, whose duty is to renew or release it.
    lease_kind: ``copy`` or ``view``.
    lease_seconds: how long the lease holds, counted from the moment the request was sent.
    """

    segment: str
    epoch: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    slot: Natural
    offset: Natural
    length: Natural
    generation: Generation
    metadata_length: Natural
    fields: tuple[AddressField, ...]
    lease: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")] | None = None
    lease_kind: Literal["copy", "view"] | None = None
    lease_seconds: Natural | None = None


prepare(Address)


def address_fields(meta: ItemMeta, metadata_length: int) -> tuple[AddressField, ...]:
    """Return ``meta``'s fields with offsets from the start of the extent."""
    start = align(metadata_length)
    return tuple(AddressField(spec.name, spec.dtype, spec.shape, start + spec.offset) for spec in meta.fields)


def parse_address(plain: object) -> Address:
    """Return the address in plain data (from JSON or MessagePack).

    Raises
    ------
    InvalidRequest
        It has not the form of an address; the message says where.
    """
    if isinstance(plain, Address):  # its constructor checks nothing
        plain = msgspec.to_builtins(plain)
    try:
        return msgspec.convert(plain, Address)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"not an address: {error}", param="address") from None


def check_against(address: Address, *, segment: str, epoch: str, geometry: layout.Geometry) -> None:
    """Check all of an address that needs no look at the directory.

    Raises
    ------
    StaleAddress
        Of another segment or epoch.
    InvalidRequest
        Out of bounds.
    """
    if (address.segment, address.epoch) != (segment, epoch):
        raise StaleAddress("the address belongs to an earlier life of the cache; ask for the item again")
    start, end = geometry.arena_offset, geometry.arena_offset + geometry.arena_capacity
    if address.slot >= geometry.slots or address.offset < start or address.offset + address.length > end:
        raise InvalidRequest("the address points outside of the segment", param="address")
    if address.metadata_length > address.length:
        raise InvalidRequest("the address's metadata is longer than its extent", param="address")
    for field in address.fields:
        size = DTYPE_SIZES.get(field.dtype)
        if size is None:
            raise InvalidRequest(f"the address has a field of unknown dtype {field.dtype!r}", param="address")
        for dimension in field.shape:
            size *= dimension
        if field.offset + size > address.length:
            raise InvalidRequest(f"the address's field {field.name!r} ends behind its extent", param="address")


def is_in_spill(address: Address, *, ring: str) -> bool:
    """Whether an address lies in a segment of one item beside the segment ``ring``, by its form.

    The name has to be the one that such a segment of the address's epoch has; a ring's extents are never that far in front.
    """
    name = sibling_name(ring, bytes.fromhex(address.epoch))
    return address.segment == name != ring and (address.slot, address.offset) == (0, _SPILL_OFFSET)


def check_record(address: Address, record: bytes, geometry: layout.Geometry) -> None:
    """Check an address against its slot's record in the directory.

    Raises
    ------
    StaleAddress
        The slot holds something else now.
    InvalidRequest
        It is that item, and its metadata has another length.
    """
    try:
        found = layout.unpack_record(record, address.slot, geometry)
    except ValueError:
        found = None
    if (
        found is None
        or not found.readable
        or (found.generation, found.offset, found.length) != (address.generation, address.offset, address.length)
    ):
        raise StaleAddress("the item was evicted or replaced since; ask for it again")
    if found.meta_len != address.metadata_length:
        raise InvalidRequest("the address's metadata has another length than the item's", param="address")
