"""What a new writer believes of the directory that it finds.

Dropped are: what was not published, what fails its self-check or is not of an earlier incarnation, every extent that
overlaps another (a granted one included: a lane may have written into both), what has the generation of another, and of
equal keys all but the newest.
"""

from __future__ import annotations

from collections import Counter

from mmprep.layout import RECORD_SIZE, Buffer, Geometry, Record, State, unpack_record


def survivors(image: Buffer, geometry: Geometry, before: int) -> tuple[list[Record], list[int]]:
    """Sort a directory into what is kept and what is dropped.

    Parameters
    ----------
    image:
        The directory, 128 bytes a slot.
    geometry:
        Of the segment.
    before:
        Generations are below this, or the record is not an earlier writer's.

    Returns
    -------
    list of Record, list of int
        The records to keep, in the order of addresses; and the slots to invalidate, rising.
    """
    records, broken = _read(image, geometry, before)
    bad = _overlapping(records)
    generations = Counter(record.generation for record in records)
    newest: dict[bytes, int] = {}
    for record in records:
        if record.state is State.READY:
            newest[record.key] = max(newest.get(record.key, 0), record.generation)
    kept = []
    for record in records:
        current = record.state is State.RETIRED or newest.get(record.key) == record.generation
        unique = generations[record.generation] == 1
        if record.readable and current and unique and record.slot not in bad:
            kept.append(record)
        else:
            broken.append(record.slot)
    return kept, sorted(broken)


def _read(image: Buffer, geometry: Geometry, before: int) -> tuple[list[Record], list[int]]:
    """Return the sound records in the order of addresses, and the slots of the others that are not free."""
    view = memoryview(image)
    records = []
    broken = []
    for slot in range(geometry.slots):
        try:
            record = unpack_record(view[slot * RECORD_SIZE : (slot + 1) * RECORD_SIZE], slot, geometry)
        except ValueError:
            broken.append(slot)
            continue
        if record is None:
            continue
        if record.generation < before:
            records.append(record)
        else:
            broken.append(slot)
    records.sort(key=lambda record: record.offset)
    return records, broken


def _overlapping(records: list[Record]) -> set[int]:
    """Return the slots of all records, given in the order of addresses, whose extents share a byte with another's."""
    bad: set[int] = set()
    furthest: Record | None = None
    for record in records:
        if furthest is None:
            furthest = record
            continue
        end = furthest.offset + furthest.length
        if record.offset < end:
            bad |= {record.slot, furthest.slot}
        if record.offset + record.length > end:
            furthest = record
    return bad
