"""The directory and the policy of its hand against plain dictionaries and sets."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.machines import at_length

from mmprep.arena import Verdict
from mmprep.layout import Record, State
from mmprep_worker.ring.directory import Directory, Entry
from mmprep_worker.ring.policy import Clock

SLOTS = 5
PICK = st.integers(0, SLOTS - 1)
keys = st.integers(1, 7).map(lambda n: bytes([n]) * 32)


class DirectoryMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.directory = Directory(SLOTS)
        self.policy = Clock(SLOTS)
        self.entries: dict[int, Entry] = {}  # by slot
        self.held: set[int] = set()
        self.used: set[int] = set()
        self.generation = 0

    def choose(self, pick):
        return self.entries[sorted(self.entries)[pick % len(self.entries)]]

    def by_key(self, key):
        found = [e for e in self.entries.values() if e.key == key and e.state is not State.RETIRED]
        assert len(found) <= 1
        return found[0] if found else None

    def entry(self, slot, key, state):
        self.generation += 1
        return Entry(Record(state, slot, self.generation, 64 * slot, 0, 64, key))

    @precondition(lambda self: len(self.entries) < SLOTS)
    @rule(key=keys, state=st.sampled_from([State.GRANTED, State.READY]))
    def add(self, key, state):
        if self.by_key(key) is None:
            slot = self.directory.free_slot()
            assert slot not in self.entries
            self.entries[slot] = self.entry(slot, key, state)
            self.directory.add(self.entries[slot])

    @precondition(lambda self: self.entries)
    @rule(pick=PICK)
    def retire(self, pick):
        entry = self.choose(pick)
        if entry.state is State.READY:
            self.directory.retire(entry)
            assert entry.state is State.RETIRED

    @precondition(lambda self: self.entries)
    @rule(pick=PICK)
    def drop(self, pick):
        self.dropped(self.choose(pick))

    def dropped(self, entry):
        self.directory.drop(entry)
        self.policy.forgotten(entry.slot)
        del self.entries[entry.slot]
        self.held.discard(entry.slot)
        self.used.discard(entry.slot)

    @precondition(lambda self: self.entries)
    @rule(pick=PICK, what=st.sampled_from(["hold", "let go", "use"]))
    def change_the_verdict(self, pick, what):
        slot = self.choose(pick).slot
        if what == "hold":
            self.held.add(slot)
        elif what == "let go":
            self.held.discard(slot)
        else:
            self.used.add(slot)
            self.policy.touched(slot)

    def verdict(self, entry):
        assert self.entries[entry.slot] is entry, "the hand asked about an entry that is gone"
        if entry.slot in self.held:
            return Verdict.KEEP
        spared = self.policy.spare(entry.slot)
        assert spared == (entry.slot in self.used), "spared is what was used since the hand passed, and nothing else"
        self.used.discard(entry.slot)
        return Verdict.SPARE if spared else Verdict.EVICT

    @rule(evict=st.booleans())
    def sweep(self, evict):
        start = self.directory._hand
        order = [*range(start, SLOTS), *range(start)]
        free = [slot for slot in order if slot in self.entries and slot not in self.held]
        unused = [slot for slot in free if slot not in self.used]
        victim = self.directory.victim(self.verdict)
        if not free:
            assert victim is None
            return
        assert victim is self.entries[(unused or free)[0]], "the hand takes the first that nobody holds and nobody used"
        assert self.directory._hand == (victim.slot + 1) % SLOTS
        if evict:
            self.dropped(victim)

    @rule()
    def a_later_writer_takes_over(self):
        self.directory, self.policy = Directory(SLOTS), Clock(SLOTS)
        for slot in [slot for slot, entry in self.entries.items() if entry.state is State.GRANTED]:
            del self.entries[slot]
        self.held, self.used = set(), set()
        self.directory.restore(list(self.entries.values()))
        if len(self.entries) < SLOTS:
            assert self.directory.free_slot() == min(set(range(SLOTS)) - self.entries.keys())

    @invariant()
    def a_key_finds_its_entry_and_a_slot_has_one(self):
        self.directory.validate()
        assert {entry.slot: entry for entry in self.directory} == self.entries
        assert len(self.directory) == len(self.entries)
        assert self.directory.full == (len(self.entries) == SLOTS)
        for number in range(8):
            assert self.directory.find(bytes([number]) * 32) is self.by_key(bytes([number]) * 32)
        for slot in range(-SLOTS - 1, SLOTS + 2):
            assert self.directory.at(slot) is self.entries.get(slot), "a slot that does not exist holds nothing"

    @invariant()
    def a_mark_stands_for_a_use_of_an_entry_that_is_there(self):
        assert {slot for slot, mark in enumerate(self.policy._used) if mark} == self.used <= self.entries.keys()


class ClockMachine(RuleBasedStateMachine):
    """The policy alone, as any policy has to be: it may spare an entry again only where it was used in between."""

    def __init__(self):
        super().__init__()
        self.policy = Clock(SLOTS)
        self.used: set[int] = set()

    @rule(slot=PICK)
    def touched(self, slot):
        self.policy.touched(slot)
        self.used.add(slot)

    @rule(slot=PICK)
    def a_hand_passes(self, slot):
        assert self.policy.spare(slot) == (slot in self.used)
        self.used.discard(slot)
        assert not self.policy.spare(slot), "an entry was spared twice for one use"

    @rule(slot=PICK)
    def forgotten(self, slot):
        self.policy.forgotten(slot)
        self.used.discard(slot)

    @invariant()
    def the_marks_are_the_uses(self):
        assert list(self.policy._used) == [slot in self.used for slot in range(SLOTS)]


DirectoryMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None, database=None)
ClockMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None, database=None)
TestDirectoryMachine = DirectoryMachine.TestCase
TestClockMachine = ClockMachine.TestCase
TestDirectoryMachineAtLength = at_length(DirectoryMachine)
TestClockMachineAtLength = at_length(ClockMachine)
