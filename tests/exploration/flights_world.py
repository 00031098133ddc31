"""Two keys, three calls of two peers and two lanes around flights, quarantine, admission and queue.

What carries out the flights' answers here knows nothing else: it keeps who was asked, what is queued, what each lane
runs, and who is owed an outcome. The first lane takes no heavy work, and the second key's medium is heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mmprep import errors
from mmprep_worker.scheduling.admission import STRIKES, Admission, Quarantine
from mmprep_worker.scheduling.flight import Abandon, Ask, Expire, Fail, Joined, Reprioritise, Retry
from mmprep_worker.scheduling.flights import Flights
from mmprep_worker.scheduling.queue import Entry, FairQueue

LIGHT, HEAVY = b"light", b"heavy"
KEYS = (LIGHT, HEAVY)
#: How urgent each call is, and how long it waits.
CALLS = {("a", 1): (1, 2), ("a", 2): (0, 1), ("b", 1): (1, 1)}
NEEDS = ("tensors", "plan")
LANES = (0, 1)
MAX_WAITING = 4
MAX_FLIGHTS = 3
MAX_FLIGHTS_PER_PEER = 2
UPLOAD_SECONDS = 1
QUARANTINE_SECONDS = 2


@dataclass
class Owed:
    need: str
    priority: int
    deadline: int
    asked: bool


class FlightsWorld:
    def __init__(self):
        self.quarantine = Quarantine(max_keys=2, seconds=QUARANTINE_SECONDS)
        self.flights = Flights(max_waiting=MAX_WAITING, upload_seconds=UPLOAD_SECONDS, quarantine=self.quarantine)
        self.admission = Admission(
            max_items=MAX_FLIGHTS, max_bytes=MAX_FLIGHTS, max_items_per_client=MAX_FLIGHTS_PER_PEER
        )
        self.queue = FairQueue(max_items=MAX_FLIGHTS, max_bytes=MAX_FLIGHTS)
        self.now = 0
        self.last_id = 0
        self.identities: dict[int, tuple[bytes, str]] = {}
        self.openers: dict[int, str] = {}
        self.owed: dict[int, dict[tuple[str, int], Owed]] = {}
        self.asked: dict[int, tuple[tuple[str, int], int]] = {}  # whom, until when
        self.queued: dict[int, int] = {}  # with the priority that the queue was told
        self.lanes: dict[int, int] = {}  # which flight a lane runs
        self.uploaders: dict[int, tuple[str, int]] = {}
        self.strikes: dict[bytes, tuple[int, int]] = {}  # how many, until when

    # --- events ---------------------------------------------------------------------------------------------------

    def events(self):
        found = [("join", *call, key, need) for call in CALLS for key in KEYS for need in NEEDS]
        found += [(name, flight_id) for flight_id in self.asked for name in ("upload", "upload other size", "give up")]
        found += [("give up", flight_id) for flight_id in self.queued]
        for lane in LANES:
            if lane in self.lanes:
                found += [(name, lane) for name in ("publish", "fail", "refuse", "lose")]
            elif any(lane > 0 or self.identities[flight_id][0] == LIGHT for flight_id in self.queued):
                found.append(("start", lane))
        waiting = sorted({call for waiters in self.owed.values() for call in waiters})
        found += [("cancel", *call) for call in waiting]
        found += [("peer gone", peer) for peer in sorted({peer for peer, _ in waiting})]
        if self.identities or self.strikes:
            found.append(("tick",))
        return found

    def apply(self, event):
        getattr(self, "do_" + event[0].replace(" ", "_"))(*event[1:])
        return []

    def do_join(self, peer, number, key, need):
        call, (priority, patience) = (peer, number), CALLS[peer, number]
        live = {identity: flight_id for flight_id, identity in self.identities.items()}
        expected = live.get((key, need), live.get((key, "tensors")))
        joined = self._join(call, key, need, expected)
        if joined is None:
            return
        assert joined.ask == (expected is None)
        if expected is None:
            assert joined.flight_id > self.last_id, "a flight's number came again"
            expected = self.last_id = joined.flight_id
            self.admission.add(expected, peer, 1, self.now)
            self.identities[expected], self.openers[expected] = (key, need), peer
            self.owed[expected] = {}
            self.asked[expected] = (call, self.now + UPLOAD_SECONDS)
        assert joined.flight_id == expected
        deadline = self.now + patience
        mine = self.owed[expected].setdefault(call, Owed(need, priority, deadline, joined.ask))
        mine.need = "tensors" if "tensors" in (mine.need, need) else "plan"
        mine.deadline = max(mine.deadline, deadline)
        if joined.priority is not None:
            self._reprioritise(expected, joined.priority)

    def _join(self, call, key, need, expected) -> Joined | None:
        """Offer as the writer does: room for waiters, room for a flight, then the flight."""
        priority, patience = CALLS[call]
        wants = {"modality": "image", "cost": 1, "priority": priority, "deadline": self.now + patience, "now": self.now}
        known = expected is not None and call in self.owed[expected]
        if not known and self._waiting() == MAX_WAITING:
            for refused in (lambda: self.flights.openings([(key, need)]),) * (not known):
                with pytest.raises(errors.Busy):
                    refused()
            if not self._in_quarantine(key):
                with pytest.raises(errors.Busy):
                    self.flights.join(key, need, call, **wants)
            return None
        if self._in_quarantine(key):
            with pytest.raises(errors.MediaError):
                self.flights.join(key, need, call, **wants)
            return None
        if self._waiting() < MAX_WAITING:
            assert self.flights.openings([(key, need)]) == ([0] if expected is None else [])
        if expected is None:
            mine = sum(opener == call[0] for opener in self.openers.values())
            if mine == MAX_FLIGHTS_PER_PEER or len(self.identities) == MAX_FLIGHTS:
                with pytest.raises(errors.Busy):
                    self.admission.check(call[0], [1])
                return None
            self.admission.check(call[0], [1])
        return self.flights.join(key, need, call, **wants)

    def do_upload(self, flight_id):
        call, _ = self.asked.pop(flight_id)
        assert self.flights.uploaded(flight_id, call[0], 1)
        self.uploaders[flight_id] = call
        self._enqueue(flight_id)

    def do_upload_other_size(self, flight_id):
        uploader, _ = self.asked.pop(flight_id)
        self._refused(flight_id, None, uploader)

    def do_give_up(self, flight_id):
        waiters = self.flights.failed(flight_id, None)
        self._answered(flight_id, waiters)

    def do_start(self, lane):
        entry = self.queue.pop(heavy_allowed=lane > 0)
        allowed = [f for f in self.queued if lane > 0 or self.identities[f][0] == LIGHT]
        assert entry.flight_id in allowed
        assert self.queued[entry.flight_id] == min(self.queued[f] for f in allowed), "an urgent one was passed over"
        del self.queued[entry.flight_id]
        self.flights.started(entry.flight_id, lane)
        self.lanes[lane] = entry.flight_id

    def do_publish(self, lane):
        flight_id = self.lanes[lane]
        key, need = self.identities[flight_id]
        waiters = self.flights.published(flight_id, lane)
        if need == "tensors":
            self.strikes.pop(key, None)
        self._answered(flight_id, waiters)

    def do_fail(self, lane):
        flight_id = self.lanes[lane]
        self._answered(flight_id, self.flights.failed(flight_id, lane))

    def do_refuse(self, lane):
        flight_id = self.lanes.pop(lane)
        self._refused(flight_id, lane, self.uploaders.pop(flight_id))

    def do_lose(self, lane):
        flight_id = self.lanes[lane]
        key = self.identities[flight_id][0]
        strikes, until = self.strikes.get(key, (0, 0))
        self.strikes[key] = (strikes + 1 if until > self.now else 1, self.now + QUARANTINE_SECONDS)
        answer = self.flights.lane_lost(flight_id, lane, self.now)
        if self._in_quarantine(key):
            assert isinstance(answer, Fail), "a medium that takes lanes down is tried again"
            assert answer.ended
            self._carry_out([answer])
        elif self.owed[flight_id]:
            assert answer == Retry(flight_id)
            del self.lanes[lane]
            self._enqueue(flight_id)
        else:
            assert answer == Abandon(flight_id, None)
            self._carry_out([answer])

    def do_cancel(self, peer, number):
        self._leave(lambda call: call == (peer, number))
        self._carry_out(self.flights.cancel((peer, number), self.now))

    def do_peer_gone(self, peer):
        self._leave(lambda call: call[0] == peer)
        self._carry_out(self.flights.peer_gone(peer, self.now))
        assert not any(call[0] == peer for call, _ in self.asked.values()), "a peer that is gone was asked"

    def do_tick(self):
        self.now += 1
        due = any(owed.deadline <= self.now for waiters in self.owed.values() for owed in waiters.values())
        late = any(until <= self.now for _, until in self.asked.values())
        assert self.flights.wake_at <= self.now or not (due or late), "nothing would have woken the writer"
        self._carry_out(self.flights.tick(self.now))
        assert all(owed.deadline > self.now for waiters in self.owed.values() for owed in waiters.values())
        assert all(until > self.now for _, until in self.asked.values()), "a late uploader was not replaced"
        assert self.flights.tick(self.now) == []
        self.strikes = {key: strike for key, strike in self.strikes.items() if strike[1] > self.now}

    # --- what events have in common -------------------------------------------------------------------------------

    def _enqueue(self, flight_id):
        flight = self.flights[flight_id]
        heavy = flight.key == HEAVY
        client, nbytes = self.admission.reservation(flight_id)
        self.queue.push(Entry(flight_id, client, flight.cost, flight.priority, nbytes, heavy))
        self.queued[flight_id] = flight.priority

    def _refused(self, flight_id, lane, uploader):
        owed = uploader in self.owed[flight_id]
        actions = self.flights.refused(flight_id, lane, self.now)
        assert not owed or (isinstance(actions[0], Fail) and actions[0].calls == (uploader,))
        self._carry_out(actions)
        assert uploader not in self.owed.get(flight_id, {}), "who sent other bytes still waits"

    def _answered(self, flight_id, waiters):
        """The flight ends with an outcome for all who wait."""
        owed = self.owed[flight_id]
        assert {waiter.call: waiter.need for waiter in waiters} == {call: mine.need for call, mine in owed.items()}
        assert len(waiters) == len(owed), "a call got two outcomes"
        owed.clear()
        self._end(flight_id)

    def _carry_out(self, actions):
        for action in actions:
            match action:
                case Ask(flight_id, call):
                    assert not self.owed[flight_id][call].asked, "a call was asked twice"
                    self.owed[flight_id][call].asked = True
                    self.asked[flight_id] = (call, self.now + UPLOAD_SECONDS)
                case Expire(call, flight_id):
                    assert self.owed[flight_id].pop(call).deadline <= self.now, "a call expired too early"
                case Fail(flight_id, calls, _, ended):
                    for call in calls:
                        del self.owed[flight_id][call]  # a second outcome is a KeyError
                    if ended:
                        self._end(flight_id)
                case Abandon(flight_id, None):
                    self._end(flight_id)
                case Abandon(flight_id, lane):
                    assert self.lanes[lane] == flight_id
                    assert not self.owed[flight_id], "a flight was abandoned that a call waits for"
                case Reprioritise(flight_id, priority):
                    self._reprioritise(flight_id, priority)

    def _reprioritise(self, flight_id, priority):
        assert self.queued[flight_id] != priority
        self.queued[flight_id] = priority
        self.queue.reprioritise(flight_id, priority)

    def _end(self, flight_id):
        assert self.owed.pop(flight_id) == {}, "a flight ended without an outcome for one who waits"
        del self.identities[flight_id], self.openers[flight_id]
        self.asked.pop(flight_id, None)
        self.uploaders.pop(flight_id, None)
        assert (self.queue.remove(flight_id) is not None) == (self.queued.pop(flight_id, None) is not None)
        self.lanes = {lane: running for lane, running in self.lanes.items() if running != flight_id}
        assert self.admission.release(flight_id, self.now)

    def _leave(self, leaves):
        for waiters in self.owed.values():
            for call in [call for call in waiters if leaves(call)]:
                del waiters[call]

    def _waiting(self):
        return sum(map(len, self.owed.values()))

    def _in_quarantine(self, key):
        strikes, until = self.strikes.get(key, (0, 0))
        return strikes >= STRIKES and until > self.now

    # --- what always holds ----------------------------------------------------------------------------------------

    def check(self):
        for core in (self.flights, self.admission, self.queue, self.quarantine):
            core.validate()
        places = sorted([*self.asked, *self.queued, *self.lanes.values()])
        assert places == sorted(self.identities), (
            "a flight has no uploader, place in the queue, or lane, or two of them"
        )
        assert places == sorted(flight.id for flight in self.flights)
        assert places == sorted(flight_id for flight_id in range(self.last_id + 2) if flight_id in self.admission)
        for flight in self.flights:
            self._check_flight(flight)
        assert self.flights.waiting == self._waiting()
        refused = {key for key in KEYS if self.quarantine.refusal(key, self.now) is not None}
        assert refused == {key for key in KEYS if self._in_quarantine(key)}

    def _check_flight(self, flight):
        owed = self.owed[flight.id]
        assert (flight.key, flight.need) == self.identities[flight.id]
        found = {call: (w.need, w.priority, w.deadline, w.asked) for call, w in flight.waiters.items()}
        assert found == {c: (o.need, o.priority, o.deadline, o.asked) for c, o in owed.items()}
        assert owed or flight.id in self.lanes.values(), "nobody waits for a flight, and no lane has it"
        if owed:
            assert flight.deadline == max(mine.deadline for mine in owed.values())
            assert flight.priority == min(mine.priority for mine in owed.values())
        if flight.id in self.queued:
            assert self.queued[flight.id] == flight.priority, "the queue was not told of a priority"
        if flight.id in self.asked:
            assert (flight.state, flight.uploader) == ("wanted", self.asked[flight.id][0])
            assert flight.uploader in owed, "a call was asked that does not wait"

    def canonical(self):
        names = {flight_id: name for name, flight_id in enumerate(sorted(self.identities))}
        flights = []
        for flight_id in names:
            flight = self.flights[flight_id]
            late = flight.upload_deadline - self.now if flight.state == "wanted" else None
            waiters = tuple((c, w.need, w.deadline - self.now, w.asked) for c, w in flight.waiters.items())
            flights.append(
                (flight.key, flight.need, flight.state, flight.uploader, late, flight.priority, flight.lane, waiters)
            )
        alarms = sorted(alarm for alarm in self.flights._alarms if alarm[2] in names)
        return (
            tuple(flights),
            tuple((when - self.now, names[flight_id], call) for when, _, flight_id, call in alarms),
            tuple((key, strike[0], strike[1] - self.now) for key, strike in self.quarantine._keys.items()),
            tuple(self.admission.reservation(flight_id) for flight_id in names),
            self._canonical_queue(names),
        )

    def _canonical_queue(self, names):
        """Return the queue with tags relative to each priority's virtual time, and turns in their order."""
        levels = []
        for priority, level in sorted(self.queue._levels.items()):
            flows = [
                (client, flow.tag - level.virtual_time, tuple(names[f] for f in (*flow.light, *flow.heavy)))
                for client, flow in sorted(level.clients.items())
            ]
            debts = [
                (client, tag - level.virtual_time)
                for (of, client), (debtor, tag) in self.queue._debts.items()
                if of == priority and debtor is level and tag > level.virtual_time
            ]
            levels.append((priority, tuple(flows), tuple(debts)))
        turns = [
            tuple(turn.flow.client for turn in sorted(heap) if turn.tag == turn.flow.tag and _live(self.queue, turn))
            for heap in (self.queue._any, self.queue._light)
        ]
        return tuple(levels), tuple(turns)

    # --- what must be refused, and the end ------------------------------------------------------------------------

    def probe(self):
        before = self.canonical()
        for flight_id in range(self.last_id + 2):
            for lane in (*LANES, len(LANES)):
                if self.lanes.get(lane) != flight_id:
                    assert self.flights.published(flight_id, lane) is None
                    assert self.flights.failed(flight_id, lane) is None
                    assert self.flights.refused(flight_id, lane, self.now) is None
                    assert self.flights.lane_lost(flight_id, lane, self.now) is None
            for peer in ("a", "b", "stranger"):
                if flight_id not in self.asked or self.asked[flight_id][0][0] != peer:
                    assert not self.flights.uploaded(flight_id, peer, 1), "bytes were taken that nobody asked for"
        assert self.flights.cancel(("a", 9), self.now) == []
        assert self.flights.peer_gone("stranger", self.now) == []
        assert self.queue.remove(self.last_id + 1) is None
        assert not self.admission.release(self.last_id + 1, self.now)
        self.check()
        assert self.canonical() == before, "what was refused changed something"
        self._wind_up()

    def _wind_up(self):
        """No more faults: every flight ends with an outcome for all who wait, and nothing is left."""
        for flight_id in list(self.asked):
            self.do_upload(flight_id)
        for _ in range(2 * MAX_FLIGHTS):
            for lane in list(self.lanes):
                self.do_publish(lane)
            if self.queued:
                self.do_start(LANES[-1])
        self.check()
        assert not self.identities, "a flight goes on for ever"
        assert len(self.flights) == self.flights.waiting == len(self.queue) == len(self.admission) == 0
        assert self.queue.bytes == self.admission.bytes == 0


def _live(queue, turn):
    level = queue._levels.get(turn.priority)
    return level is turn.flow.level and level.clients.get(turn.flow.client) is turn.flow
