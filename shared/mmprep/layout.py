"""The bytes of a ring segment: header page, directory records, arena. Packing and checking only.

``[header page][directory: 128 bytes a slot][padding to a page][arena]``, everything little-endian. Rules:

* Header and records end in the CRC-32 of all their other bytes, so a torn or damaged one is refused. A record holds
  the number of its slot: one that was copied to another slot is refused as well.
* Offsets in records are absolute in the segment.
* A record is *readable* when READY or RETIRED. RETIRED is an entry that was removed from the cache while somebody
  held it: its address stays good until the last hold ends, and no later writer finds it by its key.
* A *generation* is the writer's incarnation and a counter: it is never reused in an epoch, and strictly rises.

WARNING: the CRC detects accidents. It is no defence against someone who may write to the segment.
"""

from __future__ import annotations

import enum
import struct
import zlib
from typing import NamedTuple

from mmprep.items import ALIGNMENT, align

#: Bytes of the header, and the alignment of the arena.
PAGE = 4096
#: Bytes of one directory record: two cache lines.
RECORD_SIZE = 128
#: Bytes of a key, and of an epoch.
KEY_SIZE = 32
EPOCH_SIZE = 16
#: The layout that this module reads and writes.
LAYOUT_VERSION = 1

#: Generations stay below 2**63, so that signed 64-bit integers hold them.
COUNTER_BITS = 40
MAX_COUNTER = (1 << COUNTER_BITS) - 1
MAX_INCARNATION = (1 << 23) - 1

Buffer = bytes | bytearray | memoryview

_MAGIC = b"mmpring\0"
_CRC = struct.Struct("<I")
# magic, version, slots, epoch, incarnation, total size, directory offset, arena offset, arena capacity
_HEADER = struct.Struct("<8sII16sQQQQQ")
# state, slot, generation, offset, length, metadata length, key
_RECORD = struct.Struct("<IIQQQI32s")
_HEADER_PADDING = bytes(PAGE - _HEADER.size - _CRC.size)
_RECORD_PADDING = bytes(RECORD_SIZE - _RECORD.size - _CRC.size)
_MAX_SLOTS = 2**24
#: A ring's directory has a slot for so many bytes of its arena, within these bounds.
_SLOT_BYTES = 64 * 1024
_LEAST_SLOTS, _MOST_SLOTS = 1024, 2**18
_MAX_ARENA = 2**48


class State(enum.IntEnum):
    """What a directory record says about its slot."""

    FREE = 0
    #: A lane may be writing into the extent.
    GRANTED = 1
    READY = 2
    #: No longer found by key, readable by address until the last hold ends.
    RETIRED = 3


def generation(incarnation: int, counter: int) -> int:
    """Return the generation of the ``counter``-th grant of the ``incarnation``-th writer.

    Raises
    ------
    ValueError
        One of them is out of its range.
    """
    if not 1 <= incarnation <= MAX_INCARNATION:
        raise ValueError(f"an incarnation is 1 to {MAX_INCARNATION}, not {incarnation}")
    if not 0 <= counter <= MAX_COUNTER:
        raise ValueError(f"a generation's counter is 0 to {MAX_COUNTER}, not {counter}")
    return incarnation << COUNTER_BITS | counter


class Geometry(NamedTuple):
    """Where the parts of a segment are, in bytes; made by :meth:`plan` or :meth:`for_ring`."""

    total_size: int
    slots: int
    directory_offset: int
    arena_offset: int
    arena_capacity: int

    @classmethod
    def plan(cls, arena_capacity: int, slots: int) -> Geometry:
        """Lay out a segment.

        Parameters
        ----------
        arena_capacity:
            Bytes for extents; rounded up to whole pages.
        slots:
            How many entries the directory can hold.

        Raises
        ------
        ValueError
            One of them is not positive, or absurdly large.
        """
        if not 1 <= arena_capacity <= _MAX_ARENA:
            raise ValueError(f"an arena has 1 to {_MAX_ARENA} bytes, not {arena_capacity}")
        if not 1 <= slots <= _MAX_SLOTS:
            raise ValueError(f"a directory has 1 to {_MAX_SLOTS} slots, not {slots}")
        capacity = _pages(arena_capacity)
        arena_offset = PAGE + _pages(slots * RECORD_SIZE)
        return cls(arena_offset + capacity, slots, PAGE, arena_offset, capacity)

    @classmethod
    def for_ring(cls, cache_size: int) -> Geometry:
        """Lay out the segment of a ring whose extents have ``cache_size`` bytes: what the service makes and what it needs.

        Raises
        ------
        ValueError
            As :meth:`plan`.
        """
        return cls.plan(cache_size, max(_LEAST_SLOTS, min(_MOST_SLOTS, cache_size // _SLOT_BYTES)))

    def record_offset(self, slot: int) -> int:
        """Return where the record of ``slot`` starts."""
        return self.directory_offset + slot * RECORD_SIZE


class Header(NamedTuple):
    """What the header page says.

    Attributes
    ----------
    epoch: 16 random bytes, chosen when the segment was made.
    incarnation: of the writer that owns the segment, 1 for the first.
    geometry: where the parts are.
    """

    epoch: bytes
    incarnation: int
    geometry: Geometry


class Record(NamedTuple):
    """One occupied directory slot.

    Attributes
    ----------
    offset: of the extent in the segment.
    meta_len: bytes of the metadata at its start.
    length: bytes used of the extent, metadata and padding behind it included.
    key: 32 bytes.
    """

    state: State
    slot: int
    generation: int
    offset: int
    meta_len: int
    length: int
    key: bytes

    @property
    def readable(self) -> bool:
        """Whether the extent's bytes are complete and stay as they are while the generation stands."""
        return self.state is State.READY or self.state is State.RETIRED


def pack_header(header: Header) -> bytes:
    """Return the header page, 4096 bytes.

    Raises
    ------
    ValueError
        The epoch or the incarnation is out of its range.
    """
    if len(header.epoch) != EPOCH_SIZE:
        raise ValueError(f"an epoch has {EPOCH_SIZE} bytes, not {len(header.epoch)}")
    generation(header.incarnation, 0)
    plan = header.geometry
    body = _HEADER.pack(
        _MAGIC,
        LAYOUT_VERSION,
        plan.slots,
        header.epoch,
        header.incarnation,
        plan.total_size,
        plan.directory_offset,
        plan.arena_offset,
        plan.arena_capacity,
    )
    body += _HEADER_PADDING
    return body + _CRC.pack(zlib.crc32(body))


def unpack_header(page: Buffer) -> Header:
    """Return what a header page says.

    Raises
    ------
    ValueError
        It is no header of a ring, of another layout version, damaged, or its values contradict each other.
    """
    if len(page) != PAGE:
        raise ValueError(f"a header has {PAGE} bytes, not {len(page)}")
    magic, version, slots, epoch, incarnation, total, directory, arena, capacity = _HEADER.unpack_from(page)
    if magic != _MAGIC:
        raise ValueError("this is no ring segment")
    if version != LAYOUT_VERSION:
        raise ValueError(f"the segment has layout version {version}, this code reads {LAYOUT_VERSION}")
    _check(page, "the header")
    generation(incarnation, 0)
    geometry = Geometry(total, slots, directory, arena, capacity)
    if geometry != Geometry.plan(capacity, slots):
        raise ValueError("the header's offsets and sizes contradict each other")
    return Header(epoch, incarnation, geometry)


def pack_record(record: Record) -> bytes:
    """Return the directory record, 128 bytes."""
    state, slot, number, offset, meta_len, length, key = record
    body = _RECORD.pack(state, slot, number, offset, length, meta_len, key) + _RECORD_PADDING
    return body + _CRC.pack(zlib.crc32(body))


def pack_free(slot: int) -> bytes:
    """Return the record of a free slot, 128 bytes. A new directory consists of these: zeros are no valid record."""
    return pack_record(Record(State.FREE, slot, 0, 0, 0, 0, bytes(KEY_SIZE)))


def unpack_record(buffer: Buffer, slot: int, geometry: Geometry) -> Record | None:
    """Return the record of ``slot``, or ``None`` where it is free.

    Parameters
    ----------
    buffer:
        The slot's 128 bytes.
    slot, geometry:
        What the record is checked against.

    Raises
    ------
    ValueError
        The self-check fails, it is another slot's record, or its extent is not inside the arena.
    """
    if len(buffer) != RECORD_SIZE:
        raise ValueError(f"a record has {RECORD_SIZE} bytes, not {len(buffer)}")
    _check(buffer, "the record")
    state, held_slot, number, offset, length, meta_len, key = _RECORD.unpack_from(buffer)
    if held_slot != slot:
        raise ValueError(f"slot {slot} holds the record of slot {held_slot}")
    if state == State.FREE:
        return None
    inside = geometry.arena_offset <= offset and offset + align(length) <= geometry.total_size
    if not inside or offset % ALIGNMENT or length < 1 or align(meta_len) > length:
        raise ValueError(f"the extent of slot {slot} is not inside the arena")
    generation(number >> COUNTER_BITS, number & MAX_COUNTER)
    return Record(State(state), slot, number, offset, meta_len, length, key)


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _check(buffer: Buffer, what: str) -> None:
    view = memoryview(buffer)
    body = len(view) - _CRC.size
    if zlib.crc32(view[:body]) != _CRC.unpack_from(view, body)[0]:
        raise ValueError(f"{what} fails its self-check")
