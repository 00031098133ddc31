"""The directory: which entry is in which slot, and which key finds it.

Slots are a budget of their own: many small entries can use them up while the arena has space. Then a second clock hand,
which sweeps slots instead of addresses, finds an entry to evict. Rules:

* A slot holds at most one entry; a key finds at most one entry, GRANTED or READY.
* A RETIRED entry keeps its slot and is found by no key; another entry may have taken its key since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mmprep.arena import Verdict
from mmprep.items import align
from mmprep.layout import Record, State

# Reading a member of an enumeration costs 10 times as much as a global on Python 3.11; hits come through here.
_READY = State.READY


class Entry:
    """One occupied slot. Callers read it; only the ring changes it.

    Attributes
    ----------
    slot, generation: name the entry; the generation is never reused.
    key: 32 bytes.
    offset: of the extent, absolute in the segment.
    meta_len, length: bytes of the metadata, and bytes used of the whole extent.
    extent: bytes occupied, ``length`` rounded up to the alignment.
    state: GRANTED, READY or RETIRED.
    pins, leases: how many holds of each kind there are.
    """

    __slots__ = ("extent", "generation", "key", "leases", "length", "meta_len", "offset", "pins", "slot", "state")

    def __init__(self, record: Record) -> None:
        self.state = record.state
        self.slot = record.slot
        self.generation = record.generation
        self.offset = record.offset
        self.meta_len = record.meta_len
        self.length = record.length
        self.key = record.key
        self.extent = align(record.length)
        self.pins = 0
        self.leases = 0

    @property
    def idle(self) -> bool:
        """Whether it is READY and nobody holds it: only then may it be evicted."""
        return self.state is _READY and not self.pins and not self.leases

    def record(self) -> Record:
        """Return what the directory in the segment says about the entry."""
        return Record(self.state, self.slot, self.generation, self.offset, self.meta_len, self.length, self.key)


class Directory:
    """Slots and keys.

    Parameters
    ----------
    slots:
        How many entries there can be.
    """

    __slots__ = ("_by_key", "_free", "_hand", "_slots")

    def __init__(self, slots: int) -> None:
        self._slots: list[Entry | None] = [None] * slots
        self._by_key: dict[bytes, Entry] = {}
        # Reversed, so that slot 0 is taken first; a slot just freed is taken next.
        self._free = list(range(slots - 1, -1, -1))
        self._hand = 0

    def __len__(self) -> int:
        return len(self._slots) - len(self._free)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entry in self._slots if entry is not None)

    @property
    def full(self) -> bool:
        """Whether every slot is taken."""
        return not self._free

    def find(self, key: bytes) -> Entry | None:
        """Return the GRANTED or READY entry of ``key``."""
        return self._by_key.get(key)

    def at(self, slot: int) -> Entry | None:
        """Return the entry in ``slot``; ``None`` where it is free or does not exist."""
        return self._slots[slot] if 0 <= slot < len(self._slots) else None

    def free_slot(self) -> int:
        """Return the slot that the next entry takes; the directory must not be full."""
        return self._free[-1]

    def add(self, entry: Entry) -> None:
        """Enter ``entry`` in the slot that :meth:`free_slot` named."""
        assert self._free[-1] == entry.slot, f"slot {entry.slot} is not the next free one"
        self._free.pop()
        self._slots[entry.slot] = entry
        if entry.state is not State.RETIRED:
            self._by_key[entry.key] = entry

    def restore(self, entries: list[Entry]) -> None:
        """Enter ``entries`` of an earlier writer, each in the slot that it has; the directory must be empty."""
        for entry in entries:
            self._slots[entry.slot] = entry
            if entry.state is not State.RETIRED:
                self._by_key[entry.key] = entry
        self._free = [slot for slot in reversed(range(len(self._slots))) if self._slots[slot] is None]

    def retire(self, entry: Entry) -> None:
        """Make a READY entry unfindable; it keeps its slot."""
        del self._by_key[entry.key]
        entry.state = State.RETIRED

    def drop(self, entry: Entry) -> None:
        """Free the slot of ``entry`` and forget its key."""
        self._slots[entry.slot] = None
        self._free.append(entry.slot)
        if entry.state is not State.RETIRED:
            del self._by_key[entry.key]

    def victim(self, verdict: Callable[[Entry], Verdict]) -> Entry | None:
        """Sweep the slots for an entry to evict; it is not dropped yet.

        Returns
        -------
        Entry or None
            ``None`` after two revolutions: there is nothing that ``verdict`` lets go.
        """
        slots = self._slots
        for _ in range(2 * len(slots)):
            entry = slots[self._hand]
            self._hand = (self._hand + 1) % len(slots)
            if entry is not None and verdict(entry) is Verdict.EVICT:
                return entry
        return None

    def validate(self) -> None:
        """Check every invariant.

        Raises
        ------
        AssertionError
            One is broken; the message says which.
        """
        findable = 0
        for slot, entry in enumerate(self._slots):
            if entry is None:
                continue
            assert entry.slot == slot, f"slot {slot} holds the entry of slot {entry.slot}"
            assert entry.state is not State.FREE, f"the entry in slot {slot} is free"
            if entry.state is not State.RETIRED:
                assert self._by_key.get(entry.key) is entry, f"the key of slot {slot} does not find it"
                findable += 1
        assert findable == len(self._by_key), "a key finds an entry that has no slot"
        free = {slot for slot, entry in enumerate(self._slots) if entry is None}
        assert len(free) == len(self._free), "a slot is listed as free twice, or is free and not listed"
        assert free == set(self._free), "the list of free slots differs from the slots"
        assert 0 <= self._hand < len(self._slots), "the hand is outside the directory"
