"""The ring's state: what is in the segment, who holds it, and what may go.

A life: ``grant`` (GRANTED: a lane fills it) → ``publish`` (READY: found by key) → evicted by a later grant; or → ``remove``
while held (RETIRED: readable by address only) → freed when the last hold ends. Rules:

* An extent that is granted, pinned or leased is never granted again. A granted one may still be written to: it ends
  by ``publish``, or by ``abort`` when its filler surely writes no more.
* Generations strictly rise, whatever happens in between.
* An item that the ring does not take may get a *spill*, a segment of its own (:mod:`.spills`). It is looked up, pinned and
  leased like any entry, under a slot above those of the ring; its end comes out of :meth:`Ring.take_removed`.
* Every change of the directory comes out of :meth:`Ring.take_writes`, in the promised order: the victims' records are
  invalidated before the grant is recorded, the grant before anything is filled.

WARNING: whoever drives the ring applies ``take_writes()`` to the segment after each call that may grant, publish, free or
remove, and before it tells anybody the result. Applied in order, every prefix of them is a directory that
:meth:`Ring.restore` can start from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from mmprep import layout
from mmprep.errors import Busy, StaleAddress, TooLarge
from mmprep.items import ALIGNMENT, align
from mmprep.layout import KEY_SIZE, RECORD_SIZE, Buffer, Geometry, Record, State
from mmprep_worker.ring.directory import Entry
from mmprep_worker.ring.leases import Kind, Lease, Leases
from mmprep_worker.ring.policy import Policy
from mmprep_worker.ring.recovery import survivors
from mmprep_worker.ring.space import Space
from mmprep_worker.ring.spills import SLOT as SPILL_SLOT
from mmprep_worker.ring.spills import Spill, Spills, SpillStats

#: Segments beside the ring.
_MAX_SPILLS = 256

# As in the directory: a hit passes here.
_READY, _GRANTED = State.READY, State.GRANTED


class Grant(NamedTuple):
    """An extent to fill.

    Attributes
    ----------
    slot, generation: name the grant for ``publish`` and ``abort``.
    offset: of the extent, absolute in the segment; the metadata goes there.
    tensor_offset: where the tensors go, absolute in the segment.
    length: bytes to be used, from ``offset``.
    evicted: how many entries had to go.
    """

    slot: int
    generation: int
    offset: int
    tensor_offset: int
    length: int
    evicted: int


class RingStats(NamedTuple):
    """A snapshot. ``free + ready + leased + filling`` bytes are the capacity.

    Attributes
    ----------
    capacity, free, ready, leased, filling: bytes; an entry is *leased* while a backend has a lease on it, else *ready*.
    entries: published ones.
    evictions: since the start.
    slots, slots_used: of the directory.
    leases, overdue, revoked: live leases, views past their deadline, copies ended by time since the start.
    spills: what is beside the ring; no other number but those of leases counts it.
    """

    capacity: int
    free: int
    ready: int
    leased: int
    filling: int
    entries: int
    evictions: int
    slots: int
    slots_used: int
    leases: int
    overdue: int
    revoked: int
    spills: SpillStats


class Ring:
    """The state machine. ``now`` is monotonic seconds everywhere.

    Parameters
    ----------
    geometry:
        Of the segment.
    incarnation:
        Of this writer: higher than that of any writer before it in this segment.
    policy:
        Decides which unheld entries are passed over once.
    max_object_size:
        Bytes of the largest extent that is granted, at most a quarter of the arena.
    overdue_quota:
        Bytes of overdue view leases above which an owner gets no new ones; by default a quarter of the arena.
    spill_bytes:
        Of all segments beside the ring.

    Raises
    ------
    ValueError
        The incarnation or ``max_object_size`` is out of its range.
    """

    def __init__(
        self,
        geometry: Geometry,
        incarnation: int,
        policy: Policy,
        max_object_size: int,
        *,
        overdue_quota: int | None = None,
        spill_bytes: int = 0,
    ) -> None:
        if not ALIGNMENT <= max_object_size <= geometry.arena_capacity // 4:
            raise ValueError(
                f"the largest object has {ALIGNMENT} bytes to a quarter of the ring, not {max_object_size}"
            )
        self.geometry = geometry
        self.incarnation = incarnation
        self.max_object_size = max_object_size
        self.overdue_quota = geometry.arena_capacity // 4 if overdue_quota is None else overdue_quota
        #: To be read only; what changes leases goes through the ring.
        self.leases = Leases()
        self._policy = policy
        self._space = Space(geometry, policy)
        self._directory = self._space.directory
        self._spills = Spills(geometry.slots, spill_bytes, _MAX_SPILLS)
        self._pins: dict[str, list[Entry]] = {}
        self._counter = 0
        self._last_generation = layout.generation(incarnation, 0)
        self._leased_bytes = 0
        self._filling_bytes = 0
        self._filling = 0
        # False between `restore` and `settle`.
        self._settled = True

    # The life of an entry

    def lookup(self, key: bytes) -> Entry | None:
        """Return the READY entry of ``key`` and note its use. It may be evicted by the next grant unless it is pinned.

        One in the ring comes before a spill.
        """
        entry = self._directory.find(key)
        if entry is None or entry.state is not _READY:
            return self._spills.find(key)
        self._policy.touched(entry.slot)
        return entry

    def lookup_spill(self, key: bytes) -> Spill | None:
        """Return the READY spill of ``key`` and note its use, whatever the ring holds."""
        return self._spills.find(key)

    def in_ring(self, key: bytes) -> Entry | None:
        """Return the GRANTED or READY entry of ``key`` in the ring; no use is noted."""
        return self._directory.find(key)

    def grant(self, key: bytes, meta_len: int, tensor_len: int) -> Grant | None:
        """Make room for an item.

        Parameters
        ----------
        key:
            32 bytes, not in the ring.
        meta_len, tensor_len:
            Bytes of the packed metadata and of the tensor region.

        Returns
        -------
        Grant or None
            ``None``: the ring is full of what is held, or has not been settled after a restart. Nothing was evicted.

        Raises
        ------
        TooLarge
            The item is above ``max_object_size``.
        ValueError
            The key is granted or ready already, or is not 32 bytes, or a length is negative.
        """
        if len(key) != KEY_SIZE:
            raise ValueError(f"a key has {KEY_SIZE} bytes, not {len(key)}")
        if self._directory.find(key) is not None:
            raise ValueError("the key is in the ring already: granted, or ready")
        if meta_len < 0 or tensor_len < 0 or not meta_len + tensor_len:
            raise ValueError("an item's lengths are not negative and not both zero")
        length = align(meta_len) + tensor_len
        if length > self.max_object_size:
            raise TooLarge(
                f"the processed item has {length} bytes, above the limit of {self.max_object_size}: "
                "send a smaller medium, or raise --max-object-size"
            )
        room = self._space.make_room(align(length)) if self._settled else None
        if room is None:
            return None
        offset, slot, evicted = room
        self._counter += 1
        generation = self._last_generation = layout.generation(self.incarnation, self._counter)
        entry = Entry(Record(State.GRANTED, slot, generation, offset, meta_len, length, key))
        self._space.occupy(entry)
        self._filling += 1
        self._filling_bytes += entry.extent
        return Grant(slot, generation, offset, offset + align(meta_len), length, evicted)

    def publish(self, slot: int, generation: int) -> Entry:
        """Make a filled grant findable.

        Parameters
        ----------
        slot, generation:
            Slot and generation of the grant.

        Raises
        ------
        StaleAddress
            There is no such grant: it was aborted, or published before.
        """
        entry = self._granted(slot, generation)
        entry.state = State.READY
        self._filling -= 1
        self._filling_bytes -= entry.extent
        self._space.let_go(entry)
        self._space.record(entry)
        return entry

    def abort(self, slot: int, generation: int) -> None:
        """Free a grant. Only when its filler surely writes no more: it said so, or its exit is confirmed.

        Raises
        ------
        StaleAddress
            There is no such grant.
        """
        entry = self._granted(slot, generation)
        self._filling -= 1
        self._filling_bytes -= entry.extent
        self._space.free(entry)

    def grant_spill(self, key: bytes, meta: bytes, tensor_len: int, epoch: bytes) -> Spill | None:
        """Make room for an item beside the ring.

        Parameters
        ----------
        key:
            32 bytes.
        meta, tensor_len:
            The packed metadata, and the bytes of the tensor region.
        epoch:
            16 random bytes, of the new segment.

        Returns
        -------
        Spill or None
            ``None``: what is held leaves no room, the key has a spill already, or the name of the segment would be taken.
            Nothing was evicted.
        """
        generation = layout.generation(self.incarnation, self._counter + 1)
        spill = self._spills.grant(key, meta, tensor_len, epoch, generation)
        if spill is not None:
            self._counter += 1
            self._last_generation = generation
        return spill

    def publish_spill(self, spill: Spill) -> Spill:
        """Make a filled spill findable."""
        assert spill.state is _GRANTED, f"spill {spill.slot} is published twice"
        self._spills.publish(spill)
        return spill

    def abort_spill(self, spill: Spill) -> None:
        """Forget a granted spill, made or not. Only when its filler surely writes no more."""
        assert spill.state is _GRANTED, f"spill {spill.slot} is not being filled"
        self._spills.drop(spill)

    def could_spill(self, meta_len: int, tensor_len: int, *, beside: int = 0) -> bool:
        """Whether an item of that size could get a spill if there were nothing but ``beside`` bytes of spills."""
        return self._spills.fits(meta_len, tensor_len, beside)

    def take_removed(self) -> tuple[bytes, ...]:
        """Return the epochs of the spills that have ended since the last call: their segments are to be unlinked."""
        return self._spills.take_removed()

    @property
    def spills(self) -> Iterable[Spill]:
        """What is beside the ring; to be read only."""
        return self._spills

    def remove(self, key: bytes) -> bool:
        """Take a READY entry out of the cache; return whether there was one. Whoever holds it keeps it until he lets go.

        A granted entry is not in the cache yet: it stays, and this returns False.
        """
        retired = self._spills.retire(key)
        entry = self._directory.find(key)
        if entry is None or entry.state is not State.READY:
            return retired
        idle = entry.idle
        if idle:
            self._space.hold(entry)
        # Between `restore` and `settle` somebody may hold it who has not said so yet.
        if idle and self._settled:
            self._space.free(entry)
        else:
            self._directory.retire(entry)
            self._space.record(entry)
        return True

    def clear(self) -> int:
        """Remove every READY entry, as :meth:`remove` does; return how many."""
        ready = (e.key for entries in (self._directory, self._spills) for e in entries if e.state is State.READY)
        return sum(self.remove(key) for key in dict.fromkeys(ready))

    def in_slots(self, start: int, most: int) -> tuple[list[Entry], int]:
        """Return what is in the ``most`` slots from ``start`` on, spills too, and the next slot; 0: there is none."""
        slots = range(start, min(start + most, self._spills.end))
        found = (self._at(slot) for slot in slots)
        return [entry for entry in found if entry is not None], slots.stop if slots.stop < self._spills.end else 0

    def take_writes(self) -> tuple[tuple[int, bytes], ...]:
        """Return what is to be written into the directory since the last call: ``(slot, 128 bytes)``, in this order."""
        return self._space.take_writes()

    @property
    def settled(self) -> bool:
        """Whether extents are granted: not between :meth:`restore` and :meth:`settle`."""
        return self._settled

    def at(self, slot: int, generation: int) -> Entry | None:
        """Return the published entry in ``slot``, if it is of that generation; a spill's own slot is 0."""
        entry = self._directory.at(slot)
        if (entry is None or entry.generation != generation) and slot == SPILL_SLOT:
            entry = self._spills.of_generation(generation)
        return None if entry is None or entry.generation != generation or entry.state is _GRANTED else entry

    # Holds

    @property
    def holders(self) -> frozenset[str]:
        """Who pins something."""
        return frozenset(self._pins)

    def pin(self, holder: str, slot: int) -> None:
        """Hold the published entry in ``slot``; each pin counts.

        Parameters
        ----------
        holder:
            One request's call id, or a queue's job.

        Raises
        ------
        StaleAddress
            No published entry is there.
        """
        entry = self._at(slot)
        if entry is None or entry.state is _GRANTED:
            raise StaleAddress("the entry to pin is gone; ask for it again")
        if entry.idle and slot < self.geometry.slots:
            self._space.hold(entry)
        entry.pins += 1
        held = self._pins.get(holder)
        if held is None:
            self._pins[holder] = [entry]
        else:
            held.append(entry)

    def unpin(self, holder: str) -> int:
        """End all pins of ``holder``; return how many there were. An unknown holder has none."""
        held = self._pins.pop(holder, None)
        if held is None:
            return 0
        for entry in held:
            entry.pins -= 1
            self._let_go(entry)
        return len(held)

    def pinned_by(self, holder: str) -> tuple[Entry, ...]:
        """Return the entries that ``holder`` pins, one a pin."""
        return tuple(self._pins.get(holder, ()))

    def deliver(
        self,
        lease_id: bytes,
        owner: str,
        slot: int,
        generation: int,
        kind: Kind,
        *,
        now: float,
        seconds: float,
        again: bool = False,
    ) -> Entry:
        """Lease a published entry to a backend; repeated with the same id, it renews.

        Parameters
        ----------
        lease_id:
            16 random bytes.
        owner:
            The backend's registered id.
        slot, generation:
            Slot and generation of the entry, as an address names them: a spill's own slot is 0.
        kind:
            ``"copy"``: may be revoked when overdue. ``"view"``: never, while the owner lives.
        again:
            The backend has had this lease from an earlier writer: no quota refuses it.

        Raises
        ------
        StaleAddress
            The entry is not there any more.
        Busy
            The owner's overdue views are above the quota.
        ValueError
            As in :meth:`Leases.deliver`.
        """
        entry = self.at(slot, generation)
        if entry is None:
            raise StaleAddress("the leased entry is gone; ask for it again")
        if not again and self.leases.get(lease_id) is None and self.leases.quarantined(owner, self.overdue_quota):
            raise self._quarantine()
        if self.leases.deliver(lease_id, owner, entry.slot, entry.extent, kind, now=now, seconds=seconds):
            in_ring = entry.slot < self.geometry.slots
            if entry.idle and in_ring:
                self._space.hold(entry)
            entry.leases += 1
            if entry.leases == 1 and in_ring:
                self._leased_bytes += entry.extent
        return entry

    def renew(self, owner: str, ids: Iterable[bytes], now: float, seconds: float) -> dict[bytes, bool]:
        """Renew leases; see :meth:`Leases.renew`."""
        return self.leases.renew(owner, ids, now, seconds)

    def release(self, owner: str, ids: Iterable[bytes]) -> list[bytes]:
        """End leases of ``owner``; return the ids that are no live leases of its."""
        slots, unknown = self.leases.release(owner, ids)
        self._unlease(slots)
        return unknown

    def upgrade(self, owner: str, lease_id: bytes, kind: Kind, *, again: bool = False) -> bool:
        """Change a lease's kind; see :meth:`Leases.upgrade`. ``again`` as for :meth:`deliver`.

        Raises
        ------
        Busy
            A copy should become a view, and the owner's overdue views are above the quota.
        """
        lease = self.leases.get(lease_id)
        gains = lease is not None and lease.owner == owner and lease.kind == "copy" and kind == "view"
        if gains and not again and self.leases.quarantined(owner, self.overdue_quota):
            raise self._quarantine()
        return self.leases.upgrade(owner, lease_id, kind)

    def owner_gone(self, owner: str) -> int:
        """End every lease of a backend whose process lock has fallen; return how many."""
        slots = self.leases.owner_gone(owner)
        self._unlease(slots)
        return len(slots)

    def tick(self, now: float) -> list[Lease]:
        """Revoke the overdue copy leases and return them; ``leases.next_deadline()`` says when this has work again."""
        revoked = self.leases.tick(now)
        self._unlease([lease.slot for lease in revoked])
        return revoked

    # After a restart

    def restore(self, image: Buffer) -> int:
        """Take over the directory of an earlier writer; the ring must be new.

        Dropped are: what was not published, what fails its self-check or is not of an earlier incarnation, every
        extent that overlaps another (a granted one included), what has the generation of another, and of equal keys all
        but the newest. Hits are served at once. Nothing is granted until :meth:`settle`.

        Parameters
        ----------
        image:
            The directory, 128 bytes a slot.

        Returns
        -------
        int
            How many entries were kept.

        Raises
        ------
        ValueError
            The image's size differs from the geometry's.
        """
        if len(image) != self.geometry.slots * RECORD_SIZE:
            raise ValueError(
                f"a directory of {self.geometry.slots} slots has {self.geometry.slots * RECORD_SIZE} bytes"
            )
        assert not len(self._directory), "a ring that is in use cannot be restored"
        kept, dropped = survivors(image, self.geometry, layout.generation(self.incarnation, 0))
        entries = [Entry(record) for record in kept]
        self._space.restore(entries, dropped)
        self._settled = False
        return len(entries)

    def settle(self) -> None:
        """Grant again after :meth:`restore`: every living backend has re-asserted its leases.

        What had been removed from the cache, and nobody re-asserted, is freed.
        """
        self._settled = True
        for entry in list(self._directory):
            self._let_go_if_retired(entry)

    # What it says about itself

    def stats(self) -> RingStats:
        """Return a snapshot."""
        occupied = self.geometry.arena_capacity - self._space.free_bytes
        return RingStats(
            capacity=self.geometry.arena_capacity,
            free=self._space.free_bytes,
            ready=occupied - self._leased_bytes - self._filling_bytes,
            leased=self._leased_bytes,
            filling=self._filling_bytes,
            entries=len(self._directory) - self._filling,
            evictions=self._space.evictions,
            slots=self.geometry.slots,
            slots_used=len(self._directory),
            leases=len(self.leases),
            overdue=self.leases.overdue_count,
            revoked=self.leases.revoked_count,
            spills=self._spills.stats(),
        )

    def validate(self) -> None:
        """Check every invariant, of the parts too.

        Raises
        ------
        AssertionError
            One is broken; the message says which.
        """
        self._space.validate()
        self.leases.validate()
        self._spills.validate()
        entries = [*self._directory, *self._spills]
        generations = [entry.generation for entry in entries]
        assert len(set(generations)) == len(generations), "two entries have one generation"
        assert {lease.slot for lease in self.leases} <= {entry.slot for entry in entries}, "a lease is of no entry"
        pins = Counter(entry.slot for held in self._pins.values() for entry in held)
        leased = Counter(lease.slot for lease in self.leases)
        for entry in entries:
            assert entry.generation <= self._last_generation, f"slot {entry.slot} is newer than the last grant"
            assert entry.pins == pins[entry.slot], f"the pins of slot {entry.slot} are miscounted"
            assert entry.leases == leased[entry.slot], f"the leases of slot {entry.slot} are miscounted"
            held = entry.pins + entry.leases > 0
            assert not (held and entry.state is State.GRANTED), f"slot {entry.slot} is held before it is published"
            lingers = entry.state is State.RETIRED and not held and self._settled
            assert not lingers, f"slot {entry.slot} was removed, nobody holds it, and it is still there"
        assert all(self._pins.values()), "a holder without pins is remembered"
        entries = list(self._directory)
        filling = [entry.extent for entry in entries if entry.state is State.GRANTED]
        assert (self._filling, self._filling_bytes) == (len(filling), sum(filling)), "the grants are miscounted"
        assert self._leased_bytes == sum(e.extent for e in entries if e.leases), "the leased bytes are miscounted"

    def _granted(self, slot: int, generation: int) -> Entry:
        entry = self._directory.at(slot)
        if entry is None or entry.generation != generation or entry.state is not State.GRANTED:
            raise StaleAddress("the grant is gone: it was published or given back before")
        return entry

    def _unlease(self, slots: list[int]) -> None:
        for slot in slots:
            entry = self._at(slot)
            assert entry is not None, f"slot {slot} was freed under a lease"
            entry.leases -= 1
            if not entry.leases and slot < self.geometry.slots:
                self._leased_bytes -= entry.extent
            self._let_go(entry)

    def _at(self, slot: int) -> Entry | None:
        return self._directory.at(slot) if slot < self.geometry.slots else self._spills.at(slot)

    def _let_go(self, entry: Entry) -> None:
        """Note that a hold of ``entry`` has ended."""
        if isinstance(entry, Spill):
            self._spills.let_go(entry)
        elif entry.idle:
            self._space.let_go(entry)
        else:
            self._let_go_if_retired(entry)

    def _let_go_if_retired(self, entry: Entry) -> None:
        # Before all leases are re-asserted nobody knows whether this one was the last.
        if entry.state is State.RETIRED and not entry.pins and not entry.leases and self._settled:
            self._space.free(entry)

    def _quarantine(self) -> Busy:
        return Busy("this backend's overdue views are above its quota: renew or release them before asking for more")
