"""The ring against a model of the segment: a directory that takes the writes one by one, and painted memory.

Every 64-byte unit of the modelled memory holds the generation that was granted it last. Whoever may read or write an
extent must find his own generation there, whatever else happened. The writer crashes at any write.

Beside the ring are spills. The model knows which segments there would be: one from its grant until the ring says that it
is to go, and nobody may need one that has gone. A crash ends them all.
"""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.machines import at_length

from mmprep.errors import Busy, StaleAddress, TooLarge
from mmprep.layout import RECORD_SIZE, Geometry, State, pack_free, unpack_record
from mmprep_worker.ring.policy import Clock
from mmprep_worker.ring.ring import Ring

UNIT = 64
SLOTS = 9
GEOMETRY = Geometry.plan(4096, SLOTS)
LARGEST = GEOMETRY.arena_capacity // 4
QUOTA = 1024
OWNERS = ["engine-0", "engine-1"]
SPILL_BYTES = 45_000  # three small segments, or one large and one small

keys = st.integers(0, 13).map(lambda n: bytes([n]) * 32)
holders = st.sampled_from(["call-0", "call-1", "job-0"])
owners = st.sampled_from(OWNERS)
kinds = st.sampled_from(["copy", "view"])
ids = st.integers(0, 7).map(lambda n: bytes([n]) * 16)
meta = st.integers(0, 130)
spilled = st.sampled_from([10, 100, 10, 9_000, 20_000, 40_000])
tensors = st.one_of(st.integers(0, LARGEST + 64), st.integers(600, 900))


class Model:
    """One entry."""

    def __init__(self, grant, key):
        self.slot, self.generation, self.offset = grant.slot, grant.generation, grant.offset
        self.units = -(-grant.length // UNIT)
        self.key = key
        self.state = State.GRANTED
        self.pins = []

    def slot_for_readers(self):
        return self.slot

    def span(self):
        first = (self.offset - GEOMETRY.arena_offset) // UNIT
        return range(first, first + self.units)


class SpillModel:
    """One spill."""

    def __init__(self, spill, key, size):
        self.slot, self.generation, self.epoch = spill.slot, spill.generation, spill.epoch
        self.key = key
        self.size = size
        self.state = State.GRANTED
        self.pins = []

    def slot_for_readers(self):
        return 0


class RingMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.incarnation = 1
        self.ring = self.new_ring()
        self.image = bytearray(b"".join(pack_free(slot) for slot in range(SLOTS)))
        self.memory = [0] * (GEOMETRY.arena_capacity // UNIT)
        self.entries = {}  # slot: Model
        self.spills = {}  # slot: SpillModel, the least recently used first
        self.segments = set()  # epochs of the spills' segments
        self.leases = {}  # id: [owner, slot, kind, deadline]
        self.now = 0.0
        self.newest = 0

    def new_ring(self):
        return Ring(GEOMETRY, self.incarnation, Clock(SLOTS), LARGEST, overdue_quota=QUOTA, spill_bytes=SPILL_BYTES)

    # What the model knows

    def held(self, entry):
        return bool(entry.pins) or any(lease[1] == entry.slot for lease in self.leases.values())

    def fixed(self, entry):
        return entry.state is not State.READY or self.held(entry)

    def everything(self):
        return {**self.entries, **self.spills}

    def room_beside(self, size):
        held = sum(spill.size for spill in self.spills.values() if self.fixed(spill))
        return held + size <= SPILL_BYTES

    def spill_by_key(self, key):
        found = [spill for spill in self.spills.values() if spill.key == key and spill.state is not State.RETIRED]
        assert len(found) <= 1
        return found[0] if found else None

    def use(self, spill):
        self.spills[spill.slot] = self.spills.pop(spill.slot)

    def room_for(self, length):
        fixed = {unit for entry in self.entries.values() if self.fixed(entry) for unit in entry.span()}
        run = longest = 0
        for unit in range(len(self.memory)):
            run = 0 if unit in fixed else run + 1
            longest = max(longest, run)
        slot = len(self.entries) < SLOTS or any(not self.fixed(entry) for entry in self.entries.values())
        return slot and longest * UNIT >= length

    def by_key(self, key):
        found = [entry for entry in self.entries.values() if entry.key == key and entry.state is not State.RETIRED]
        assert len(found) <= 1
        return found[0] if found else None

    def records(self):
        parts = [self.image[slot * RECORD_SIZE :][:RECORD_SIZE] for slot in range(SLOTS)]
        return {slot: record for slot, part in enumerate(parts) if (record := unpack_record(part, slot, GEOMETRY))}

    def apply(self, writes):
        """Write records one by one; no moment may show two extents that overlap."""
        for slot, record in writes:
            self.image[slot * RECORD_SIZE : (slot + 1) * RECORD_SIZE] = record
            end = 0
            for seen in sorted(self.records().values(), key=lambda record: record.offset):
                assert seen.offset >= end, "the directory showed overlapping extents"
                end = seen.offset + seen.length

    def sync(self):
        self.apply(self.ring.take_writes())
        gone = self.ring.take_removed()
        assert len(set(gone)) == len(gone)
        assert set(gone) <= self.segments, "a segment is removed that is not there"
        self.segments -= set(gone)
        assert self.segments == {spill.epoch for spill in self.spills.values()}, "a segment leaks, or is missed"

    def prune(self, entry):
        """Forget a retired entry that nobody holds."""
        if entry.state is State.RETIRED and not self.held(entry):
            del (self.spills if isinstance(entry, SpillModel) else self.entries)[entry.slot]

    # Rules

    @rule(key=keys, meta_len=meta, tensor_len=tensors)
    def grant(self, key, meta_len, tensor_len):
        self.try_grant(key, meta_len, tensor_len, cut=None)

    def try_grant(self, key, meta_len, tensor_len, cut):
        """Ask for a grant; only the first ``cut`` of its writes reach the segment, and it is filled if all do."""
        length = -(-meta_len // UNIT) * UNIT + tensor_len
        if self.by_key(key) or not length:
            with pytest.raises(ValueError):
                self.ring.grant(key, meta_len, tensor_len)
            return
        if length > LARGEST:
            with pytest.raises(TooLarge, match="--max-object-size"):
                self.ring.grant(key, meta_len, tensor_len)
            return
        possible = self.room_for(length)
        grant = self.ring.grant(key, meta_len, tensor_len)
        assert (grant is not None) == possible, "a grant is refused exactly when what is held leaves no room"
        if grant is None:
            assert not self.ring.take_writes(), "a refused grant changed the directory"
            return
        assert grant.generation > self.newest, "generations strictly rise"
        self.newest = grant.generation
        assert (grant.length, grant.tensor_offset - grant.offset) == (length, length - tensor_len)
        writes = self.ring.take_writes()
        gone = [slot for slot, _ in writes[:-1]]
        assert writes[-1][0] == grant.slot, "the grant is recorded last"
        assert len(gone) == len(set(gone)) == grant.evicted
        for slot in gone:
            assert not self.fixed(self.entries[slot]), "something held was evicted"
        self.apply(writes[:cut])
        for slot in gone[:cut]:
            del self.entries[slot]
        if writes[:cut] == writes:
            entry = self.entries[grant.slot] = Model(grant, key)
            for unit in entry.span():
                self.memory[unit] = entry.generation

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), publish=st.booleans())
    def end_a_grant(self, data, publish):
        entry = self.entries[data.draw(st.sampled_from(sorted(self.entries)))]
        end = self.ring.publish if publish else self.ring.abort
        with pytest.raises(StaleAddress):
            end(entry.slot, entry.generation + 1)
        if entry.state is not State.GRANTED:
            with pytest.raises(StaleAddress):
                end(entry.slot, entry.generation)
            return
        end(entry.slot, entry.generation)
        self.sync()
        if publish:
            entry.state = State.READY
        else:
            del self.entries[entry.slot]

    @rule(key=keys, meta_len=meta, tensor_len=spilled, epoch=st.integers(0, 9).map(lambda n: bytes([n]) * 16))
    def grant_a_spill(self, key, meta_len, tensor_len, epoch):
        size = Geometry.plan(-(-meta_len // UNIT) * UNIT + tensor_len, 1).total_size
        possible = self.room_beside(size) and not self.spill_by_key(key) and epoch not in self.segments
        assert self.ring.could_spill(meta_len, tensor_len) == (size <= SPILL_BYTES)
        spill = self.ring.grant_spill(key, bytes(meta_len), tensor_len, epoch)
        assert (spill is not None) == possible, "a spill is refused exactly when what is held leaves no room"
        if spill is None:
            self.sync()
            return
        assert spill.generation > self.newest, "generations strictly rise, over ring and spills"
        self.newest = spill.generation
        while sum(other.size for other in self.spills.values()) + size > SPILL_BYTES:
            del self.spills[next(slot for slot, other in self.spills.items() if not self.fixed(other))]
        assert spill.slot >= SLOTS
        assert spill.slot not in self.spills
        self.spills[spill.slot] = SpillModel(spill, key, size)
        self.segments.add(epoch)
        self.sync()

    @precondition(lambda self: any(spill.state is State.GRANTED for spill in self.spills.values()))
    @rule(data=st.data(), publish=st.sampled_from([True, True, False]))
    def end_a_spill(self, data, publish):
        slots = sorted(slot for slot, spill in self.spills.items() if spill.state is State.GRANTED)
        known = self.spills[data.draw(st.sampled_from(slots))]
        spill = next(spill for spill in self.ring.spills if spill.slot == known.slot)
        if publish:
            assert self.ring.publish_spill(spill).key == known.key
            known.state = State.READY
        else:
            self.ring.abort_spill(spill)
            del self.spills[known.slot]
        self.sync()

    @rule()
    def publish_everything(self):
        for entry in self.entries.values():
            if entry.state is State.GRANTED:
                assert self.ring.publish(entry.slot, entry.generation).key == entry.key
                entry.state = State.READY
        self.sync()

    @rule(key=keys)
    def lookup(self, key):
        expected, spill = self.by_key(key), self.spill_by_key(key)
        spill = spill if spill is not None and spill.state is State.READY else None
        if expected is None or expected.state is not State.READY:
            expected = spill
            if spill is not None:
                self.use(spill)
        found = self.ring.lookup(key)
        assert (found and found.generation) == (expected and expected.generation)
        in_ring = self.ring.in_ring(key)
        assert (in_ring and in_ring.slot) == ((entry := self.by_key(key)) and entry.slot)
        beside = self.ring.lookup_spill(key)
        assert (beside and beside.generation) == (spill and spill.generation)
        if spill is not None:
            self.use(spill)

    @precondition(lambda self: self.everything())
    @rule(data=st.data(), holder=holders)
    def pin(self, data, holder):
        entry = self.everything()[data.draw(st.sampled_from(sorted(self.everything())))]
        if entry.state is State.GRANTED:
            with pytest.raises(StaleAddress):
                self.ring.pin(holder, entry.slot)
        else:
            self.ring.pin(holder, entry.slot)
            entry.pins.append(holder)

    @rule(holder=holders)
    def unpin(self, holder):
        assert self.ring.unpin(holder) == sum(entry.pins.count(holder) for entry in self.everything().values())
        for entry in self.everything().values():
            entry.pins = [pin for pin in entry.pins if pin != holder]
            self.prune(entry)
        self.sync()

    @precondition(lambda self: self.everything())
    @rule(data=st.data(), lease_id=ids, owner=owners, kind=kinds, seconds=st.integers(1, 9))
    def deliver(self, data, lease_id, owner, kind, seconds):
        entry = self.everything()[data.draw(st.sampled_from(sorted(self.everything())))]
        slot = entry.slot_for_readers()
        timing = {"now": self.now, "seconds": seconds}
        with pytest.raises(StaleAddress):
            self.ring.deliver(lease_id, owner, slot + 1, entry.generation, kind, **timing)
        others = {(other.slot_for_readers(), other.generation) for other in self.everything().values()}
        if (slot, entry.generation - 1) not in others:
            with pytest.raises(StaleAddress):
                self.ring.deliver(lease_id, owner, slot, entry.generation - 1, kind, **timing)
        known = self.leases.get(lease_id)
        try:
            self.ring.deliver(lease_id, owner, slot, entry.generation, kind, **timing)
        except StaleAddress:
            assert entry.state is State.GRANTED
        except Busy:
            assert known is None
            assert self.ring.leases.overdue(owner).nbytes > QUOTA
        except ValueError:
            assert known[:3] != [owner, entry.slot, kind]
        else:
            assert known is None or known[:3] == [owner, entry.slot, kind]
            due = self.now + seconds if known is None else max(known[3], self.now + seconds)
            self.leases[lease_id] = [owner, entry.slot, kind, due]

    @rule(owner=owners, some=st.lists(ids, max_size=5), seconds=st.integers(1, 9))
    def renew(self, owner, some, seconds):
        for lease_id, lives in self.ring.renew(owner, some, self.now, seconds).items():
            assert lives == (self.leases.get(lease_id, [None])[0] == owner)
            if lives:
                self.leases[lease_id][3] = max(self.leases[lease_id][3], self.now + seconds)

    @rule(owner=owners, some=st.lists(ids, max_size=5, unique=True))
    def release(self, owner, some):
        mine = [lease_id for lease_id in some if self.leases.get(lease_id, [None])[0] == owner]
        assert self.ring.release(owner, some) == [lease_id for lease_id in some if lease_id not in mine]
        self.end(mine)

    @rule(owner=owners, lease_id=ids, kind=kinds)
    def upgrade(self, owner, lease_id, kind):
        mine = self.leases.get(lease_id, [None])[0] == owner
        try:
            assert self.ring.upgrade(owner, lease_id, kind) == mine
        except Busy:
            assert self.ring.leases.overdue(owner).nbytes > QUOTA
        else:
            if mine:
                self.leases[lease_id][2] = kind

    @rule(owner=owners)
    def owner_gone(self, owner):
        mine = [lease_id for lease_id, lease in self.leases.items() if lease[0] == owner]
        assert self.ring.owner_gone(owner) == len(mine)
        self.end(mine)

    @rule(step=st.integers(0, 7))
    def tick(self, step):
        self.now += step
        late = [i for i, lease in self.leases.items() if lease[2] == "copy" and lease[3] <= self.now]
        assert sorted(lease.lease_id for lease in self.ring.tick(self.now)) == sorted(late)
        self.end(late)

    def end(self, lease_ids):
        slots = {self.leases.pop(lease_id)[1] for lease_id in lease_ids}
        for slot in slots:
            self.prune(self.everything()[slot])
        self.sync()

    @rule(key=keys)
    def remove(self, key):
        entries = [entry for entry in (self.by_key(key), self.spill_by_key(key)) if entry is not None]
        assert self.ring.remove(key) == any(entry.state is State.READY for entry in entries)
        self.removed(entries)

    @rule(really=st.sampled_from([False, False, True]))
    def clear(self, really):
        if really:
            ready = [entry for entry in self.everything().values() if entry.state is State.READY]
            assert self.ring.clear() == len({entry.key for entry in ready})
            self.removed(ready)

    def removed(self, entries):
        for entry in entries:
            if entry.state is State.READY:
                entry.state = State.RETIRED
                self.prune(entry)
        self.sync()

    @rule(key=keys, tensor_len=tensors, cut=st.integers(0, 6), early=keys)
    def crash_while_granting_and_restart(self, key, tensor_len, cut, early):
        self.try_grant(key, 10, tensor_len, cut)
        for slot in [slot for slot, entry in self.entries.items() if entry.state is State.GRANTED]:
            del self.entries[slot]
        self.incarnation += 1
        self.ring = self.new_ring()
        self.leases = {i: lease for i, lease in self.leases.items() if lease[1] not in self.spills}
        self.spills, self.segments = {}, set()
        assert self.ring.restore(self.image) == len(self.entries)
        assert self.ring.grant(bytes(32)[:-1] + b"!", 1, 1) is None, "granted before the leases are known"
        gone = self.by_key(early)
        assert self.ring.remove(early) == (gone is not None)
        if gone:
            gone.state = State.RETIRED
        for entry in self.entries.values():
            entry.pins = []
        for lease_id, (owner, slot, kind, _) in self.leases.items():
            number = self.entries[slot].generation
            self.ring.deliver(lease_id, owner, slot, number, kind, now=self.now, seconds=5)
            self.leases[lease_id][3] = self.now + 5
        self.ring.settle()
        self.sync()
        for entry in list(self.entries.values()):
            self.prune(entry)

    # What always holds

    @invariant()
    def everyone_finds_his_own_bytes(self):
        for entry in self.entries.values():
            assert {self.memory[unit] for unit in entry.span()} == {entry.generation}

    @invariant()
    def the_directory_says_what_the_ring_knows(self):
        self.ring.validate()
        seen = {slot: (r.state, r.generation, r.offset, r.key) for slot, r in self.records().items()}
        assert seen == {slot: (e.state, e.generation, e.offset, e.key) for slot, e in self.entries.items()}

    @invariant()
    def the_bytes_add_up(self):
        stats = self.ring.stats()
        assert stats.free + stats.ready + stats.leased + stats.filling == stats.capacity == GEOMETRY.arena_capacity
        leased = {lease[1] for lease in self.leases.values() if lease[1] < SLOTS}
        assert stats.leased == UNIT * sum(self.entries[slot].units for slot in leased)
        filling = [entry.units for entry in self.entries.values() if entry.state is State.GRANTED]
        assert stats.filling == UNIT * sum(filling)
        assert stats.entries == len(self.entries) - len(filling)
        assert (stats.slots_used, stats.leases) == (len(self.entries), len(self.leases))
        made = [spill.state is State.GRANTED for spill in self.spills.values()]
        assert (stats.spills.entries, stats.spills.filling) == (len(made), sum(made))
        assert stats.spills.nbytes == sum(spill.size for spill in self.spills.values()) <= SPILL_BYTES

    @invariant()
    def the_spills_are_used_in_the_order_that_the_model_knows(self):
        assert [spill.slot for spill in self.ring.spills] == list(self.spills)


TestRingMachine = RingMachine.TestCase
TestRingMachine.settings = settings(
    max_examples=220,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
TestRingMachineAtLength = at_length(RingMachine)
