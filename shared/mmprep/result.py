"""The form of a rendered request between a frontend and a native client.

Frames behind :class:`~mmprep.wire.messages.Rendered`: a packed :class:`Head`, then the tensor regions of those items whose
tensors travel inline, in the order of their ``frame`` numbers.
"""

from __future__ import annotations

import sys
from array import array

import msgpack
import msgspec
import numpy as np
from numpy.typing import NDArray

from mmprep.address import Address, address_fields
from mmprep.items import Generation, ItemMeta, Natural
from mmprep.segment import sibling_name
from mmprep.wire.codec import unpack
from mmprep.wire.messages import Digest, Epoch, LeaseId, LeaseKind

#: The largest packed head: token ids of a prompt of some millions of tokens.
HEAD_LIMIT = 64 << 20


class Place(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where an item lies in the ring, or in the segment of its own whose epoch is ``spill``, and its lease."""

    slot: Natural
    offset: Natural
    length: Natural
    generation: Generation
    lease: LeaseId | None
    lease_kind: LeaseKind = "copy"
    spill: Epoch | None = None


class HeadItem(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One item, in the order of its range in the prompt.

    ``meta`` is a packed :class:`~mmprep.items.ItemMeta`; ``frame`` the number of the frame of its tensors, -1 for none.
    """

    modality: str
    hash: Digest
    offset: Natural
    length: Natural
    cached: bool
    meta: bytes
    place: Place | None = None
    frame: int = -1


def leased_address(
    item: HeadItem,
    meta: ItemMeta,
    *,
    segment: str,
    epoch: bytes,
    lease: bytes,
    lease_kind: LeaseKind,
    lease_seconds: int | None = None,
) -> Address:
    """Return the address of an item that has a place.

    Parameters
    ----------
    meta:
        The item's, unpacked.
    segment, epoch:
        Of the ring that the place is in, or whose spill it is in.
    lease, lease_kind, lease_seconds:
        What the address is leased as.
    """
    place = item.place
    assert place is not None, "an item without tensors has no address"
    return Address(
        segment=segment if place.spill is None else sibling_name(segment, place.spill),
        epoch=(place.spill or epoch).hex(),
        slot=place.slot,
        offset=place.offset,
        length=place.length,
        generation=place.generation,
        metadata_length=len(item.meta),
        fields=address_fields(meta, len(item.meta)),
        lease=lease.hex(),
        lease_kind=lease_kind,
        lease_seconds=lease_seconds,
    )


class Head(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A rendered request. Token ids are little-endian uint32.

    ``request`` is JSON of its GenerateRequest, without token ids and media.
    """

    request: bytes
    token_ids: bytes
    unexpanded_token_ids: bytes
    items: tuple[HeadItem, ...]
    lease_ms: Natural
    segment: str
    epoch: Epoch

    def pack(self) -> bytes:
        """Return the packed form."""
        packed: bytes = msgpack.packb(msgspec.to_builtins(self, builtin_types=(bytes,)))
        return packed


def unpack_head(frame: bytes | memoryview) -> Head:
    """Return the head that :meth:`Head.pack` wrote; raises :class:`~mmprep.errors.ProtocolError`."""
    head: Head = unpack(frame, Head, limit=HEAD_LIMIT)
    return head


def ids_to_bytes(ids: list[int]) -> bytes:
    """Return token ids as little-endian uint32."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def ids_from_bytes(packed: bytes) -> NDArray[np.uint32]:
    """Return token ids as an array; raises ``ValueError`` where the length is no multiple of 4."""
    return np.frombuffer(packed, dtype="<u4")
