"""The writer as a state machine: messages, lane events and ``now`` in, actions out.

A call is an offer of a frontend. Its hits are pinned at once, its misses wait for flights, and when the last of them has
ended the call gets its one answer. The holds then either become leases of a backend or stay pinned until the frontend
says that it has read them.

WARNING: the shell must write ``ring.take_writes()`` into the directory before it carries out the actions of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from mmprep import errors
from mmprep.metrics import Metrics
from mmprep.wire import messages
from mmprep.wire.codec import pack
from mmprep.wire.messages import ItemAnswer
from mmprep_worker.ring.directory import Entry
from mmprep_worker.ring.ring import Ring
from mmprep_worker.scheduling import flight as flight_events
from mmprep_worker.scheduling.admission import Admission, Quarantine
from mmprep_worker.scheduling.flight import Waiter
from mmprep_worker.scheduling.flights import Flights
from mmprep_worker.scheduling.queue import Entry as Queued
from mmprep_worker.scheduling.queue import FairQueue
from mmprep_worker.writer.plans import PlanStore
from mmprep_worker.writer.state import (
    Action,
    KillLane,
    LaneState,
    MakeAnswer,
    Peer,
    PendingCall,
    Send,
    ToLane,
    failing,
)

#: Estimated pixels above which an item is slow work, which one lane never takes.
HEAVY_COST = 16_000_000

#: A request's hits may pin this part of the ring, so that two requests can always go on side by side.
_PIN_SHARE = 2


class WriterCore:
    """The state machine of one writer.

    Parameters
    ----------
    read:
        Returns bytes of the segment: ``read(offset, length)``.
    new_id:
        Returns 16 fresh random bytes.
    task_seconds:
        How long a lane may work on one item.
    """

    def __init__(
        self,
        *,
        ring: Ring,
        flights: Flights,
        queue: FairQueue,
        admission: Admission,
        quarantine: Quarantine,
        plans: PlanStore,
        metrics: Metrics,
        segment: messages.SegmentInfo,
        lanes: int,
        lease_seconds: float,
        task_seconds: float,
        read: Callable[[int, int], bytes],
        new_id: Callable[[], bytes],
    ) -> None:
        self.ring = ring
        self.flights = flights
        self.queue = queue
        self.admission = admission
        self.quarantine = quarantine
        self.plans = plans
        self.metrics = metrics
        self.segment = segment
        self.lease_seconds = lease_seconds
        self.card = b""
        self.lanes = [LaneState(heavy_allowed=number > 0) for number in range(lanes)]
        self.peers: dict[bytes, Peer] = {}
        self._task_seconds = task_seconds
        self._read = read
        self._new_id = new_id
        self._media: dict[int, tuple[Any, messages.Put, float]] = {}
        self._calls: dict[tuple[str, int], PendingCall] = {}
        self._out: list[Action] = []
        self._pin_limit = ring.geometry.arena_capacity // _PIN_SHARE

    # --- what the shell calls -------------------------------------------------------------------------------------

    def take_actions(self) -> list[Action]:
        """Return what is to be done since the last call, in order."""
        out, self._out = self._out, []
        return out

    @property
    def wake_at(self) -> float:
        """When :meth:`tick` has something to do, in seconds of ``now``."""
        lease = self.ring.leases.next_deadline()
        lanes = min((lane.deadline for lane in self.lanes), default=math.inf)
        return min(self.flights.wake_at, math.inf if lease is None else lease, lanes)

    def message(self, identity: bytes, message: Any, now: float) -> None:
        """Take a control message of a peer."""
        if isinstance(message, messages.Hello):
            self._hello(identity, message, now)
            return
        peer = self.peers.get(identity)
        if peer is None:
            fault = errors.ProtocolError("the first message of a connection must be a hello")
            self._out.append(Send(identity, messages.Refused(messages.Fault.of(fault))))
            return
        try:
            self._from_peer(peer, message, now)
        except errors.MmprepError as error:
            call = getattr(message, "call", 0)
            self._out.append(Send(identity, messages.Failed(call, messages.Fault.of(error))))
        self._dispatch(now)

    def put(self, message: messages.Put, medium: Any, nbytes: int, now: float) -> None:
        """Take the bytes of a wanted medium; those that nobody wants any more are dropped."""
        flight_id = message.flight
        if flight_id not in self.flights:
            return
        flight = self.flights[flight_id]
        uploader = flight.uploader[0]
        peer = self.peers.get(uploader.encode())
        if peer is None or peer.id != message.frontend or not self.flights.uploaded(flight_id, uploader, nbytes):
            return
        self._media[flight_id] = (medium, message, now)
        self._enqueue(flight_id, now)
        self._dispatch(now)

    def lane_ready(self, number: int, pid: int, card: bytes, now: float) -> None:
        """A lane is warm."""
        lane = self.lanes[number]
        lane.ready = True
        lane.pid = pid
        if not self.card and all(other.ready for other in self.lanes):
            self.card = card
            for peer in self.peers.values():
                if peer.role == "frontend":
                    self._out.append(Send(peer.identity, messages.Card(card)))
        self._dispatch(now)

    def from_lane(self, number: int, message: Any, frames: list[bytes], now: float) -> None:
        """Take a lane's message about its task; one about another task is passed over."""
        lane = self.lanes[number]
        if lane.flight is None or message.task != lane.flight:
            return
        match message:
            case messages.AskExtent():
                self._grant(number, lane, frames[0], message.tensor_length, now)
            case messages.Filled():
                self._filled(number, lane, message, now)
            case messages.Planned():
                self._planned(number, lane, frames[0], now)
            case messages.TaskFailed():
                self._task_failed(number, lane, message.fault.error(), now)
        self._dispatch(now)

    def lane_exited(self, number: int, now: float) -> None:
        """A lane's exit is confirmed: its extent is free again, its item is tried once more or quarantined."""
        lane = self.lanes[number]
        flight, grant = lane.flight, lane.grant
        self.lanes[number] = LaneState(heavy_allowed=lane.heavy_allowed)
        self.metrics.count("mmprep_lane_restarts_total")
        if grant is not None:
            self.ring.abort(grant.slot, grant.generation)
        if flight is not None:
            self._lane_lost(flight, number, now)
        self._dispatch(now)

    def peer_gone(self, role: str, peer_id: str, now: float) -> None:
        """A peer's process lock has fallen: its calls, pins and leases end."""
        for peer in [p for p in self.peers.values() if (p.role, p.id) == (role, peer_id)]:
            self._forget(peer, now)
        if role == "backend":
            self.ring.owner_gone(peer_id)
        self._dispatch(now)

    def unreachable(self, identity: bytes, now: float) -> None:
        """A connection is gone; its calls end. Leases stay: they are the process's, not the connection's."""
        peer = self.peers.get(identity)
        if peer is not None:
            self._forget(peer, now)
        self._dispatch(now)

    def tick(self, now: float) -> None:
        """Time has passed."""
        self._carry_out(self.flights.tick(now), now)
        self.ring.tick(now)
        for number, lane in enumerate(self.lanes):
            if lane.deadline <= now:
                lane.deadline = math.inf
                self._out.append(KillLane(number))
        self._dispatch(now)

    # --- peers ----------------------------------------------------------------------------------------------------

    def _hello(self, identity: bytes, hello: messages.Hello, now: float) -> None:
        for peer in [p for p in self.peers.values() if (p.role, p.id) == (hello.role, hello.id)]:
            self._forget(peer, now)
        self.peers[identity] = Peer(identity, hello.role, hello.id, hello.pid)
        self._out.append(
            Send(
                identity,
                messages.WriterWelcome(
                    hello.protocol, self.ring.incarnation, self.segment, int(self.lease_seconds * 1000), self.card
                ),
            )
        )

    def _forget(self, peer: Peer, now: float) -> None:
        del self.peers[peer.identity]
        for call in list(peer.calls.values()):
            self._drop(call)
        self._carry_out(self.flights.peer_gone(peer.identity.decode("ascii", "replace"), now), now)

    def _from_peer(  # noqa: C901 -- one line a message of the protocol
        self, peer: Peer, message: Any, now: float
    ) -> None:
        match message:
            case messages.Offer():
                self._offer(peer, message, now)
            case messages.Unpin():
                self._unpin(peer, message.call)
            case messages.Cancel():
                self._cancel(peer, message.call, now)
            case messages.Release():
                self.ring.release(self._owner(peer, message.owner), message.leases)
                if message.call:
                    self._out.append(Send(peer.identity, messages.Done(message.call)))
            case messages.Renew():
                self._renew(peer, message, now)
            case messages.Acquire():
                self._acquire(peer, message, now)
            case messages.Upgrade():
                if not self.ring.upgrade(peer.id, message.lease, message.kind):
                    raise errors.LeaseLost("the lease is over, or another backend's; ask for the item again")
                self._out.append(Send(peer.identity, messages.Done(message.call)))
            case messages.Clear():
                self.ring.clear()
                self.plans.clear()
                self._out.append(Send(peer.identity, messages.Done(message.call)))

    @staticmethod
    def _owner(peer: Peer, named: str | None) -> str:
        """A backend speaks for itself; a frontend speaks for the backend that an HTTP caller names."""
        if peer.role == "frontend" and named is not None:
            return named
        return peer.id

    def _renew(self, peer: Peer, message: messages.Renew, now: float) -> None:
        held = self.ring.renew(self._owner(peer, message.owner), message.leases, now, self.lease_seconds)
        lost = tuple(lease for lease, alive in held.items() if not alive)
        self._out.append(Send(peer.identity, messages.Renewed(message.call, lost, int(self.lease_seconds * 1000))))

    def _acquire(self, peer: Peer, message: messages.Acquire, now: float) -> None:
        if peer.role != "backend":
            raise errors.InvalidRequest("only a registered backend can hold leases")
        lease = self._new_id()
        self.ring.deliver(
            lease, peer.id, message.slot, message.generation, message.kind, now=now, seconds=self.lease_seconds
        )
        self._out.append(Send(peer.identity, messages.Acquired(message.call, lease, int(self.lease_seconds * 1000))))

    # --- calls ----------------------------------------------------------------------------------------------------

    def _offer(self, peer: Peer, offer: messages.Offer, now: float) -> None:
        if offer.call in peer.calls:
            raise errors.ProtocolError("the call's number is in use")
        if offer.lease is not None and not self._is_backend(offer.lease.backend):
            raise errors.NotFound(
                f"no living backend is registered as {offer.lease.backend!r}; register it before asking for addresses",
                param="backend_id",
            )
        pending = PendingCall(peer, offer)
        misses = self._take_hits(pending)
        try:
            self._take_off(pending, misses, offer, now)
        except errors.MmprepError:
            self.ring.unpin(pending.holder)
            raise
        if pending.missing:
            peer.calls[pending.number] = pending
            self._calls[pending.call] = pending
        else:
            self._finish(pending, now)

    def _is_backend(self, backend_id: str) -> bool:
        return any(peer.role == "backend" and peer.id == backend_id for peer in self.peers.values())

    def _take_hits(self, pending: PendingCall) -> list[int]:
        """Answer and pin what is there; return the positions of what is not."""
        misses = []
        pinned = 0
        for position, item in enumerate(pending.offered):
            self.metrics.count("mmprep_mm_cache_queries_total", modality=item.modality)
            answer = self._planned_hit(item.key) if pending.need == "plan" else None
            if answer is None:
                entry = self.ring.lookup(item.key)
                if entry is not None and pinned + entry.length > self._pin_limit:
                    self.ring.unpin(pending.holder)
                    raise errors.TooLarge("the request's items together are larger than half of the cache; send fewer")
                if entry is not None:
                    pinned += entry.length
                    answer = self._entry_hit(pending, entry)
            if answer is None:
                misses.append(position)
            else:
                self.metrics.count("mmprep_mm_cache_hits_total", modality=item.modality)
                pending.answers[position] = answer
        return misses

    def _planned_hit(self, key: bytes) -> ItemAnswer | None:
        meta = self.plans.get(key)
        return None if meta is None else ItemAnswer("hit", meta=meta)

    def _entry_hit(self, pending: PendingCall, entry: Entry) -> ItemAnswer:
        if pending.need == "plan":
            return ItemAnswer("hit", meta=self._read(entry.offset, entry.meta_len))
        return self._entry_answer(pending, entry, "hit")

    def _entry_answer(self, pending: PendingCall, entry: Entry, outcome: Any) -> ItemAnswer:
        self.ring.pin(pending.holder, entry.slot)
        meta = self._read(entry.offset, entry.meta_len)
        return ItemAnswer(outcome, entry.slot, entry.offset, entry.length, entry.generation, None, meta)

    def _take_off(self, pending: PendingCall, misses: list[int], offer: messages.Offer, now: float) -> None:
        """Let the call wait for flights for what is missing; ask its frontend for what nobody has asked for."""
        if not misses:
            return
        openings = self.flights.openings([(pending.offered[position].key, pending.need) for position in misses])
        self.admission.check(pending.peer.id, [pending.offered[misses[index]].nbytes for index in openings])
        deadline = now + offer.deadline_ms / 1000
        wants = []
        for position in misses:
            item = pending.offered[position]
            try:
                joined = self.flights.join(
                    item.key,
                    pending.need,
                    pending.call,
                    modality=item.modality,
                    cost=item.cost,
                    priority=offer.priority,
                    deadline=deadline,
                    now=now,
                )
            except errors.MediaError as quarantined:
                pending.answers[position] = ItemAnswer("failed", fault=messages.Fault.of(quarantined))
                continue
            if joined.ask:
                self.admission.add(joined.flight_id, pending.peer.id, item.nbytes, now)
                pending.opened.add(joined.flight_id)
                wants.append(messages.Want(position, joined.flight_id))
            else:
                self.metrics.count("mmprep_singleflight_joins_total")
                self.metrics.count("mmprep_mm_cache_hits_total", modality=item.modality)
            if joined.priority is not None:
                self.queue.reprioritise(joined.flight_id, joined.priority)
            pending.by_flight.setdefault(joined.flight_id, []).append(position)
            pending.missing += 1
        if wants:
            self._out.append(Send(pending.peer.identity, messages.Wants(pending.number, tuple(wants))))

    def _finish(self, pending: PendingCall, now: float) -> None:
        """Send the one answer; holds become leases, or stay until the frontend lets go."""
        pending.answered = True
        failed = any(answer is not None and answer.outcome == "failed" for answer in pending.answers)
        if pending.lease is not None and not failed:
            self._lease_out(pending, pending.lease, now)
        if pending.lease is not None or pending.need == "plan" or failed:
            self._drop(pending)
        else:
            pending.peer.calls[pending.number] = pending
            self._calls.pop(pending.call, None)
        frames = tuple(pack(answer) for answer in pending.answers if answer is not None)
        answer = messages.Answer(pending.number, int(self.lease_seconds * 1000))
        self._out.append(Send(pending.peer.identity, answer, frames))

    def _lease_out(self, pending: PendingCall, lease: messages.LeaseTo, now: float) -> None:
        for position, answer in enumerate(pending.answers):
            if answer is None or not answer.length:
                continue
            lease_id = self._new_id()
            try:
                self.ring.deliver(
                    lease_id,
                    lease.backend,
                    answer.slot,
                    answer.generation,
                    lease.kind,
                    now=now,
                    seconds=self.lease_seconds,
                )
            except errors.MmprepError as error:
                pending.answers[position] = ItemAnswer("failed", fault=messages.Fault.of(error))
                continue
            pending.answers[position] = msgspec.structs.replace(answer, lease=lease_id)

    def _unpin(self, peer: Peer, number: int) -> None:
        pending = peer.calls.get(number)
        if pending is not None and pending.answered:
            self._drop(pending)

    def _cancel(self, peer: Peer, number: int, now: float) -> None:
        pending = peer.calls.get(number)
        if pending is not None:
            self._drop(pending)
            self._carry_out(self.flights.cancel(pending.call, now), now)

    def _drop(self, pending: PendingCall) -> None:
        """Forget a call and let go of what it pinned."""
        self.ring.unpin(pending.holder)
        pending.peer.calls.pop(pending.number, None)
        self._calls.pop(pending.call, None)

    def _settle(self, call: tuple[str, int], flight_id: int, make: MakeAnswer, now: float) -> None:
        """Give a waiting call a flight's outcome."""
        pending = self._calls.get(call)
        if pending is None:
            return
        for position in pending.by_flight.pop(flight_id, ()):
            pending.answers[position] = make(pending)
            pending.missing -= 1
        if not pending.missing:
            self._finish(pending, now)

    # --- flights --------------------------------------------------------------------------------------------------

    def _carry_out(self, actions: list[flight_events.Action], now: float) -> None:
        for action in actions:
            match action:
                case flight_events.Ask():
                    self._ask(action)
                case flight_events.Expire():
                    self._expire(action, now)
                case flight_events.Fail():
                    for call in action.calls:
                        self._settle(call, action.flight_id, failing(action.error), now)
                    if action.ended:
                        self._flight_over(action.flight_id, now)
                case flight_events.Abandon():
                    if action.lane is None:
                        self._flight_over(action.flight_id, now)
                case flight_events.Reprioritise():
                    self.queue.reprioritise(action.flight_id, action.priority)

    def _ask(self, action: flight_events.Ask) -> None:
        pending = self._calls.get(action.call)
        if pending is not None:
            positions = pending.by_flight.get(action.flight_id, ())
            wants = tuple(messages.Want(position, action.flight_id) for position in positions[:1])
            self._out.append(Send(pending.peer.identity, messages.Wants(pending.number, wants)))

    def _expire(self, action: flight_events.Expire, now: float) -> None:
        pending = self._calls.get(action.call)
        if pending is not None:
            self._drop(pending)
            fault = messages.Fault.of(
                errors.DeadlineExceeded("the request's time was over before its media were processed")
            )
            self._out.append(Send(pending.peer.identity, messages.Failed(pending.number, fault)))
            self._carry_out(self.flights.cancel(action.call, now), now)

    def _enqueue(self, flight_id: int, now: float) -> None:
        """Put an uploaded flight into the queue; the queue has room for all that admission let in."""
        flight = self.flights[flight_id]
        client = self.peers[flight.uploader[0].encode()].id if flight.uploader[0].encode() in self.peers else ""
        heavy = flight.cost >= HEAVY_COST
        try:
            self.queue.push(Queued(flight_id, client, flight.cost, flight.priority, flight.nbytes, heavy))
        except errors.Busy as busy:
            waiters = self.flights.failed(flight_id, None) or []
            self._end_flight(flight_id, waiters, failing(busy), now)

    def _flight_over(self, flight_id: int, now: float) -> None:
        """Drop what was kept for a flight that has ended."""
        self._media.pop(flight_id, None)
        self.queue.remove(flight_id)
        self.admission.release(flight_id, now)

    def _end_flight(self, flight_id: int, waiters: list[Waiter], make: MakeAnswer, now: float) -> None:
        self._flight_over(flight_id, now)
        for waiter in waiters:
            self._settle(waiter.call, flight_id, make, now)

    # --- lanes ----------------------------------------------------------------------------------------------------

    def _dispatch(self, now: float) -> None:
        """Give idle lanes work."""
        if not len(self.queue):
            return
        for number, lane in enumerate(self.lanes):
            if not lane.ready or lane.flight is not None:
                continue
            entry = self.queue.pop(heavy_allowed=lane.heavy_allowed)
            if entry is None:
                continue
            flight_id = entry.flight_id
            self.flights.started(flight_id, number)
            lane.flight = flight_id
            lane.deadline = now + self._task_seconds
            flight = self.flights[flight_id]
            medium, put, queued_at = self._media[flight_id]
            self.metrics.observe("mmprep_stage_seconds", now - queued_at, stage="queue")
            task = messages.Task(flight_id, flight.need, flight.modality, put.hasher, put.digest, put.options)
            self._out.append(ToLane(number, task, medium))

    def _grant(self, number: int, lane: LaneState, meta: bytes, tensor_length: int, now: float) -> None:
        assert lane.flight is not None
        key = self.flights[lane.flight].key
        try:
            if lane.grant is not None or self.ring.lookup(key) is not None:
                raise errors.ProtocolError("a lane asked for a second extent")
            grant = self.ring.grant(key, len(meta), tensor_length)
            if grant is None:
                raise errors.Busy("the cache is full of content in use; try again later", retry_after=1.0)
        except errors.MmprepError as error:
            self._out.append(ToLane(number, messages.Denied(lane.flight)))
            self._lane_done(number, lane, error, now)
            return
        lane.grant = grant
        self._out.append(ToLane(number, messages.Granted(lane.flight, grant.offset, grant.length)))

    def _filled(self, number: int, lane: LaneState, filled: messages.Filled, now: float) -> None:
        assert lane.flight is not None
        if lane.grant is None:
            self._lane_done(number, lane, errors.InternalError("a lane answered without an extent"), now)
            return
        entry = self.ring.publish(lane.grant.slot, lane.grant.generation)
        flight_id = lane.flight
        lane.grant, lane.flight, lane.deadline = None, None, math.inf
        self.plans.put(entry.key, self._read(entry.offset, entry.meta_len))
        self.metrics.observe("mmprep_stage_seconds", filled.decode_us / 1e6, stage="decode")
        self.metrics.observe("mmprep_stage_seconds", filled.process_us / 1e6, stage="process")
        waiters = self.flights.published(flight_id, number)
        if waiters is not None:
            self._end_flight(flight_id, waiters, lambda pending: self._computed(pending, flight_id, entry), now)

    def _computed(self, pending: PendingCall, flight_id: int, entry: Entry) -> ItemAnswer:
        outcome: Literal["computed", "joined"] = "computed" if flight_id in pending.opened else "joined"
        if pending.need == "plan":
            return ItemAnswer(outcome, meta=self._read(entry.offset, entry.meta_len))
        return self._entry_answer(pending, entry, outcome)

    def _planned(self, number: int, lane: LaneState, meta: bytes, now: float) -> None:
        assert lane.flight is not None
        flight_id = lane.flight
        lane.flight, lane.deadline = None, math.inf
        self.plans.put(self.flights[flight_id].key, meta)
        waiters = self.flights.published(flight_id, number)
        if waiters is not None:
            self._end_flight(flight_id, waiters, lambda _: ItemAnswer("computed", meta=meta), now)

    def _task_failed(self, number: int, lane: LaneState, error: errors.MmprepError, now: float) -> None:
        if lane.grant is not None:
            self.ring.abort(lane.grant.slot, lane.grant.generation)
            lane.grant = None
        self._lane_done(number, lane, error, now)

    def _lane_done(self, number: int, lane: LaneState, error: errors.MmprepError, now: float) -> None:
        """The lane's task ended without a result."""
        assert lane.flight is not None
        flight_id = lane.flight
        lane.flight, lane.deadline = None, math.inf
        if isinstance(error, errors.ProtocolError):
            actions = self.flights.refused(flight_id, number, now)
            if actions is not None:
                self._media.pop(flight_id, None)
                self._carry_out(actions, now)
            return
        waiters = self.flights.failed(flight_id, number)
        if waiters is not None:
            self._end_flight(flight_id, waiters, failing(error), now)

    def _lane_lost(self, flight_id: int, number: int, now: float) -> None:
        outcome = self.flights.lane_lost(flight_id, number, now)
        if isinstance(outcome, flight_events.Retry):
            self._enqueue(flight_id, now)
        elif outcome is not None:
            self._carry_out([outcome], now)
