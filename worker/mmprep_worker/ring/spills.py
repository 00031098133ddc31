"""Spills: items that found no room in the ring, each in a segment of its own. The table of them; pure.

A spill is a ring with one slot and one extent, made and filled by a lane by order of the writer. Inside the writer it has
a slot above those of the ring, so that pins and leases need not know the difference. A life is that of an entry in the
ring: GRANTED → READY → evicted, or RETIRED while held; at its end the name of its segment goes. Rules:

* All segments together stay within a budget of bytes and of their number, whatever state they are in.
* Only idle ones are evicted, the least recently used first, and none where that would not make room.
* A key finds at most one spill. It may find an entry of the ring besides: one that a call could not pin any more.
* What has ended comes out of :meth:`Spills.take_removed`: its segment is to be unlinked, whether it was made or not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from mmprep.items import align
from mmprep.layout import Geometry, Record, State
from mmprep_worker.ring.directory import Entry

#: The slot of a spill's one record in its own segment.
SLOT = 0

_READY = State.READY


class Spill(Entry):
    """One spill; :attr:`slot` is the writer's number for it, :attr:`extent` the bytes of the whole segment.

    Attributes
    ----------
    epoch: 16 random bytes, of the segment.
    meta: the item's packed metadata; the writer does not map spills.
    """

    __slots__ = ("epoch", "meta")

    def __init__(self, record: Record, geometry: Geometry, epoch: bytes, meta: bytes) -> None:
        super().__init__(record)
        self.extent = geometry.total_size
        self.epoch = epoch
        self.meta = meta


class SpillStats(NamedTuple):
    """A snapshot. ``nbytes``: of the segments; ``filling``: how many are GRANTED; ``made``: published since the start."""

    entries: int
    nbytes: int
    filling: int
    made: int


class Spills:
    """The table.

    Parameters
    ----------
    first_slot:
        The number of the first spill: slots of the ring are below it.
    max_bytes, max_count:
        Of all segments together.
    """

    __slots__ = ("_by_generation", "_by_key", "_bytes", "_first", "_free", "_made", "_max_bytes", "_removed", "_slots")

    def __init__(self, first_slot: int, max_bytes: int, max_count: int) -> None:
        self._first = first_slot
        self._max_bytes = max_bytes
        self._slots: list[Spill | None] = [None] * max_count
        self._free = list(range(max_count - 1, -1, -1))
        self._by_key: dict[bytes, Spill] = {}
        # In the order of their last use.
        self._by_generation: OrderedDict[int, Spill] = OrderedDict()
        self._bytes = 0
        self._made = 0
        self._removed: list[bytes] = []

    def __iter__(self) -> Iterator[Spill]:
        return iter(self._by_generation.values())

    @property
    def end(self) -> int:
        """The number that no spill can have, and none above it."""
        return self._first + len(self._slots)

    def fits(self, meta_len: int, tensor_len: int, beside: int) -> bool:
        """Whether there would be room for an item if there were nothing but ``beside`` bytes."""
        if beside + align(meta_len) + tensor_len > self._max_bytes:  # however absurd, no geometry has to be made of it
            return False
        return beside + _plan(meta_len, tensor_len).total_size <= self._max_bytes

    def find(self, key: bytes) -> Spill | None:
        """Return the READY spill of ``key`` and note its use."""
        spill = self._by_key.get(key)
        if spill is None or spill.state is not _READY:
            return None
        self._by_generation.move_to_end(spill.generation)
        return spill

    def at(self, slot: int) -> Spill | None:
        """Return the spill of that number."""
        return self._slots[slot - self._first] if self._first <= slot < self._first + len(self._slots) else None

    def of_generation(self, generation: int) -> Spill | None:
        """Return the spill of that generation, as an address names it."""
        return self._by_generation.get(generation)

    def grant(self, key: bytes, meta: bytes, tensor_len: int, epoch: bytes, generation: int) -> Spill | None:
        """Make room for an item, evicting what has to go; ``None``, and nothing is evicted, where there is none.

        Also ``None`` where the key has a spill already, or where the name of its segment would be taken.
        """
        if not self.fits(len(meta), tensor_len, 0):
            return None
        geometry = _plan(len(meta), tensor_len)
        if key in self._by_key or any(spill.epoch[:4] == epoch[:4] for spill in self):
            return None
        if not self._make_room(geometry.total_size):
            return None
        index = self._free.pop()
        length = align(len(meta)) + tensor_len
        record = Record(State.GRANTED, self._first + index, generation, geometry.arena_offset, len(meta), length, key)
        spill = Spill(record, geometry, epoch, meta)
        self._slots[index] = self._by_key[key] = self._by_generation[generation] = spill
        self._bytes += spill.extent
        return spill

    def publish(self, spill: Spill) -> None:
        """The segment is filled: make it findable."""
        spill.state = _READY
        self._made += 1

    def retire(self, key: bytes) -> bool:
        """Make the READY spill of ``key`` unfindable; it goes when nobody holds it. Return whether there was one."""
        spill = self._by_key.get(key)
        if spill is None or spill.state is not _READY:
            return False
        del self._by_key[key]
        spill.state = State.RETIRED
        self.let_go(spill)
        return True

    def let_go(self, spill: Spill) -> None:
        """Note that a hold of ``spill`` has ended."""
        if spill.state is State.RETIRED and not spill.pins and not spill.leases:
            self.drop(spill)

    def drop(self, spill: Spill) -> None:
        """Forget a spill that nobody holds or fills; its segment goes."""
        self._slots[spill.slot - self._first] = None
        self._free.append(spill.slot - self._first)
        del self._by_generation[spill.generation]
        if spill.state is not State.RETIRED:
            del self._by_key[spill.key]
        self._bytes -= spill.extent
        self._removed.append(spill.epoch)

    def take_removed(self) -> tuple[bytes, ...]:
        """Return and forget the epochs of the segments that have ended since the last call."""
        removed = tuple(self._removed)
        self._removed.clear()
        return removed

    def stats(self) -> SpillStats:
        """Return a snapshot."""
        filling = sum(spill.state is State.GRANTED for spill in self)
        return SpillStats(len(self._by_generation), self._bytes, filling, self._made)

    def validate(self) -> None:
        """Check every invariant.

        Raises
        ------
        AssertionError
            One is broken; the message says which.
        """
        spills = list(self)
        numbered = {self._first + index: spill for index, spill in enumerate(self._slots) if spill is not None}
        assert numbered == {spill.slot: spill for spill in spills}, "the indices of spills differ"
        assert all(generation == spill.generation for generation, spill in self._by_generation.items()), (
            "a generation finds another spill"
        )
        free = {index for index, spill in enumerate(self._slots) if spill is None}
        assert sorted(self._free) == sorted(free), "the list of free numbers of spills is wrong"
        findable = {spill.key: spill for spill in spills if spill.state is not State.RETIRED}
        assert findable == self._by_key, "a key finds another spill"
        assert sum(spill.extent for spill in spills) == self._bytes <= self._max_bytes, "spills have too many bytes"
        assert len({spill.epoch[:4] for spill in spills}) == len(spills), "two spills have the same name"
        for spill in spills:
            held = spill.pins + spill.leases > 0
            assert not (held and spill.state is State.GRANTED), f"spill {spill.slot} is held before it is published"
            assert held or spill.state is not State.RETIRED, f"spill {spill.slot} was removed and is still there"

    def _make_room(self, need: int) -> bool:
        """Evict what has to go for ``need`` bytes and a number, the least recently used first."""
        victims: list[Spill] = []
        excess = self._bytes + need - self._max_bytes
        for spill in self:
            if excess <= 0 and (self._free or victims):
                break
            if spill.idle:
                victims.append(spill)
                excess -= spill.extent
        if excess > 0 or not (self._free or victims):
            return False
        for spill in victims:
            self.drop(spill)
        return True


def _plan(meta_len: int, tensor_len: int) -> Geometry:
    return Geometry.plan(align(meta_len) + tensor_len, 1)
