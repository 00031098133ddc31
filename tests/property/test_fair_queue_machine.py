"""The fair queue against a model that keeps a plain list and looks at all of it each time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.machines import at_length

from mmprep import errors
from mmprep_worker.scheduling.queue import Entry, FairQueue

MAX_ITEMS, MAX_BYTES = 14, 60
PRIORITIES = st.integers(-1, 1)


class FairQueueMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.queue = FairQueue(max_items=MAX_ITEMS, max_bytes=MAX_BYTES)
        self.entries: list[Entry] = []  # by arrival at their priority
        self.tags: dict[tuple[int, str], int] = {}
        self.times: dict[int, int] = {}
        self.last_id = 0

    @rule(
        client=st.sampled_from("abcd"),
        cost=st.integers(0, 9),
        priority=PRIORITIES,
        nbytes=st.integers(0, 9),
        flags=st.tuples(st.booleans(), st.booleans()),
    )
    def push(self, client, cost, priority, nbytes, flags):
        heavy, first = flags
        self.last_id += 1
        entry = Entry(self.last_id, client, cost, priority, nbytes, heavy)
        if len(self.entries) == MAX_ITEMS or sum(e.nbytes for e in self.entries) + nbytes > MAX_BYTES:
            with pytest.raises(errors.Busy) as caught:
                self.queue.push(entry, first=first)
            assert caught.value.retry_after > 0
        else:
            self.queue.push(entry, first=first)
            self.arrive(entry, first=first)

    @rule(heavy_allowed=st.booleans())
    def pop(self, heavy_allowed):
        allowed = [entry for entry in self.entries if heavy_allowed or not entry.heavy]
        popped = self.queue.pop(heavy_allowed=heavy_allowed)
        if not allowed:
            assert popped is None
            return
        assert popped in allowed
        priority = min(entry.priority for entry in allowed)
        assert popped.priority == priority
        tags = {e.client: self.tags[priority, e.client] for e in allowed if e.priority == priority}
        tag = tags[popped.client]
        assert tag == min(tags.values())
        assert popped == next(e for e in allowed if (e.priority, e.client) == (priority, popped.client))
        self.times[priority] = max(self.times[priority], tag)
        self.tags[priority, popped.client] = tag + max(popped.cost, 1)
        self.leave(popped)

    @precondition(lambda self: self.entries)
    @rule(pick=st.integers(0, MAX_ITEMS - 1))
    def remove(self, pick):
        entry = self.entries[pick % len(self.entries)]
        assert self.queue.remove(entry.flight_id) == entry
        self.leave(entry)

    @precondition(lambda self: self.entries)
    @rule(pick=st.integers(0, MAX_ITEMS - 1), priority=PRIORITIES)
    def reprioritise(self, pick, priority):
        entry = self.entries[pick % len(self.entries)]
        self.queue.reprioritise(entry.flight_id, priority)
        if priority != entry.priority:
            self.leave(entry)
            self.arrive(Entry(entry.flight_id, entry.client, entry.cost, priority, entry.nbytes, entry.heavy))

    @rule(priority=PRIORITIES)
    def events_of_unknown_flights_change_nothing(self, priority):
        assert self.queue.remove(self.last_id + 1) is None
        self.queue.reprioritise(self.last_id + 1, priority)

    def arrive(self, entry, *, first=False):
        flow = (entry.priority, entry.client)
        time = self.times.setdefault(entry.priority, 0)
        if not any((e.priority, e.client) == flow for e in self.entries):
            self.tags[flow] = max(self.tags.get(flow, 0), time)
        self.entries.insert(0 if first else len(self.entries), entry)

    def leave(self, entry):
        self.entries.remove(entry)
        if not any(e.priority == entry.priority for e in self.entries):
            del self.times[entry.priority]
            self.tags = {flow: tag for flow, tag in self.tags.items() if flow[0] != entry.priority}

    @invariant()
    def holds(self):
        self.queue.validate()
        assert len(self.queue) == len(self.entries)
        assert self.queue.bytes == sum(entry.nbytes for entry in self.entries)
        assert all(entry.flight_id in self.queue for entry in self.entries)

    def teardown(self):
        while self.entries:
            self.pop(heavy_allowed=True)
        self.holds()


FairQueueMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None, database=None)
TestFairQueueMachine = FairQueueMachine.TestCase
TestFairQueueMachineAtLength = at_length(FairQueueMachine)


@settings(max_examples=50, deadline=None, database=None)
@given(
    costs=st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(1, 20), min_size=5, max_size=20), min_size=2)
)
def test_clients_that_always_wait_are_never_further_apart_than_an_item_of_each(costs):
    queue = FairQueue(max_items=1000, max_bytes=1000)
    flight_ids = iter(range(1, 1000))
    for client, entries in costs.items():
        for cost in entries:
            queue.push(Entry(next(flight_ids), client, cost, 0, 1, False))
    left = {client: len(entries) for client, entries in costs.items()}
    served = dict.fromkeys(costs, 0)
    history = [dict(served)]
    while all(left.values()):
        entry = queue.pop(heavy_allowed=False)
        left[entry.client] -= 1
        served[entry.client] += entry.cost
        history.append(dict(served))
    for start in history:
        for end in history:
            for a in costs:
                for b in costs:
                    apart = (end[a] - start[a]) - (end[b] - start[b])
                    assert abs(apart) <= max(costs[a]) + max(costs[b])
