"""A tiny ring, two backends, requests that pin, and a writer that may die between any two writes of the directory.

Five units of 64 bytes, three slots, three keys, two leases a backend. The reference knows the memory as the
generation that wrote each unit last, what the writer promised to whom, and what each backend believes to hold. A view is
read through at any time for as long as its backend believes in it; whoever copies is safe where, whenever a record can
be read, the memory behind it is its generation's: a generation never comes again, so it was so between two looks, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest

from mmprep.errors import Busy, StaleAddress
from mmprep.layout import PAGE, RECORD_SIZE, Geometry, State, pack_free, unpack_record
from mmprep_worker.ring.policy import Clock
from mmprep_worker.ring.ring import Ring

UNIT, UNITS, SLOTS = 64, 5, 3
GEOMETRY = Geometry(2 * PAGE + UNITS * UNIT, SLOTS, PAGE, 2 * PAGE, UNITS * UNIT)
LARGEST = GEOMETRY.arena_capacity // 4
#: Bytes of the tensors of an item of one unit, and of one of two.
LENGTHS = {1: UNIT, 2: LARGEST}
KEYS = [bytes([number]) * 32 for number in range(1, SLOTS + 1)]
OWNERS = ("engine-0", "engine-1")
HOLDERS = ("call-0", "call-1")
LEASES = 2
LEASE_SECONDS = 1
#: One overdue view of one unit is tolerated.
QUOTA = UNIT
READABLE = (State.READY, State.RETIRED)

_unpack = lru_cache(maxsize=4096)(unpack_record)


@dataclass
class Known:
    slot: int
    units: range
    key: bytes
    state: State


@dataclass
class Held:
    generation: int
    kind: str
    deadline: int
    overdue: bool = False


def _id(owner: str, number: int) -> bytes:
    return bytes([OWNERS.index(owner), number]) * 8


class RingWorld:
    def __init__(self, *, keys=3, owners=2):
        self.keys, self.owners = KEYS[:keys], OWNERS[:owners]
        self.incarnation = 1
        self.ring = self._new_ring()
        self.image = bytearray(b"".join(pack_free(slot) for slot in range(SLOTS)))
        self.memory = [0] * UNITS
        self.now = 0
        self.newest = 0
        self.settled = True
        self.entries: dict[int, Known] = {}  # by generation
        self.pins: dict[str, int] = {}
        self.leases: dict[tuple[str, int], Held] = {}  # the writer's
        self.believed: dict[tuple[str, int], tuple[int, str]] = {}  # the backends': generation and kind

    def _new_ring(self):
        return Ring(GEOMETRY, self.incarnation, Clock(SLOTS), LARGEST, overdue_quota=QUOTA)

    # --- events ---------------------------------------------------------------------------------------------------

    def events(self):
        found = [("crash",), *self._events_of_keys(), *self._events_of_entries(), *self._events_of_leases()]
        found += [("unpin", holder) for holder in self.pins]
        if any(held.deadline <= self.now and not held.overdue for held in self.leases.values()):
            found.append(("tick",))
        elif any(not held.overdue for held in self.leases.values()):
            found.append(("wait",))
        if sum(entry.state is State.READY for entry in self.entries.values()) > 1:
            found.append(("clear",))
        if not self.settled and self.believed.keys() <= self.leases.keys():
            found.append(("settle",))
        return found

    def _events_of_keys(self):
        # Keys that no entry has are alike.
        named = {entry.key for entry in self.entries.values()}
        fresh = [key for key in self.keys if key not in named][:1]
        for key in [*sorted(named), *fresh]:
            entry = self._by_key(key)
            if entry is None:
                yield from (("grant", key[0], size) for size in LENGTHS)
            elif self.entries[entry].state is State.READY:
                yield ("remove", key[0])
                if len(self.pins) < len(HOLDERS):
                    yield ("hit", key[0])

    def _events_of_entries(self):
        owners = [owner for owner in self.owners if self._free_id(owner) < LEASES]
        for generation, entry in self.entries.items():
            if entry.state is State.GRANTED:
                yield from (("publish", generation), ("abort", generation))
            else:
                yield from (("deliver", owner, generation, kind) for owner in owners for kind in ("copy", "view"))

    def _events_of_leases(self):
        yield from (("owner_gone", owner) for owner in sorted({owner for owner, _ in self.believed}))
        for lease in sorted(self.believed):
            yield ("release", *lease)
            if lease in self.leases or self.settled:
                yield from (("renew", *lease), ("change", *lease))
            else:
                yield ("reassert", *lease)

    def apply(self, event):
        cut = None
        if event[0] == "crash within":
            _, cut, *rest = event
            event = tuple(rest)
        self.writes = ()
        before = dict(self.entries)
        getattr(self, "do_" + event[0])(*event[1:])
        self.writes += self.ring.take_writes()
        self._write(self.writes[:cut], before)
        if cut is not None:
            self.do_crash()
            self._write(self.ring.take_writes(), {})
            return []
        return [("crash within", number, *event) for number in range(1, len(self.writes))]

    def do_grant(self, number, size):
        key = KEYS[number - 1]
        protected = {unit for generation in self._protected() for unit in self.entries[generation].units}
        slots = {self.entries[generation].slot for generation in self._protected()}
        grant = self.ring.grant(key, 0, LENGTHS[size])
        possible = self.settled and self._room(size)
        assert (grant is not None) == possible, "a grant is refused exactly when what is held leaves no room"
        if grant is None:
            assert not self.ring.take_writes(), "a refused grant changed the directory"
            return
        assert grant.generation > self.newest, "generations strictly rise"
        self.newest = grant.generation
        first = (grant.offset - GEOMETRY.arena_offset) // UNIT
        units = range(first, first + size)
        assert not protected.intersection(units), "an extent that is held or granted was granted again"
        assert grant.slot not in slots, "a slot that is held or granted was granted again"
        self.writes = self.ring.take_writes()
        assert self.writes[-1][0] == grant.slot, "the grant is recorded last"
        gone = [slot for slot, _ in self.writes[:-1]]
        assert grant.evicted == len(gone)
        self.entries = {gen: entry for gen, entry in self.entries.items() if entry.slot not in gone}
        self.entries[grant.generation] = Known(grant.slot, units, key, State.GRANTED)

    def do_publish(self, generation):
        entry = self.entries[generation]
        assert self.ring.publish(entry.slot, generation).key == entry.key
        self.entries[generation] = Known(entry.slot, entry.units, entry.key, State.READY)

    def do_abort(self, generation):
        self.ring.abort(self.entries.pop(generation).slot, generation)

    def do_hit(self, number):
        generation = self._by_key(KEYS[number - 1])
        found = self.ring.lookup(KEYS[number - 1])
        assert found is not None
        assert found.generation == generation
        holder = next(holder for holder in HOLDERS if holder not in self.pins)
        self.ring.pin(holder, found.slot)
        self.pins[holder] = generation

    def do_unpin(self, holder):
        assert self.ring.unpin(holder) == 1
        self._ended([self.pins.pop(holder)])

    def do_deliver(self, owner, generation, kind):
        entry = self.entries[generation]
        lease = (owner, self._free_id(owner))
        self._lease(lease, generation, kind, entry.slot)

    def do_reassert(self, owner, number):
        generation, kind = self.believed[owner, number]
        entry = self.entries.get(generation)
        if entry is None:
            assert kind == "copy", "the extent of a view was lost in a restart"
            self._refuse_stale(owner, number, generation)
            del self.believed[owner, number]
        else:
            self._lease((owner, number), generation, kind, entry.slot)

    def do_renew(self, owner, number):
        held = self.leases.get((owner, number))
        answer = self.ring.renew(owner, [_id(owner, number)], self.now, LEASE_SECONDS)
        assert answer == {_id(owner, number): held is not None}
        if held is None:
            self._lost(owner, number)
        else:
            held.deadline, held.overdue = max(held.deadline, self.now + LEASE_SECONDS), False

    def do_change(self, owner, number):
        """Make a copy a view, or a view a copy."""
        held = self.leases.get((owner, number))
        kind = "copy" if self.believed[owner, number][1] == "view" else "view"
        try:
            changed = self.ring.upgrade(owner, _id(owner, number), kind)
        except Busy:
            assert kind == "view"
            assert self._above_quota(owner)
            return
        assert changed == (held is not None)
        if held is None:
            self._lost(owner, number)
            return
        assert kind == "copy" or not self._above_quota(owner)
        held.kind = kind
        held.overdue = held.overdue and kind == "view"
        self.believed[owner, number] = (held.generation, kind)

    def do_release(self, owner, number):
        held = self.leases.pop((owner, number), None)
        assert self.ring.release(owner, [_id(owner, number)]) == ([_id(owner, number)] if held is None else [])
        del self.believed[owner, number]
        if held is not None:
            self._ended([held.generation])

    def do_owner_gone(self, owner):
        ended = [lease for lease in self.leases if lease[0] == owner]
        assert self.ring.owner_gone(owner) == len(ended)
        for lease in [lease for lease in self.believed if lease[0] == owner]:
            del self.believed[lease]
        self._ended([self.leases.pop(lease).generation for lease in ended])

    def do_wait(self):
        self.now += 1

    def do_tick(self):
        late = {lease for lease, held in self.leases.items() if held.deadline <= self.now}
        copies = [lease for lease in late if self.leases[lease].kind == "copy"]
        assert {lease.lease_id for lease in self.ring.tick(self.now)} == {_id(*lease) for lease in copies}
        for lease in late:
            self.leases[lease].overdue = True
        # Who had them does not know it yet.
        self._ended([self.leases.pop(lease).generation for lease in copies])

    def do_remove(self, number):
        generation = self._by_key(KEYS[number - 1])
        assert self.ring.remove(KEYS[number - 1])
        self._removed([generation])

    def do_clear(self):
        ready = [generation for generation, entry in self.entries.items() if entry.state is State.READY]
        assert self.ring.clear() == len(ready)
        self._removed(ready)

    def do_crash(self):
        """The writer dies, the lanes are ended, and the next writer takes over the directory."""
        self.incarnation += 1
        self.ring = self._new_ring()
        self.ring.restore(self.image)
        self.settled = False
        self.pins, self.leases = {}, {}
        self.entries = {record.generation: _known(record) for record in self._records() if record.state in READABLE}

    def do_settle(self):
        self.ring.settle()
        self.settled = True
        self._ended(list(self.entries))

    # --- what events have in common -------------------------------------------------------------------------------

    def _lease(self, lease, generation, kind, slot):
        owner = lease[0]
        refused = self._above_quota(owner)
        try:
            self.ring.deliver(_id(*lease), owner, slot, generation, kind, now=self.now, seconds=LEASE_SECONDS)
        except Busy:
            assert refused
            return
        assert not refused
        self.leases[lease] = Held(generation, kind, self.now + LEASE_SECONDS)
        self.believed[lease] = (generation, kind)

    def _lost(self, owner, number):
        assert self.believed.pop((owner, number))[1] == "copy", "a view was lost while its backend lives"

    def _refuse_stale(self, owner, number, generation):
        for slot in range(-1, SLOTS + 1):
            with pytest.raises(StaleAddress):
                self.ring.deliver(_id(owner, number), owner, slot, generation, "copy", now=self.now, seconds=1)

    def _ended(self, generations):
        """Holds have ended: what was removed from the cache is freed with the last one."""
        held = self._held()
        for generation in set(generations):
            retired = self.entries[generation].state is State.RETIRED
            if retired and generation not in held and self.settled:
                del self.entries[generation]

    def _removed(self, generations):
        for generation in generations:
            entry = self.entries[generation]
            self.entries[generation] = Known(entry.slot, entry.units, entry.key, State.RETIRED)
        self._ended(generations)

    def _held(self):
        return {*self.pins.values(), *(held.generation for held in self.leases.values())}

    def _protected(self):
        """Return the generations whose extents nobody may be granted."""
        granted = {generation for generation, entry in self.entries.items() if entry.state is State.GRANTED}
        return granted | self._held() | {generation for generation, kind in self.believed.values() if kind == "view"}

    def _by_key(self, key):
        found = [g for g, entry in self.entries.items() if entry.key == key and entry.state is not State.RETIRED]
        assert len(found) <= 1, "two entries have one key"
        return found[0] if found else None

    def _free_id(self, owner):
        return next(n for n in range(LEASES + 1) if (owner, n) not in self.leases and (owner, n) not in self.believed)

    def _above_quota(self, owner):
        late = [held.generation for (name, _), held in self.leases.items() if name == owner and held.overdue]
        return sum(UNIT * len(self.entries[generation].units) for generation in late) > QUOTA

    def _room(self, size):
        held = self._held()
        fixed = [e for g, e in self.entries.items() if g in held or e.state is not State.READY]
        taken = {unit for entry in fixed for unit in entry.units}
        runs = [range(first, first + size) for first in range(UNITS - size + 1)]
        return len(fixed) < SLOTS and any(taken.isdisjoint(run) for run in runs)

    # --- the segment ----------------------------------------------------------------------------------------------

    def _write(self, writes, before):
        for slot, record in writes:
            self.image[slot * RECORD_SIZE : (slot + 1) * RECORD_SIZE] = record
            self._check_image()
            seen = _unpack(bytes(record), slot, GEOMETRY)
            # The worst lane: it writes over all of the extent as soon as the grant is recorded.
            if seen is not None and seen.state is State.GRANTED and seen.generation not in before:
                for unit in _known(seen).units:
                    self.memory[unit] = seen.generation
                self._check_image()

    def _records(self):
        parts = [bytes(self.image[slot * RECORD_SIZE : (slot + 1) * RECORD_SIZE]) for slot in range(SLOTS)]
        return [seen for slot, part in enumerate(parts) if (seen := _unpack(part, slot, GEOMETRY)) is not None]

    def _check_image(self):
        """Check what a reader, or the next writer, could see at this moment."""
        taken: set[int] = set()
        keys: set[bytes] = set()
        for record in self._records():
            units = _known(record).units
            assert taken.isdisjoint(units), "the directory shows extents that overlap"
            taken.update(units)
            if record.state is not State.RETIRED:
                assert record.key not in keys, "the directory shows a key twice"
                keys.add(record.key)
            if record.state in READABLE:
                assert {self.memory[unit] for unit in units} == {record.generation}, "a record shows others' bytes"

    # --- what always holds ----------------------------------------------------------------------------------------

    def check(self):
        self.ring.validate()
        seen = {record.generation: _known(record) for record in self._records()}
        assert seen == self.entries, "the directory differs from what the reference knows"
        readable = {generation for generation, entry in seen.items() if entry.state in READABLE}
        assert self._held() <= readable, "what is held cannot be read"
        views = {generation for generation, kind in self.believed.values() if kind == "view"}
        assert views <= readable, "a view is read whose entry is gone"
        assert self.ring.holders == set(self.pins)
        held = {(lease.owner, lease.lease_id): lease for lease in self.ring.leases}
        assert held.keys() == {(owner, _id(owner, number)) for owner, number in self.leases}
        for (owner, number), known in self.leases.items():
            lease = held[owner, _id(owner, number)]
            slot = self.entries[known.generation].slot
            found = (lease.slot, lease.kind, lease.deadline, lease.overdue)
            assert found == (slot, known.kind, known.deadline, known.overdue), "a lease is not as it was promised"
        stats = self.ring.stats()
        assert stats.free + stats.ready + stats.leased + stats.filling == stats.capacity, "the bytes do not add up"
        assert stats.free == UNIT * (UNITS - sum(len(entry.units) for entry in seen.values()))

    def canonical(self):
        space = self.ring._space
        arena, directory = space._arena, space.directory
        blocks, hand, block = [], None, arena._first
        for position in range(arena._blocks):
            hand = position if block is arena._hand else hand
            blocks.append((block.free, block.length))
            block = block.next
        names: dict[bytes, int] = {}
        slots = tuple(
            None
            if entry is None
            else (entry.state.value, entry.offset, entry.length, names.setdefault(entry.key, len(names)))
            for entry in directory._slots
        )
        return (
            (self.settled, tuple(blocks), hand, slots, tuple(directory._free), directory._hand),
            (bytes(space._policy._used), space._hopeless, tuple(sorted(map(self._place, self.pins.values())))),
            tuple(sorted(map(self._canonical_owner, self.owners))),
        )

    def _canonical_owner(self, owner):
        """Return what an owner holds; owners are alike, and so are an owner's leases."""
        queued = {lease.lease_id: due for due, _, lease in self.ring.leases._heap if lease.live}
        found = []
        for name in self.leases.keys() | self.believed.keys():
            if name[0] != owner:
                continue
            held, believed = self.leases.get(name), self.believed.get(name)
            lease = None
            if held is not None:
                due, seen = held.deadline - self.now, queued.get(_id(*name), self.now) - self.now
                lease = (self._place(held.generation), held.kind, max(due, 0), max(seen, 0), held.overdue)
            found.append((repr(lease), repr(believed and (self._place(believed[0]), believed[1]))))
        return tuple(sorted(found))

    def _place(self, generation):
        """Name an entry by its slot; those that are gone are alike."""
        return self.entries[generation].slot if generation in self.entries else -1

    # --- what must be refused, and the end ------------------------------------------------------------------------

    def probe(self):
        before = self.canonical()
        self._probe_grants()
        self._probe_leases()
        assert not self.ring.take_writes(), "what was refused changed the directory"
        self.check()
        assert self.canonical() == before, "what was refused changed something"
        self._wind_up()

    def _probe_grants(self):
        for generation, entry in self.entries.items():
            wrong = [(entry.slot, generation + 1), (entry.slot - SLOTS, generation), (SLOTS, generation)]
            if entry.state is not State.GRANTED:
                wrong.append((entry.slot, generation))
                if entry.state is State.READY:
                    with pytest.raises(ValueError, match="in the ring already"):
                        self.ring.grant(entry.key, 0, UNIT)
            else:
                assert self.ring.lookup(entry.key) is None, "a grant was found by its key"
                assert not self.ring.remove(entry.key)
                with pytest.raises(StaleAddress):
                    self.ring.pin("stranger", entry.slot)
                self._refuse_stale(OWNERS[0], LEASES, generation)
            for slot, number in wrong:
                with pytest.raises(StaleAddress):
                    self.ring.publish(slot, number)
                with pytest.raises(StaleAddress):
                    self.ring.abort(slot, number)
            if generation - 1 not in self.entries:
                self._refuse_stale(OWNERS[0], LEASES, generation - 1)
        assert self.ring.unpin("stranger") == 0

    def _probe_leases(self):
        strangers = [_id(OWNERS[0], LEASES), b"\xff" * 16, b"", b"short"]
        for owner in (*OWNERS, "stranger"):
            others = strangers + [_id(*lease) for lease in self.leases if lease[0] != owner]
            assert not any(self.ring.renew(owner, others, self.now, 99).values())
            assert self.ring.release(owner, others) == others
            assert not any(self.ring.upgrade(owner, other, kind) for other in others for kind in ("copy", "view"))
        assert self.ring.owner_gone("stranger") == 0
        for (owner, number), held in self.leases.items():
            if held.deadline > self.now:
                assert self.ring.renew(owner, [_id(owner, number)], self.now, LEASE_SECONDS / 2)
        for (owner, number), held in self.leases.items():
            slot = self.entries[held.generation].slot
            for other in ("stranger", *OWNERS):
                kind = held.kind if other != owner else ("copy" if held.kind == "view" else "view")
                with pytest.raises(ValueError, match="taken by another"):
                    self.ring.deliver(
                        _id(owner, number), other, slot, held.generation, kind, now=self.now, seconds=LEASE_SECONDS
                    )

    def _wind_up(self):
        """Everyone lets go: nothing is left, and the whole ring can be granted again."""
        for owner in OWNERS:
            self.ring.owner_gone(owner)
        for holder in HOLDERS:
            self.ring.unpin(holder)
        for generation, entry in self.entries.items():
            if entry.state is State.GRANTED:
                self.ring.abort(entry.slot, generation)
        self.ring.settle()
        self.ring.clear()
        self.ring.validate()
        stats = self.ring.stats()
        assert (stats.free, stats.slots_used, stats.leases) == (GEOMETRY.arena_capacity, 0, 0), "something leaked"
        self.memory = [0] * UNITS
        sizes = [2, 2, 1]
        for key, size in zip(KEYS, sizes, strict=True):
            assert self.ring.grant(key, 0, LENGTHS[size]) is not None, "the emptied ring cannot be filled"
        self.ring.validate()


def _known(record):
    first = (record.offset - GEOMETRY.arena_offset) // UNIT
    return Known(record.slot, range(first, first + -(-record.length // UNIT)), record.key, record.state)
