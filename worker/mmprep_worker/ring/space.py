"""The ring's room: extents and slots together, who may be evicted for whom, and what the directory has to say.

Everything that takes or frees an extent takes or frees its slot here, and queues the record that says so. Rules:

* Only *idle* entries, READY and held by nobody, are evicted.
* ``make_room`` evicts nothing when it finds nothing.
* A failing sweep over all blocks is expensive, so it is not repeated: too few idle bytes, or nothing let go since the
  last failure for as many bytes, are known without one.
"""

from __future__ import annotations

import math

from mmprep.arena import Arena, Verdict
from mmprep.layout import Geometry, pack_free, pack_record
from mmprep_worker.ring.directory import Directory, Entry
from mmprep_worker.ring.policy import Policy


class Space:
    """Arena and directory in step.

    Parameters
    ----------
    geometry:
        Of the segment. Offsets here are absolute in it.
    policy:
        Which idle entries are passed over once.
    """

    __slots__ = (
        "_arena",
        "_at",
        "_base",
        "_hopeless",
        "_idle",
        "_idle_bytes",
        "_policy",
        "_writes",
        "directory",
        "evictions",
    )

    def __init__(self, geometry: Geometry, policy: Policy) -> None:
        self.directory = Directory(geometry.slots)
        #: Entries evicted since the start.
        self.evictions = 0
        self._policy = policy
        self._arena = Arena(geometry.arena_capacity)
        self._base = geometry.arena_offset
        # Offset in the arena to the entry there.
        self._at: dict[int, Entry] = {}
        self._writes: list[tuple[int, bytes]] = []
        self._idle = 0
        self._idle_bytes = 0
        # No run of this many bytes was found, and nothing was let go since.
        self._hopeless: float = math.inf

    @property
    def free_bytes(self) -> int:
        """Bytes in no extent."""
        return self._arena.free_bytes

    def make_room(self, need: int) -> tuple[int, int, int] | None:
        """Find an extent and a slot; :meth:`occupy` has to follow.

        Parameters
        ----------
        need:
            Bytes, a multiple of the alignment.

        Returns
        -------
        tuple or None
            ``(offset, slot, evicted entries)``; ``None``: what is held leaves no room.
        """
        if need >= self._hopeless or need > self._arena.free_bytes + self._idle_bytes:
            return None
        if self.directory.full and not self._idle:
            return None
        allocation = self._arena.allocate(need, self._verdict_at)
        if allocation is None:
            self._hopeless = need
            return None
        evicted = len(allocation.evicted)
        for offset in allocation.evicted:
            self._evict(self._at.pop(offset))
        if self.directory.full:
            # The arena evicted nothing, so an idle entry is left to be found.
            victim = self.directory.victim(self._verdict)
            assert victim is not None, "the directory's hand missed an idle entry"
            del self._at[victim.offset - self._base]
            self._arena.free(victim.offset - self._base)
            self._evict(victim)
            evicted = 1
        self.evictions += evicted
        return self._base + allocation.offset, self.directory.free_slot(), evicted

    def occupy(self, entry: Entry) -> None:
        """Enter a granted entry where :meth:`make_room` said."""
        self.directory.add(entry)
        self._at[entry.offset - self._base] = entry
        self.record(entry)

    def restore(self, entries: list[Entry], dropped: list[int]) -> None:
        """Enter the entries of an earlier writer, in the order of addresses, and invalidate the slots ``dropped``.

        The hand goes on where that writer's stood: behind the newest entry.
        """
        self._writes.extend((slot, pack_free(slot)) for slot in dropped)
        self.directory.restore(entries)
        for entry in entries:
            self._arena.insert(entry.offset - self._base, entry.length)
            self._at[entry.offset - self._base] = entry
            if entry.idle:
                self.let_go(entry)
        if entries:
            newest = max(entries, key=lambda entry: entry.generation)
            self._arena.point_behind(newest.offset - self._base)

    def free(self, entry: Entry) -> None:
        """Give back the extent and the slot of an entry that is not idle and that nobody holds."""
        del self._at[entry.offset - self._base]
        self._arena.free(entry.offset - self._base)
        self._hopeless = math.inf
        self._forget(entry)

    def let_go(self, entry: Entry) -> None:
        """Note that ``entry`` is idle now."""
        self._idle += 1
        self._idle_bytes += entry.extent
        self._hopeless = math.inf

    def hold(self, entry: Entry) -> None:
        """Note that ``entry`` is no longer idle."""
        self._idle -= 1
        self._idle_bytes -= entry.extent

    def record(self, entry: Entry) -> None:
        """Queue the record of ``entry`` as it is now."""
        self._writes.append((entry.slot, pack_record(entry.record())))

    def take_writes(self) -> tuple[tuple[int, bytes], ...]:
        """Return and forget the queued records, in order: ``(slot, 128 bytes)``."""
        if not self._writes:
            return ()
        writes = tuple(self._writes)
        self._writes.clear()
        return writes

    def validate(self) -> None:
        """Check every invariant, of arena and directory too.

        Raises
        ------
        AssertionError
            One is broken; the message says which.
        """
        self._arena.validate()
        self.directory.validate()
        entries = {entry.offset - self._base: entry for entry in self.directory}
        assert entries == self._at, "the index by address differs from the directory"
        extents = {offset: entry.extent for offset, entry in entries.items()}
        assert extents == dict(self._arena.extents()), "the entries' extents differ from the arena's"
        idle = [entry.extent for entry in entries.values() if entry.idle]
        assert (self._idle, self._idle_bytes) == (len(idle), sum(idle)), "the idle entries are miscounted"

    def _verdict_at(self, offset: int) -> Verdict:
        return self._verdict(self._at[offset])

    def _verdict(self, entry: Entry) -> Verdict:
        if not entry.idle:
            return Verdict.KEEP
        return Verdict.SPARE if self._policy.spare(entry.slot) else Verdict.EVICT

    def _evict(self, entry: Entry) -> None:
        """Forget an idle entry whose extent is gone already."""
        self.hold(entry)
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        self.directory.drop(entry)
        self._policy.forgotten(entry.slot)
        self._writes.append((entry.slot, pack_free(entry.slot)))
