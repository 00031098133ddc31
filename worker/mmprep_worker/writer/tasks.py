"""What lanes work on: uploaded media, their queue, and each lane's task. A part of the writer's state machine.

A lane has one task at a time and speaks about it: it asks for an extent, fills it, or fails. Rules:

- The bytes of a medium are kept from their upload until the flight ends, so that a lost lane's task can run again.
- An item goes into the ring; where that has no room for it, into a segment of its own (a spill); where that cannot be, it
  travels inline; and where the budget for that is used up, those who wait are told to try again. Nobody waits for room.
- What was injected is copied by a lane as what is computed is written by one. It goes into the ring or a spill, in the place
  of what was there under its key, or is refused.
- A lane that breaks the protocol is killed like one that is beyond its time: it gets no further task, and nothing that
  it still says counts. What it was granted is free again when its exit is confirmed, and not before.
- An upload has exactly the size that was offered: admission has reserved for that much and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from mmprep import errors
from mmprep.items import align
from mmprep.metrics import Metrics
from mmprep.wire import messages
from mmprep.wire.codec import CONTROL_LIMIT
from mmprep.wire.messages import HEAVY_COST
from mmprep_worker.ring.directory import Entry
from mmprep_worker.ring.ring import Grant, Ring
from mmprep_worker.ring.spills import Spill
from mmprep_worker.scheduling import flight as flight_events
from mmprep_worker.scheduling.admission import CRASHED, Admission
from mmprep_worker.scheduling.flight import IN_RING, Call, Flight, Need
from mmprep_worker.scheduling.flights import Flights
from mmprep_worker.scheduling.queue import Entry as Queued
from mmprep_worker.scheduling.queue import FairQueue
from mmprep_worker.writer.holds import Holds
from mmprep_worker.writer.plans import PlanStore
from mmprep_worker.writer.state import Action, Ended, KillLane, PendingCall, Result, ToLane
from mmprep_worker.writer.transfers import Transfer, Transfers

#: The largest packed metadata of an item, in bytes: an answer about one item has to fit into a control frame.
MAX_METADATA = CONTROL_LIMIT - 1024

#: What follows for flights from an event here.
Step: TypeAlias = flight_events.Action | Ended


class _Medium(NamedTuple):
    """The bytes of a flight.

    Attributes
    ----------
    put: their header.
    since: when they began to wait for a lane.
    started: when a lane got them.
    """

    medium: Any
    put: messages.Put
    since: float
    started: float = 0.0


class LaneState:
    """One lane as the writer sees it.

    Attributes
    ----------
    heavy_allowed: whether it takes slow work.
    ready: it is warm.
    killed: it was told to die; its exit will be reported.
    deadline: when it is killed, in seconds.
    grant: where its item goes: an extent of the ring, a spill, or inline; ``None`` while it has not asked.
    why: what its item's clients are told if it ends now.
    """

    __slots__ = ("deadline", "flight", "grant", "heavy_allowed", "killed", "pid", "ready", "why")

    def __init__(self, *, heavy_allowed: bool) -> None:
        self.heavy_allowed = heavy_allowed
        self.ready = False
        self.killed = False
        self.pid = 0
        self.flight: int | None = None
        self.grant: Grant | Spill | Transfer | None = None
        self.deadline = math.inf
        self.why = CRASHED

    @property
    def name(self) -> str:
        """``starting``, ``idle`` or ``busy``."""
        if self.flight is not None:
            return "busy"
        return "idle" if self.idle else "starting"

    @property
    def idle(self) -> bool:
        """Whether it can take a task."""
        return self.ready and not self.killed and self.flight is None

    def end_task(self) -> None:
        """The task is over; what was granted for it is published or given back."""
        self.flight, self.grant, self.deadline = None, None, math.inf


class Tasks:
    """Media, queue and lanes; the arguments are those of :class:`~.core.WriterCore`, and shared with it.

    Parameters
    ----------
    holds, calls:
        What the calls that wait for a flight hold already.
    spill_name:
        Returns the name of the segment of an epoch, ``None`` where the epoch cannot be used.
    out:
        Where actions go, in order.
    """

    def __init__(
        self,
        *,
        lanes: int,
        ring: Ring,
        flights: Flights,
        transfers: Transfers,
        queue: FairQueue,
        admission: Admission,
        plans: PlanStore,
        metrics: Metrics,
        task_seconds: float,
        holds: Holds,
        calls: Mapping[Call, PendingCall],
        new_id: Callable[[], bytes],
        spill_name: Callable[[bytes], str | None],
        out: list[Action],
    ) -> None:
        # The first lane is kept for small requests, unless it is the only one.
        self.lanes = [LaneState(heavy_allowed=number > 0 or lanes == 1) for number in range(lanes)]
        self._ring = ring
        self._flights = flights
        self._transfers = transfers
        self._queue = queue
        self._admission = admission
        self._plans = plans
        self._metrics = metrics
        self._task_seconds = task_seconds
        self._holds = holds
        self._calls = calls
        self._new_id = new_id
        self._spill_name = spill_name
        self._out = out
        #: Nothing may be granted yet, so no lane gets work.
        self.paused = False
        #: By flight.
        self._media: dict[int, _Medium] = {}

    @property
    def wake_at(self) -> float:
        """When :meth:`tick` has something to do."""
        return min([lane.deadline for lane in self.lanes], default=math.inf)

    # --- media ----------------------------------------------------------------------------------------------------

    def upload(self, flight: Flight, put: messages.Put, medium: Any, nbytes: int, now: float) -> list[Step]:
        """Take the bytes of a wanted flight from its uploader."""
        if nbytes != self._admission.reservation(flight.id)[1]:
            return list(self._flights.refused(flight.id, None, now) or ())
        taken = self._flights.uploaded(flight.id, flight.uploader[0], nbytes)
        assert taken, f"flight {flight.id} is {flight.state}, not wanted"
        self._media[flight.id] = _Medium(medium, put, now)
        self._enqueue(flight)
        return []

    def drop(self, flight_id: int, now: float) -> None:
        """The flight has ended: let go of all that was kept for it."""
        self._media.pop(flight_id, None)
        self._queue.remove(flight_id)
        self._admission.release(flight_id, now)

    def _enqueue(self, flight: Flight) -> None:
        """Put a flight into the queue. It has room for all that admission let in; who opened the flight pays."""
        client = self._admission.reservation(flight.id)[0]
        heavy = flight.cost >= HEAVY_COST
        self._queue.push(Queued(flight.id, client, flight.cost, flight.priority, flight.nbytes, heavy))

    def dispatch(self, now: float) -> None:
        """Give idle lanes work."""
        if self.paused or not len(self._queue):
            return
        for number, lane in enumerate(self.lanes):
            if not lane.idle:
                continue
            entry = self._queue.pop(heavy_allowed=lane.heavy_allowed)
            if entry is None:
                continue
            flight = self._flights[entry.flight_id]
            self._flights.started(flight.id, number)
            lane.flight = flight.id
            lane.deadline = now + self._task_seconds
            medium, put, since, _ = self._media[flight.id]
            self._media[flight.id] = _Medium(medium, put, since, now)
            self._metrics.observe("mmprep_stage_seconds", now - since, stage="queue")
            work: messages.Work = "tensors" if flight.need == "apart" else flight.need
            task = messages.Task(flight.id, work, flight.modality, put.hasher, put.digest, put.options)
            self._out.append(ToLane(number, task, medium))

    # --- lanes ----------------------------------------------------------------------------------------------------

    def ready(self, number: int, pid: int) -> bool:
        """A lane is warm; return whether all are."""
        lane = self.lanes[number]
        lane.ready, lane.pid = True, pid
        return all(other.ready for other in self.lanes)

    def message(self, number: int, message: Any, frames: Sequence[Any], now: float) -> list[Step]:
        """Take a lane's message about its task; one about another task, or of a lane given up, is passed over."""
        lane = self.lanes[number]
        if lane.killed or lane.flight is None or message.task != lane.flight:
            return []
        flight = self._flights[lane.flight]
        match message:
            case messages.AskExtent() if flight.need != "plan" and lane.grant is None and any(frames[:1]):
                return self._grant(number, lane, flight, frames[0], message.tensor_length)
            case messages.NoSpill() if isinstance(lane.grant, Spill):
                return self._no_spill(number, lane, flight, lane.grant)
            case messages.Filled() if isinstance(lane.grant, Grant | Spill):
                return self._filled(number, lane, flight, lane.grant, message, now=now)
            case messages.Inlined() if isinstance(lane.grant, Transfer) and [lane.grant.nbytes] == [*map(len, frames)]:
                self._transfers.fill(lane.grant, frames[0])
                self._observe(message)
                return self._published(number, lane, flight, lane.grant, self._times(flight, now, message))
            case messages.Planned() if flight.need == "plan" and len(frames) == 1 and len(frames[0]) <= MAX_METADATA:
                self._plans.put(flight.key, frames[0])
                return self._published(number, lane, flight, frames[0], self._times(flight, now))
            case messages.TaskFailed():
                return self._task_failed(number, lane, message.fault.error(), now)
        self.broke_the_protocol(number)
        return []

    def broke_the_protocol(self, number: int) -> None:
        """A lane said what no lane may say."""
        self._kill(number, "the process that decoded it gave a wrong answer")

    def exited(self, number: int, now: float) -> list[Step]:
        """A lane's exit is confirmed, whatever it was doing: its extent is free, its task is tried again or over."""
        lane = self.lanes[number]
        self.lanes[number] = LaneState(heavy_allowed=lane.heavy_allowed)
        self._metrics.count("mmprep_lane_restarts_total")
        self._give_back(lane.grant)
        if lane.flight is None:
            return []
        outcome = self._flights.lane_lost(lane.flight, number, now, lane.why)
        if isinstance(outcome, flight_events.Retry):
            medium, put, _, _ = self._media[lane.flight]
            self._media[lane.flight] = _Medium(medium, put, now)
            self._enqueue(self._flights[lane.flight])
            return []
        return [] if outcome is None else [outcome]

    def tick(self, now: float) -> None:
        """Kill the lanes that are beyond their time."""
        for number, lane in enumerate(self.lanes):
            if lane.deadline <= now:
                self._kill(number, f"it took longer than {self._task_seconds:g} seconds")

    def _kill(self, number: int, why: str) -> None:
        lane = self.lanes[number]
        lane.deadline = math.inf
        if not lane.killed:
            lane.killed, lane.why = True, why
            self._out.append(KillLane(number))

    # --- room -----------------------------------------------------------------------------------------------------

    def _grant(self, number: int, lane: LaneState, flight: Flight, meta: bytes, tensor_len: int) -> list[Step]:
        if len(meta) > MAX_METADATA:
            large = errors.TooLarge(f"the item's metadata have {len(meta)} bytes, above the limit of {MAX_METADATA}")
            return self._deny(number, lane, flight, large)
        if flight.need == "injected":
            self._ring.remove(flight.key)  # what this takes the place of; its plan goes when this one is there
        else:
            self._plans.put(flight.key, meta)  # those who need no more get it, even where there is no room for tensors
        length = align(len(meta)) + tensor_len
        fitting = [self._holds.may_fit(self._calls[call], align(length)) for call in flight.waiters]
        in_ring = flight.need in IN_RING and length <= self._ring.max_object_size and (any(fitting) or not fitting)
        granted = (
            (in_ring and all(fitting) and self._in_ring(number, lane, flight, meta, tensor_len))
            or self._in_spill(number, lane, flight, meta, tensor_len)
            or self._inline(number, lane, flight, meta, tensor_len)
            or (in_ring and not all(fitting) and self._in_ring(number, lane, flight, meta, tensor_len))
        )
        return [] if granted else self._deny(number, lane, flight, self._no_room(flight, len(meta), tensor_len))

    def _in_ring(self, number: int, lane: LaneState, flight: Flight, meta: bytes, tensor_len: int) -> bool:
        grant = self._ring.grant(flight.key, len(meta), tensor_len)
        if grant is None:
            return False
        lane.grant = grant
        self._out.append(ToLane(number, messages.Granted(flight.id, grant.offset, grant.length)))
        return True

    def _in_spill(self, number: int, lane: LaneState, flight: Flight, meta: bytes, tensor_len: int) -> bool:
        if not self._ring.could_spill(len(meta), tensor_len):
            return False
        epoch = self._new_id() + self._ring.incarnation.to_bytes(4, "big")
        name = self._spill_name(epoch)
        spill = None if name is None else self._ring.grant_spill(flight.key, meta, tensor_len, epoch)
        if name is None or spill is None:
            return False
        lane.grant = spill
        granted = messages.GrantedSpill(
            flight.id, name, epoch, self._ring.incarnation, flight.key, spill.generation, spill.length
        )
        self._out.append(ToLane(number, granted))
        return True

    def _inline(self, number: int, lane: LaneState, flight: Flight, meta: bytes, tensor_len: int) -> bool:
        if flight.need == "injected":
            return False  # it was sent to be kept
        transfer = self._transfers.reserve(flight.id, tensor_len, meta)
        if transfer is None:
            return False
        lane.grant = transfer
        self._out.append(ToLane(number, messages.GrantedInline(flight.id)))
        return True

    def _no_spill(self, number: int, lane: LaneState, flight: Flight, spill: Spill) -> list[Step]:
        """There is no memory for another segment: the item travels inline, or not at all."""
        tensor_len = spill.length - align(spill.meta_len)
        lane.grant = None
        self._ring.abort_spill(spill)
        if self._inline(number, lane, flight, spill.meta, tensor_len):
            return []
        return self._deny(number, lane, flight, self._no_room(flight, spill.meta_len, tensor_len))

    def _no_room(self, flight: Flight, meta_len: int, tensor_len: int) -> errors.MmprepError:
        """Return the error for those who wait: to be tried again, unless nothing that others let go of could help any."""
        if any(self._could_fit(self._calls[w.call], w.need, meta_len, tensor_len) for w in flight.waiters.values()):
            return errors.Busy("the cache is full of content in use; try again later", retry_after=1.0)
        return errors.TooLarge(
            f"the processed item has {tensor_len} bytes, more than there can be room for beside the request's other items: "
            "send smaller or fewer media, or raise --cache-size, --spill-size or --inline-size"
        )

    def _could_fit(self, pending: PendingCall, need: Need, meta_len: int, tensor_len: int) -> bool:
        """Whether there could be room for a call beside what it holds itself, or what is filled for it."""
        length = align(meta_len) + tensor_len
        if need in IN_RING and length <= self._ring.max_object_size and self._holds.may_fit(pending, align(length)):
            return True
        spilled, inline = self._holds.apart(pending)
        for lane in self.lanes:
            if lane.flight in pending.by_flight:
                spilled += lane.grant.extent if isinstance(lane.grant, Spill) else 0
                inline += lane.grant.nbytes if isinstance(lane.grant, Transfer) else 0
        could_spill = self._ring.could_spill(meta_len, tensor_len, beside=spilled)
        return could_spill or (need != "injected" and tensor_len + inline <= self._transfers.max_bytes)

    def _deny(self, number: int, lane: LaneState, flight: Flight, error: errors.MmprepError) -> list[Step]:
        self._out.append(ToLane(number, messages.Denied(flight.id)))
        return self._failed(number, lane, flight.id, error)

    def _give_back(self, grant: Grant | Spill | Transfer | None) -> None:
        """Free what was granted to a lane that surely writes no more."""
        match grant:
            case Grant():
                self._ring.abort(grant.slot, grant.generation)
            case Spill():
                self._ring.abort_spill(grant)
            case Transfer():
                self._transfers.landed(grant)

    def _filled(
        self,
        number: int,
        lane: LaneState,
        flight: Flight,
        grant: Grant | Spill,
        filled: messages.Filled,
        *,
        now: float,
    ) -> list[Step]:
        if isinstance(grant, Spill):
            entry: Entry = self._ring.publish_spill(grant)
        else:
            entry = self._ring.publish(grant.slot, grant.generation)
        if flight.need == "injected":
            self._plans.put(flight.key, self._holds.metadata(entry))
        self._observe(filled)
        times = self._times(flight, now, filled)
        beside = times.done_us - times.started_us - filled.decode_us - filled.process_us
        self._metrics.observe("mmprep_stage_seconds", max(0, beside) / 1e6, stage="publish")
        return self._published(number, lane, flight, entry, times)

    def _times(
        self, flight: Flight, now: float, done: messages.Filled | messages.Inlined | None = None
    ) -> messages.StageTimes:
        """Return when a flight that is done was worked on."""
        since, started = (int(1e6 * moment) for moment in self._media[flight.id][2:])
        spent = (0, 0) if done is None else (done.decode_us, done.process_us)
        return messages.StageTimes(since, started, int(1e6 * now), *spent)

    def _observe(self, done: messages.Filled | messages.Inlined) -> None:
        self._metrics.observe("mmprep_stage_seconds", done.decode_us / 1e6, stage="decode")
        self._metrics.observe("mmprep_stage_seconds", done.process_us / 1e6, stage="process")

    def _published(
        self, number: int, lane: LaneState, flight: Flight, result: Result, times: messages.StageTimes
    ) -> list[Step]:
        lane.end_task()
        waiters = self._flights.published(flight.id, number) or []
        return [Ended(flight.id, tuple(waiter.call for waiter in waiters), result, times)]

    def _task_failed(self, number: int, lane: LaneState, error: errors.MmprepError, now: float) -> list[Step]:
        """The lane says that it writes no more, so what it was granted is free."""
        flight_id, grant = lane.flight, lane.grant
        assert flight_id is not None
        self._give_back(grant)
        if not isinstance(error, errors.ProtocolError):
            return self._failed(number, lane, flight_id, error)
        lane.end_task()
        self._media.pop(flight_id)
        return list(self._flights.refused(flight_id, number, now) or ())

    def _failed(self, number: int, lane: LaneState, flight_id: int, error: errors.MmprepError) -> list[Step]:
        lane.end_task()
        waiters = self._flights.failed(flight_id, number) or []
        return [Ended(flight_id, tuple(waiter.call for waiter in waiters), error)]

    # --- invariants -----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every invariant between flights, media, queue, reservations and lanes.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        kept = {flight.id for flight in self._flights if flight.state != "wanted"}
        assert self._media.keys() == kept, "bytes are kept for flights that do not need them, or missing"
        queued = {flight.id for flight in self._flights if flight.state == "queued"}
        assert len(self._queue) == len(queued), "the queue holds what does not wait for a lane"
        assert all(flight_id in self._queue for flight_id in queued), "a flight that waits for a lane is not queued"
        assert len(self._admission) == len(self._flights), "admission holds flights that have ended, or lacks some"
        for flight in self._flights:
            assert flight.id in self._admission, f"flight {flight.id} has no reservation"
            nbytes = self._admission.reservation(flight.id)[1]
            assert flight.state == "wanted" or flight.nbytes == nbytes, f"flight {flight.id} has another size"
        running = {flight.lane: flight.id for flight in self._flights if flight.state == "running"}
        assert running == {n: lane.flight for n, lane in enumerate(self.lanes) if lane.flight is not None}, (
            "the lanes' tasks and the running flights differ"
        )
        for number, lane in enumerate(self.lanes):
            self._validate_lane(number, lane)
        stats, grants = self._ring.stats(), [lane.grant for lane in self.lanes]
        granted = sum(align(grant.length) for grant in grants if isinstance(grant, Grant))
        assert granted == stats.filling, "a granted extent belongs to no lane"
        spilling = sum(isinstance(grant, Spill) for grant in grants)
        assert spilling == stats.spills.filling, "a granted spill belongs to no lane"
        flying = {transfer.number for transfer in self._transfers if transfer.flying}
        assert flying == {grant.number for grant in grants if isinstance(grant, Transfer)}, "a transfer has no lane"

    def _validate_lane(self, number: int, lane: LaneState) -> None:
        name = f"lane {number}"
        busy = lane.flight is not None
        assert busy or lane.grant is None, f"{name} has an extent and no task"
        assert lane.ready or not busy, f"{name} has a task and is not warm"
        due = busy and not lane.killed
        assert due == (lane.deadline < math.inf), f"{name} has a task without a deadline, or a deadline without one"
        if lane.grant is not None:
            assert lane.flight is not None
            need = self._flights[lane.flight].need
            assert need != "plan", f"{name} has an extent for a plan"
            assert need in IN_RING or not isinstance(lane.grant, Grant), f"{name} fills the ring for what must be apart"
            assert need != "injected" or not isinstance(lane.grant, Transfer), f"{name} sends what was sent to be kept"
        if lane.idle and not self.paused:
            waiting = [flight for flight in self._flights if flight.state == "queued"]
            assert all(f.cost >= HEAVY_COST and not lane.heavy_allowed for f in waiting), f"{name} is idle beside work"
