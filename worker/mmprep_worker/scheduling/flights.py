"""Flights: one shared computation for all calls that wait for the same missing item.

A flight is ``wanted`` (one of its waiters, the *uploader*, was asked for the medium's bytes), then ``queued`` (the
writer holds the bytes), then ``running`` (a lane has them), and ends with one outcome for each waiter. Rules:

- A flight's identity is (key, need). A call that needs a plan also joins a flight for the tensors of its key, and one that
  needs tensors joins a flight for tensors apart from the ring, or for injected ones; never the other way round.
- A flight has the highest priority and the latest deadline of those who wait, and goes on while anyone does. Before it
  runs, the last to leave ends it; a running one goes on to its result.
- A waiter gets one outcome a flight: published, failed or expired. One that cancels or whose peer is gone gets none.
- An uploader that leaves, is late, or sent other bytes than its key says is replaced by a waiter that has the bytes and
  was never asked. The flight fails when there is none. A waiter that has no bytes is told then that nobody has them.
- The writer keeps the bytes until the flight ends, so that an item whose lane was lost can run once more. Two losses
  within the quarantine time put the key into quarantine: offers of it are refused until the time is over.

Every event is a method; what it returns is all that the writer has to do. Events of lanes name the lane, because a
lost lane's last message may arrive when the flight is elsewhere already: these answer ``None``, and change nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence

from mmprep import errors
from mmprep_worker.scheduling.admission import CRASHED, Quarantine
from mmprep_worker.scheduling.flight import (
    Abandon,
    Action,
    Ask,
    Call,
    Expire,
    Fail,
    Flight,
    Joined,
    Need,
    Reprioritise,
    Retry,
    Waiter,
    nobody_has_it,
)

#: Seconds after which a refused offer may be sent again.
RETRY_AFTER = 1.0
#: Which flights give what is needed, the first that is there.
_GIVEN_BY: dict[Need, tuple[Need, ...]] = {
    "plan": ("plan", "tensors", "apart", "injected"),
    "tensors": ("tensors", "apart", "injected"),
    "apart": ("apart",),
    "injected": ("injected",),
}
#: Outdated alarms that are tolerated beyond as many as there are valid ones.
_SLACK = 1024


class Flights:
    """All flights of a writer.

    Parameters
    ----------
    max_waiting:
        Waiters over all flights; more are refused.
    upload_seconds:
        How long an uploader has until another waiter is asked; above zero.
    quarantine:
        Of keys that took lanes down; offers of them are refused.
    after:
        Ids are above this. A random one for each writer keeps uploads that an earlier one asked for, and that arrive
        late, out of flights of other keys.
    """

    def __init__(self, *, max_waiting: int, upload_seconds: float, quarantine: Quarantine, after: int = 0) -> None:
        self._max_waiting = max_waiting
        self._upload_seconds = upload_seconds
        self._flights: dict[int, Flight] = {}
        self._by_key: dict[Need, dict[bytes, Flight]] = {"tensors": {}, "plan": {}, "apart": {}, "injected": {}}
        #: ``{peer: {number of the call: {flight_id: flight}}}``, without empty dicts.
        self._by_peer: dict[str, dict[int, dict[int, Flight]]] = {}
        #: Heap of (when, tie-breaker, flight_id, call whose deadline it is, or None: the uploader's). Outdated ones
        #: stay in it until they come up, or until there are more of them than valid ones.
        self._alarms: list[tuple[float, int, int, Call | None]] = []
        self._max_alarms = _SLACK
        self._waiting = 0
        self._last_id = after
        self._last_alarm = 0
        self._quarantine = quarantine

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights.values())

    def __getitem__(self, flight_id: int) -> Flight:
        return self._flights[flight_id]

    def __contains__(self, flight_id: int) -> bool:
        return flight_id in self._flights

    @property
    def waiting(self) -> int:
        """Waiters over all flights."""
        return self._waiting

    @property
    def wake_at(self) -> float:
        """When :meth:`tick` may have something to do, in seconds; infinity for never. Sometimes too early."""
        return self._alarms[0][0] if self._alarms else math.inf

    # -- Offers ------------------------------------------------------------------------------------------------------

    def openings(self, wants: Sequence[tuple[bytes, Need]]) -> list[int]:
        """Return which of a request's misses would open a flight, as positions; nothing changes.

        Raises
        ------
        mmprep.errors.Busy
            There is no room for so many waiters.
        """
        if self._waiting + len(wants) > self._max_waiting:
            raise self._crowded()
        found: list[int] = []
        opened: set[tuple[bytes, Need]] = set()
        for position, want in enumerate(wants):
            key, need = want
            if self._find(key, need) is None and not any((key, given) in opened for given in _GIVEN_BY[need]):
                opened.add(want)
                found.append(position)
        return found

    def join(
        self,
        key: bytes,
        need: Need,
        call: Call,
        *,
        modality: str,
        cost: int,
        priority: int,
        deadline: float,
        now: float,
        sends: bool = True,
    ) -> Joined:
        """Let a call wait for an item: join the flight for it, or open one and be its uploader.

        A call that joins a flight again stays one waiter, with the larger need, the higher priority, the later deadline.

        Parameters
        ----------
        cost:
            Estimated pixels; the first call's counts.
        priority:
            Lower is more urgent.
        deadline, now:
            Monotonic seconds of the writer.
        sends:
            Whether the call's peer has the bytes. One that has not can only join: :meth:`openings` says beforehand.

        Raises
        ------
        mmprep.errors.MediaError
            The key is in quarantine.
        mmprep.errors.Busy
            There is no room for another waiter.
        """
        if (refusal := self._quarantine.refusal(key, now)) is not None:
            raise refusal
        flight = self._find(key, need)
        if flight is not None and call in flight.waiters:
            flight.waiters[call].sends |= sends
            self._join_again(flight, flight.waiters[call], need, priority, deadline)
            return Joined(flight.id, False, self._raise_priority(flight, priority))
        if self._waiting >= self._max_waiting:
            raise self._crowded()
        if flight is not None:
            if not flight.waiters:
                flight.priority = priority  # what those who left wanted does not count any more
            self._add_waiter(flight, Waiter(call, need, priority, deadline, sends=sends))
            return Joined(flight.id, False, self._raise_priority(flight, priority))
        assert sends, "a call without the bytes would open a flight"
        self._last_id += 1
        upload_deadline = now + self._upload_seconds
        flight = Flight(self._last_id, key, need, modality, cost, call, upload_deadline, priority, {})
        self._flights[flight.id] = self._by_key[need][key] = flight
        self._set_alarm(upload_deadline, flight.id, None)
        self._add_waiter(flight, Waiter(call, need, priority, deadline, True))
        return Joined(flight.id, True, None)

    # -- The way of a flight -----------------------------------------------------------------------------------------

    def uploaded(self, flight_id: int, peer: str, nbytes: int) -> bool:
        """Take a medium's bytes; ``False``: not wanted, or not from this peer any more; drop them.

        On ``True`` the writer puts the flight into the queue and keeps the bytes until the flight ends.
        """
        flight = self._flights.get(flight_id)
        if flight is None or flight.state != "wanted" or flight.uploader[0] != peer:
            return False
        flight.state = "queued"
        flight.nbytes = nbytes
        return True

    def started(self, flight_id: int, lane: int) -> None:
        """A lane took a flight out of the queue."""
        flight = self._flights[flight_id]
        assert flight.state == "queued", f"flight {flight_id} is {flight.state}, a lane can only take a queued one"
        flight.state = "running"
        flight.lane = lane

    def published(self, flight_id: int, lane: int) -> list[Waiter] | None:
        """The result is there: the flight ends. Returns who gets it, with what each needs."""
        flight = self._at(flight_id, lane)
        if flight is None:
            return None
        if flight.need != "plan":
            self._quarantine.forgive(flight.key)
        return self._end(flight)

    def failed(self, flight_id: int, lane: int | None) -> list[Waiter] | None:
        """The flight ends with an error that the writer knows. Returns who gets it.

        ``lane`` is the one that reports it, or ``None`` where the writer gives up a flight that no lane has.
        """
        flight = self._at(flight_id, lane)
        return None if flight is None else self._end(flight)

    def refused(self, flight_id: int, lane: int | None, now: float) -> list[Action] | None:
        """The bytes are not those that were offered: the uploader fails, another waiter is asked.

        ``lane`` is the one that found it, or ``None`` where the writer refuses the bytes of a wanted flight.
        """
        flight = self._at(flight_id, lane)
        if flight is None:
            return None
        flight.state, flight.lane, flight.nbytes = "wanted", None, 0
        actions: list[Action] = []
        if flight.uploader in flight.waiters:
            self._leave(flight, flight.uploader)
            actions.append(Fail(flight_id, (flight.uploader,), _other_bytes(), not flight.waiters))
        if flight.waiters:
            self._settle(flight, now, actions, _other_bytes())
        else:
            self._end(flight)
            if not actions:
                actions.append(Abandon(flight_id, None))
        return actions

    def lane_lost(self, flight_id: int, lane: int, now: float, why: str = CRASHED) -> Retry | Fail | Abandon | None:
        """The lane died over the flight, or was killed: try again, or fail and put the key into quarantine.

        ``why`` is for those who wait, as in :meth:`Quarantine.strike <.admission.Quarantine.strike>`.
        A flight without waiters is not tried again: the answer is ``Abandon`` then.
        """
        flight = self._at(flight_id, lane)
        if flight is None:
            return None
        refusal = self._quarantine.strike(flight.key, now, why)
        if refusal is not None:
            return Fail(flight_id, tuple(waiter.call for waiter in self._end(flight)), refusal, True)
        if not flight.waiters:
            self._end(flight)
            return Abandon(flight_id, None)
        flight.state, flight.lane = "queued", None
        return Retry(flight_id)

    # -- Leaving -----------------------------------------------------------------------------------------------------

    def cancel(self, call: Call, now: float) -> list[Action]:
        """The call does not want its items any more; it gets no outcome. Unknown calls change nothing."""
        flights = self._by_peer.get(call[0], {}).get(call[1], {})
        return self._remove([(flight, call) for flight in flights.values()], now)

    def peer_gone(self, peer: str, now: float) -> list[Action]:
        """The peer is gone with all its calls."""
        calls = self._by_peer.get(peer, {})
        return self._remove(
            [(flight, (peer, number)) for number, flights in calls.items() for flight in flights.values()], now
        )

    def tick(self, now: float) -> list[Action]:
        """Time has passed: expire waiters, replace late uploaders."""
        self._quarantine.prune(now)
        actions: list[Action] = []
        left: dict[int, Flight] = {}
        late: list[Flight] = []
        while self._alarms and self._alarms[0][0] <= now:
            when, _, flight_id, call = heapq.heappop(self._alarms)
            flight = self._flights.get(flight_id)
            if flight is None or not _is_due(flight, call, when):
                continue
            if call is None:
                late.append(flight)
            else:
                self._leave(flight, call)
                left[flight_id] = flight
                actions.append(Expire(call, flight_id))
        for flight in left.values():
            self._settle(flight, now, actions)
        for flight in late:
            if flight.id in self._flights and flight.upload_deadline <= now:
                self._ask_another(flight, now, actions, _late_bytes())
        return actions

    # -- Steps -------------------------------------------------------------------------------------------------------

    def _find(self, key: bytes, need: Need) -> Flight | None:
        for given in _GIVEN_BY[need]:
            if (flight := self._by_key[given].get(key)) is not None:
                return flight
        return None

    def _at(self, flight_id: int, lane: int | None) -> Flight | None:
        flight = self._flights.get(flight_id)
        return flight if flight is not None and flight.lane == lane else None

    def _add_waiter(self, flight: Flight, waiter: Waiter) -> None:
        call = waiter.call
        flight.waiters[call] = waiter
        self._by_peer.setdefault(call[0], {}).setdefault(call[1], {})[flight.id] = flight
        self._waiting += 1
        self._set_alarm(waiter.deadline, flight.id, call)

    def _join_again(self, flight: Flight, waiter: Waiter, need: Need, priority: int, deadline: float) -> None:
        if len(_GIVEN_BY[need]) < len(_GIVEN_BY[waiter.need]):
            waiter.need = need
        waiter.priority = min(waiter.priority, priority)
        if deadline > waiter.deadline:
            waiter.deadline = deadline
            self._set_alarm(deadline, flight.id, waiter.call)

    def _raise_priority(self, flight: Flight, priority: int) -> int | None:
        if priority >= flight.priority:
            return None
        flight.priority = priority
        return priority if flight.state == "queued" else None

    def _set_alarm(self, when: float, flight_id: int, call: Call | None) -> None:
        self._last_alarm += 1
        heapq.heappush(self._alarms, (when, self._last_alarm, flight_id, call))
        if len(self._alarms) > self._max_alarms:
            self._alarms = [
                alarm
                for alarm in self._alarms
                if (flight := self._flights.get(alarm[2])) is not None and _is_due(flight, alarm[3], alarm[0])
            ]
            heapq.heapify(self._alarms)
            self._max_alarms = 2 * len(self._alarms) + _SLACK

    def _remove(self, leaving: Iterable[tuple[Flight, Call]], now: float) -> list[Action]:
        left: dict[int, Flight] = {}
        for flight, call in leaving:
            self._leave(flight, call)
            left[flight.id] = flight
        actions: list[Action] = []
        for flight in left.values():
            self._settle(flight, now, actions)
        return actions

    def _leave(self, flight: Flight, call: Call) -> None:
        """Forget that the call waits for the flight, which is to be settled or ended then."""
        del flight.waiters[call]
        peer, number = call
        calls = self._by_peer[peer]
        flights = calls[number]
        del flights[flight.id]
        self._waiting -= 1
        if not flights:
            del calls[number]
            if not calls:
                del self._by_peer[peer]

    def _settle(
        self, flight: Flight, now: float, actions: list[Action], error: errors.MmprepError | None = None
    ) -> None:
        """Give a flight that waiters have left what it needs to go on, or end it."""
        if not flight.waiters:
            actions.append(Abandon(flight.id, flight.lane))
            if flight.lane is None:
                self._end(flight)
            return
        # Mostly the first waiter has it, so that leaving costs the same however many wait.
        if all(waiter.priority > flight.priority for waiter in flight.waiters.values()):
            flight.priority = min(waiter.priority for waiter in flight.waiters.values())
            if flight.state == "queued":
                actions.append(Reprioritise(flight.id, flight.priority))
        if flight.state == "wanted" and flight.uploader not in flight.waiters:
            self._ask_another(flight, now, actions, error or _late_bytes())

    def _ask_another(self, flight: Flight, now: float, actions: list[Action], error: errors.MmprepError) -> None:
        """Make a waiter that was never asked the uploader, of another peer if possible; fail if there is none."""
        silent = flight.uploader[0]
        waiters = flight.waiters.values()
        chosen = next((waiter for waiter in waiters if waiter.may_be_asked and waiter.call[0] != silent), None)
        chosen = chosen or next((waiter for waiter in waiters if waiter.may_be_asked), None)
        if chosen is None:
            actions += self._fail_unsent(flight, error)
            return
        chosen.asked = True
        flight.uploader = chosen.call
        flight.upload_deadline = now + self._upload_seconds
        self._set_alarm(flight.upload_deadline, flight.id, None)
        actions.append(Ask(flight.id, chosen.call))

    def _fail_unsent(self, flight: Flight, error: errors.MmprepError) -> list[Action]:
        """End a flight whose bytes nobody sends; the error is for those who could have."""
        waiters = self._end(flight)
        senders = tuple(waiter.call for waiter in waiters if waiter.sends)
        others = tuple(waiter.call for waiter in waiters if not waiter.sends)
        if not others:
            return [Fail(flight.id, senders, error, True)]
        gone = Fail(flight.id, others, nobody_has_it(), True)
        return [Fail(flight.id, senders, error, False), gone] if senders else [gone]

    def _end(self, flight: Flight) -> list[Waiter]:
        del self._flights[flight.id]
        del self._by_key[flight.need][flight.key]
        waiters = list(flight.waiters.values())
        for waiter in waiters:
            self._leave(flight, waiter.call)
        return waiters

    def _crowded(self) -> errors.Busy:
        return errors.Busy("Too many requests wait for media; send this one again later.", retry_after=RETRY_AFTER)

    # -- Invariants --------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every invariant.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        for flight in self:
            self._validate_flight(flight)
        indexed = {flight.id for flights in self._by_key.values() for flight in flights.values()}
        assert indexed == set(self._flights), "the index by key and the flights differ"
        links = {
            (flight_id, (peer, number))
            for peer, calls in self._by_peer.items()
            for number, flights in calls.items()
            for flight_id in flights
        }
        waiters = {(flight.id, call) for flight in self for call in flight.waiters}
        assert links == waiters, "the index by peer and the waiters differ"
        assert all(all(calls.values()) and calls for calls in self._by_peer.values()), "an empty index entry stayed"
        assert self._waiting == len(waiters) <= self._max_waiting, "the number of waiters is wrong or above its bound"
        assert len(self._alarms) <= self._max_alarms, "outdated alarms pile up"

    def _validate_flight(self, flight: Flight) -> None:
        name = f"flight {flight.id}"
        assert self._by_key[flight.need].get(flight.key) is flight, f"{name} is not found by its key"
        assert (flight.lane is not None) == (flight.state == "running"), f"{name} runs without a lane, or has one idly"
        assert flight.waiters or flight.state == "running", f"nobody waits for {name}, and it does not run"
        alarms = {alarm[3] for alarm in self._alarms if alarm[2] == flight.id and _is_due(flight, alarm[3], alarm[0])}
        if flight.state == "wanted":
            assert flight.uploader in flight.waiters, f"{name} has no uploader"
            assert flight.waiters[flight.uploader].asked, f"the uploader of {name} was not asked"
            assert flight.waiters[flight.uploader].sends, f"the uploader of {name} has no bytes"
            assert None in alarms, f"nothing ends the wait for the uploader of {name}"
        assert set(flight.waiters) <= alarms, f"nothing expires a waiter of {name}"
        if flight.waiters:
            highest = min(waiter.priority for waiter in flight.waiters.values())
            assert flight.priority == highest, f"{name} has another priority than the highest of its waiters"
        given = all(flight.need in _GIVEN_BY[waiter.need] for waiter in flight.waiters.values())
        assert given, f"{name} cannot give all that is waited for"


def _is_due(flight: Flight, call: Call | None, when: float) -> bool:
    """Whether an alarm set for this time is still meant."""
    if call is None:
        return flight.state == "wanted" and flight.upload_deadline == when
    waiter = flight.waiters.get(call)
    return waiter is not None and waiter.deadline == when


def _late_bytes() -> errors.MmprepError:
    return errors.DeadlineExceeded("The medium's bytes did not arrive in time; send the request again.")


def _other_bytes() -> errors.MmprepError:
    return errors.ProtocolError(
        "The bytes sent for this medium are not those that were offered: their digest or size differs."
    )
