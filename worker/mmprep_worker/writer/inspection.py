"""What an operator asks of the ring: what is in it, and that all of it goes."""

from __future__ import annotations

from typing import Final, Literal

from mmprep.layout import State
from mmprep.wire import messages
from mmprep_worker.ring.directory import Entry
from mmprep_worker.ring.ring import Ring
from mmprep_worker.ring.spills import Spill

_STATES: Final[dict[State, Literal["filling", "ready", "removed"]]] = {
    State.GRANTED: "filling",
    State.READY: "ready",
    State.RETIRED: "removed",
}


def inspect(ring: Ring, message: messages.Inspect) -> messages.Inspected:
    """Return a page of the ring's entries."""
    entries, start = ring.in_slots(message.start, messages.MAX_INSPECTED)
    return messages.Inspected(message.call, tuple(map(_told, entries)), start)


def clear(ring: Ring, message: messages.Clear) -> messages.Cleared:
    """Empty the ring, and what is beside it, as far as nobody holds it; tell what that has brought."""
    before = ring.stats()
    entries = ring.clear()
    after = ring.stats()
    nbytes = after.free - before.free + before.spills.nbytes - after.spills.nbytes
    return messages.Cleared(message.call, entries, nbytes)


def _told(entry: Entry) -> messages.InspectedEntry:
    return messages.InspectedEntry(
        entry.slot,
        entry.generation,
        entry.key,
        entry.extent,
        _STATES[entry.state],
        entry.pins,
        entry.leases,
        isinstance(entry, Spill),
    )
