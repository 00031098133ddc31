"""Flights against a shell that knows nothing but the answers it gets: what it holds must be what is needed, always.

The machine plays frontends, queue and lanes. It keeps who was asked, which bytes are queued, which lane runs what, and
who is still owed an answer, from the answers alone. After every step each flight must have exactly one of these, and
those who wait in the core must be those who are owed.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.machines import at_length

from mmprep import errors
from mmprep_worker.scheduling.admission import STRIKES, Quarantine
from mmprep_worker.scheduling.flight import (
    Abandon,
    Ask,
    Call,
    Expire,
    Fail,
    Need,
    Reprioritise,
    Retry,
)
from mmprep_worker.scheduling.flights import Flights

MAX_WAITING = 12
UPLOAD_SECONDS = 6
QUARANTINE_SECONDS = 30
KEYS = [b"1", b"2", b"3"]
PICK = st.integers(0, 23)
CALLS = st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(1, 4))


#: The larger ones last.
NEEDS = ["plan", "tensors", "apart"]


@dataclass
class Owed:
    need: Need
    priority: int
    deadline: float
    asked: bool
    sends: bool


class FlightsMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.flights = Flights(
            max_waiting=MAX_WAITING,
            upload_seconds=UPLOAD_SECONDS,
            quarantine=Quarantine(max_keys=10, seconds=QUARANTINE_SECONDS),
        )
        self.now = 0
        self.last_id = 0
        self.last_lane = 0
        self.identities: dict[int, tuple[bytes, Need]] = {}
        self.owed: dict[int, dict[Call, Owed]] = {}
        self.asked: dict[int, tuple[Call, float]] = {}  # whom, until when
        self.queued: dict[int, int] = {}  # with the priority that the queue was told
        self.lanes: dict[int, int] = {}
        self.uploaders: dict[int, Call] = {}
        self.strikes: dict[bytes, tuple[int, int]] = {}  # how many, until when

    # -- Frontends ---------------------------------------------------------------------------------------------------

    @rule(
        key=st.sampled_from(KEYS),
        need=st.sampled_from(NEEDS),
        call=CALLS,
        terms=st.tuples(st.integers(-1, 2), st.integers(1, 15)),
        sends=st.sampled_from([True, True, False]),
    )
    def join(self, key, need, call, terms, sends):
        priority, patience = terms
        live = {identity: flight_id for flight_id, identity in self.identities.items()}
        givers = {"plan": ("plan", "tensors", "apart"), "tensors": ("tensors", "apart"), "apart": ("apart",)}[need]
        expected = next((live[key, giver] for giver in givers if (key, giver) in live), None)
        known = expected is not None and call in self.owed[expected]
        arguments = {"modality": "image", "cost": 1, "priority": priority, "deadline": self.now + patience}
        arguments["sends"] = sends = sends or expected is None
        if self.in_quarantine(key):
            with pytest.raises(errors.MediaError):
                self.flights.join(key, need, call, now=self.now, **arguments)
            return
        if not known and self.waiting() == MAX_WAITING:
            with pytest.raises(errors.Busy):
                self.flights.join(key, need, call, now=self.now, **arguments)
            return
        if self.waiting() < MAX_WAITING:
            assert self.flights.openings([(key, need)]) == ([0] if expected is None else [])
        joined = self.flights.join(key, need, call, now=self.now, **arguments)
        flight_id = joined.flight_id
        assert joined.ask == (expected is None)
        if joined.ask:
            assert flight_id > self.last_id, "an id came again"
            self.last_id = flight_id
            self.identities[flight_id] = (key, need)
            self.owed[flight_id] = {}
            self.asked[flight_id] = (call, self.now + UPLOAD_SECONDS)
        else:
            assert flight_id == expected
        mine = self.owed[flight_id].setdefault(call, Owed(need, priority, self.now + patience, joined.ask, sends))
        mine.sends |= sends
        mine.need = max(mine.need, need, key=NEEDS.index)
        mine.priority = min(mine.priority, priority)
        mine.deadline = max(mine.deadline, self.now + patience)
        if joined.priority is not None:
            assert flight_id in self.queued, "the queue is told of what it does not hold"
            self.queued[flight_id] = joined.priority

    @precondition(lambda self: self.asked)
    @rule(pick=PICK)
    def the_asked_peer_uploads(self, pick):
        flight_id = self.choose(self.asked, pick)
        call, _ = self.asked.pop(flight_id)
        assert self.flights.uploaded(flight_id, call[0], 10)
        self.uploaders[flight_id] = call
        self.queued[flight_id] = self.flights[flight_id].priority

    @precondition(lambda self: self.last_id)
    @rule(pick=PICK, peer=st.sampled_from(["a", "b", "c", "stranger"]))
    def an_upload_that_is_not_wanted_is_dropped(self, pick, peer):
        flight_id = 1 + pick % self.last_id
        if flight_id not in self.asked or self.asked[flight_id][0][0] != peer:
            assert not self.flights.uploaded(flight_id, peer, 10)

    @rule(call=CALLS)
    def cancel(self, call):
        self.leave(lambda waiting: waiting == call)
        self.carry_out(self.flights.cancel(call, self.now))

    @rule(peer=st.sampled_from(["a", "b", "c"]))
    def peer_gone(self, peer):
        self.leave(lambda waiting: waiting[0] == peer)
        self.carry_out(self.flights.peer_gone(peer, self.now))
        assert not any(call[0] == peer for call, _ in self.asked.values())

    @rule(seconds=st.integers(0, 7))
    def time_passes(self, seconds):
        due = min(
            [owed.deadline for waiters in self.owed.values() for owed in waiters.values()]
            + [until for _, until in self.asked.values()],
            default=float("inf"),
        )
        assert self.flights.wake_at <= due
        self.now += seconds
        actions = self.flights.tick(self.now)
        assert not actions or due <= self.now
        self.carry_out(actions)
        assert all(owed.deadline > self.now for waiters in self.owed.values() for owed in waiters.values())
        assert all(until > self.now for _, until in self.asked.values())
        assert self.flights.tick(self.now) == []

    # -- Lanes -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.queued)
    @rule(pick=PICK)
    def started(self, pick):
        flight_id = self.choose(self.queued, pick)
        del self.queued[flight_id]
        self.last_lane += 1
        self.lanes[flight_id] = self.last_lane
        self.flights.started(flight_id, self.last_lane)

    @precondition(lambda self: self.lanes)
    @rule(pick=PICK, fails=st.booleans())
    def a_lane_ends(self, pick, fails):
        flight_id = self.choose(self.lanes, pick)
        report = self.flights.failed if fails else self.flights.published
        waiters = report(flight_id, self.lanes[flight_id])
        key, need = self.identities[flight_id]
        if not fails and need != "plan":
            self.strikes.pop(key, None)
        assert {w.call: w.need for w in waiters} == {c: owed.need for c, owed in self.owed[flight_id].items()}
        assert len(waiters) == len(self.owed[flight_id])
        self.owed[flight_id].clear()
        self.end(flight_id)

    @precondition(lambda self: self.lanes)
    @rule(pick=PICK)
    def lane_lost(self, pick):
        flight_id = self.choose(self.lanes, pick)
        key = self.identities[flight_id][0]
        strikes, until = self.strikes.get(key, (0, 0))
        self.strikes[key] = (strikes + 1 if until > self.now else 1, self.now + QUARANTINE_SECONDS)
        answer = self.flights.lane_lost(flight_id, self.lanes[flight_id], self.now)
        if self.in_quarantine(key):
            assert isinstance(answer, Fail)
            self.carry_out([answer])
            assert flight_id not in self.owed
        elif self.owed[flight_id]:
            assert answer == Retry(flight_id)
            del self.lanes[flight_id]
            self.queued[flight_id] = self.flights[flight_id].priority
        else:
            assert answer == Abandon(flight_id, None)
            self.carry_out([answer])

    @precondition(lambda self: self.lanes)
    @rule(pick=PICK)
    def a_lane_refuses_the_bytes(self, pick):
        flight_id = self.choose(self.lanes, pick)
        lane, uploader = self.lanes.pop(flight_id), self.uploaders.pop(flight_id)
        was_owed = uploader in self.owed[flight_id]
        if was_owed:
            self.owed[flight_id][uploader].sends = True  # also if it has left and come again, without the bytes
        actions = self.flights.refused(flight_id, lane, self.now)
        self.carry_out(actions)
        assert uploader not in self.owed.get(flight_id, {})
        assert not was_owed or (isinstance(actions[0], Fail) and actions[0].calls == (uploader,))

    @precondition(lambda self: self.last_id)
    @rule(pick=PICK, lane=st.integers(1, 12))
    def words_of_lanes_that_do_not_have_the_flight_change_nothing(self, pick, lane):
        flight_id = 1 + pick % self.last_id
        if self.lanes.get(flight_id) != lane:
            assert self.flights.published(flight_id, lane) is None
            assert self.flights.failed(flight_id, lane) is None
            assert self.flights.refused(flight_id, lane, self.now) is None
            assert self.flights.lane_lost(flight_id, lane, self.now) is None

    @precondition(lambda self: self.asked or self.queued)
    @rule(pick=PICK)
    def the_writer_gives_up(self, pick):
        flight_id = self.choose(self.asked | self.queued, pick)
        waiters = self.flights.failed(flight_id, None)
        assert [waiter.call for waiter in waiters] == list(self.owed[flight_id])
        self.owed[flight_id].clear()
        self.end(flight_id)

    # -- The shell ---------------------------------------------------------------------------------------------------

    def carry_out(self, actions):
        for action in actions:
            match action:
                case Ask(flight_id, call):
                    waiter = self.owed[flight_id][call]
                    assert not waiter.asked, "a call was asked twice"
                    assert waiter.sends, "a call was asked for what it does not have"
                    waiter.asked = True
                    self.asked[flight_id] = (call, self.now + UPLOAD_SECONDS)
                case Expire(call, flight_id):
                    assert self.owed[flight_id].pop(call).deadline <= self.now, "expired too early"
                case Fail(flight_id, calls, error, ended):
                    for call in calls:
                        owed = self.owed[flight_id].pop(call)  # a second outcome is a KeyError
                        unsent = isinstance(error, errors.NotFound | errors.DeadlineExceeded | errors.ProtocolError)
                        assert not unsent or isinstance(error, errors.NotFound) != owed.sends
                    if ended:
                        self.end(flight_id)
                case Abandon(flight_id, None):
                    assert flight_id not in self.lanes or not self.owed[flight_id]
                    self.end(flight_id)
                case Abandon(flight_id, lane):
                    assert self.lanes[flight_id] == lane
                    assert not self.owed[flight_id]
                case Reprioritise(flight_id, priority):
                    assert self.queued[flight_id] != priority
                    self.queued[flight_id] = priority

    def end(self, flight_id):
        assert self.owed.pop(flight_id) == {}, "a flight ended without an outcome for one who waits"
        del self.identities[flight_id]
        for place in (self.asked, self.queued, self.lanes, self.uploaders):
            place.pop(flight_id, None)

    def leave(self, leaves):
        for waiters in self.owed.values():
            for call in [call for call in waiters if leaves(call)]:
                del waiters[call]

    def choose(self, place, pick):
        return sorted(place)[pick % len(place)]

    def waiting(self):
        return sum(map(len, self.owed.values()))

    def in_quarantine(self, key):
        strikes, until = self.strikes.get(key, (0, 0))
        return strikes >= STRIKES and until > self.now

    @invariant()
    def each_flight_has_an_uploader_or_bytes_or_a_lane_and_one_who_waits_unless_it_runs(self):
        self.flights.validate()
        places = [*self.asked, *self.queued, *self.lanes]
        assert sorted(places) == sorted(self.identities) == sorted(flight.id for flight in self.flights)
        for flight in self.flights:
            owed = self.owed[flight.id]
            assert {call: w.need for call, w in flight.waiters.items()} == {c: o.need for c, o in owed.items()}
            assert owed or flight.id in self.lanes
            if owed:
                assert flight.deadline == max(o.deadline for o in owed.values())
                assert flight.priority == min(o.priority for o in owed.values())
            if flight.id in self.queued:
                assert self.queued[flight.id] == flight.priority, "the queue was not told of a priority"
            if flight.id in self.asked:
                assert self.asked[flight.id][0] in owed, "a call was asked that does not wait"
        assert self.flights.waiting == self.waiting()

    def teardown(self):
        """When nothing fails any more, everyone gets an answer."""
        while self.asked:
            self.the_asked_peer_uploads(0)
        while self.queued:
            self.started(0)
        while self.lanes:
            self.a_lane_ends(0, fails=False)
        assert len(self.flights) == self.flights.waiting == 0
        self.flights.validate()


FlightsMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None, database=None)
TestFlightsMachine = FlightsMachine.TestCase
TestFlightsMachineAtLength = at_length(FlightsMachine)
