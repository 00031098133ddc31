"""The calls of frontends: offers with their answers. A part of the writer's state machine.

A call's hits are pinned at once, its misses wait for flights, and when the last of them has ended it gets its one answer. A
call that is refused, fails or is cancelled leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from mmprep import errors
from mmprep.metrics import Metrics
from mmprep.wire import messages
from mmprep.wire.codec import pack
from mmprep_worker.scheduling import flight as flight_events
from mmprep_worker.scheduling.admission import Admission, Quarantine
from mmprep_worker.scheduling.flight import Call, nobody_has_it
from mmprep_worker.scheduling.flights import Flights
from mmprep_worker.scheduling.queue import FairQueue
from mmprep_worker.writer.aliases import Aliases
from mmprep_worker.writer.holds import Holds
from mmprep_worker.writer.leasing import Leasing
from mmprep_worker.writer.state import Ended, Peer, PendingCall, Result, Send, failed
from mmprep_worker.writer.tasks import Step, Tasks
from mmprep_worker.writer.transfers import Transfer, Transfers

#: Calls of one frontend that are under way or not let go of.
_MOST_CALLS = 65_536


class Calls:
    """The calls of all frontends.

    Parameters
    ----------
    waiting:
        Those without an answer yet, which are here to be changed.
    peers:
        The writer's peers by identity.
    out:
        Where what is to be sent goes.
    """

    def __init__(
        self,
        waiting: dict[Call, PendingCall],
        *,
        peers: Mapping[bytes, Peer],
        flights: Flights,
        queue: FairQueue,
        admission: Admission,
        quarantine: Quarantine,
        metrics: Metrics,
        aliases: Aliases,
        transfers: Transfers,
        holds: Holds,
        leasing: Leasing,
        tasks: Tasks,
        out: list[Any],
    ) -> None:
        self._waiting = waiting
        self._peers = peers
        self._flights = flights
        self._queue = queue
        self._admission = admission
        self._quarantine = quarantine
        self._metrics = metrics
        self._aliases = aliases
        self._transfers = transfers
        self._holds = holds
        self._leasing = leasing
        self._tasks = tasks
        self._out = out

    def end(self, peer: Peer, now: float) -> None:
        """A frontend or its connection is gone: its calls end."""
        for call in list(peer.calls.values()):
            self.drop(call)
        self.carry_out(self._flights.peer_gone(peer.name, now), now)

    def _send(self, peer: Peer, message: Any, frames: tuple[bytes, ...] = ()) -> None:
        self._out.append(Send(peer.identity, message, frames))

    # --- offers ---------------------------------------------------------------------------------------------------

    def repin(self, peer: Peer, message: messages.Repin, _: float) -> None:
        """Pin again what an answer of an earlier writer pinned; what is not there any more is passed over."""
        if message.call in peer.calls:
            raise errors.ProtocolError("the call's number is in use")
        pending = PendingCall(peer, messages.Offer(message.call, "tensors", 1, 0, ()))
        self._holds.repin(pending, message.places)
        if pending.pinned:
            pending.answered = True
            peer.calls[pending.number] = pending

    def offer(self, peer: Peer, offer: messages.Offer, now: float) -> None:
        """Take an offer, and answer it where nothing is missing; raises the error that it is to be answered with."""
        if len(peer.calls) >= _MOST_CALLS:
            raise errors.Busy("too many calls are under way", retry_after=1.0)
        if offer.lease is not None:
            self._backend(offer.lease)
        pending = PendingCall(peer, offer)
        self._aliases.recall(pending)
        self._aliases.note(offer.items)
        try:
            for position, key in enumerate(pending.keys):
                if pending.answers[position] is None:
                    pending.answers[position] = self._holds.hit(pending, key)
            self.supersede(offer.items)
            self._wait_for_misses(pending, offer, now)
        except errors.MmprepError:
            self._holds.let_go(pending)
            raise
        self._count(pending)
        if pending.missing:
            peer.calls[pending.number] = self._waiting[pending.call] = pending
        else:
            self._finish(pending, now)

    def supersede(self, items: Iterable[messages.Item | messages.Remembered]) -> None:
        """Take out what was injected under the names that came with other content now; its own call may have pinned it."""
        for item in items:
            if isinstance(item, messages.Offered) and item.alias is not None and item.alias.injected is not None:
                self._holds.forget(item.alias.injected)

    def _backend(self, to: messages.LeaseTo) -> Peer:
        for peer in self._peers.values():
            if peer.role == "backend" and peer.id == to.backend:
                return peer
        raise errors.NotFound(
            f"no living backend is registered as {to.backend!r}; register it before asking for addresses",
            param="backend_id",
        )

    def _wait_for_misses(self, pending: PendingCall, offer: messages.Offer, now: float) -> None:
        """Let the call wait for flights for what is missing; ask its frontend for what nobody has asked for.

        All that may be refused is refused before the first flight is joined. What is recalled and nobody has fails, and the
        rest goes on without it.
        """
        misses = self._misses(pending, now)
        needs = self._holds.needs(pending, misses)
        found = self._flights.openings([(pending.keys[p], need) for p, need in zip(misses, needs, strict=True)])
        openings = [misses[index] for index in found]
        if nowhere := {pending.keys[position] for position in openings if position in pending.recalled}:
            for position in misses:
                if pending.keys[position] in nowhere:
                    pending.answers[position] = failed(nobody_has_it())
            self._wait_for_misses(pending, offer, now)
            return
        self._admission.check(pending.peer.id, [pending.offered[position].nbytes for position in openings])
        wants = []
        for position, need in zip(misses, needs, strict=True):
            item = pending.offered[position]
            joined = self._flights.join(
                pending.keys[position],
                need,
                pending.call,
                modality=item.modality,
                cost=item.cost,
                priority=offer.priority,
                deadline=now + offer.deadline_ms / 1000,
                now=now,
                sends=position not in pending.recalled,
            )
            if joined.ask:
                self._admission.add(joined.flight_id, pending.peer.id, item.nbytes, now)
                pending.opened.add(joined.flight_id)
                wants.append(messages.Want(position, joined.flight_id))
            if joined.priority is not None:
                self._queue.reprioritise(joined.flight_id, joined.priority)
            pending.by_flight.setdefault(joined.flight_id, []).append(position)
            pending.missing += 1
        if wants:
            self._send(pending.peer, messages.Wants(pending.number, tuple(wants)))

    def _misses(self, pending: PendingCall, now: float) -> list[int]:
        """Return the positions without an answer, those whose bytes the frontend has first; refuse what is quarantined.

        The first of several positions of one key is the one that opens its flight, and that is asked for its bytes.
        """
        misses = []
        for position, key in enumerate(pending.keys):
            if pending.answers[position] is None:
                refusal = self._quarantine.refusal(key, now)
                if refusal is None:
                    misses.append(position)
                else:
                    pending.answers[position] = failed(refusal)
        return sorted(misses, key=pending.recalled.__contains__)

    def _count(self, pending: PendingCall) -> None:
        """Count a call that was taken on: every item is a query, and a hit unless it has to be computed for it."""
        computed = {positions[0] for flight, positions in pending.by_flight.items() if flight in pending.opened}
        if pending.injected:
            return  # nobody has looked for something
        for position, item in enumerate(pending.offered):
            answer = pending.answers[position]
            self._metrics.count("mmprep_mm_cache_queries_total", modality=item.modality)
            if position not in computed and (answer is None or answer.outcome != "failed"):
                self._metrics.count("mmprep_mm_cache_hits_total", modality=item.modality)
        if joined := len(pending.by_flight.keys() - pending.opened):
            self._metrics.count("mmprep_singleflight_joins_total", joined)

    def _finish(self, pending: PendingCall, now: float) -> None:
        """Send the one answer; pins become leases, or stay until the frontend lets go, as transfers always do."""
        pending.answered = True
        self._waiting.pop(pending.call, None)
        try:
            if pending.lease is not None and not pending.failed:
                self._leasing.lease_out(pending, self._backend(pending.lease), pending.lease.kind, now)
        except errors.MmprepError as error:
            self._fail(pending, error)
            return
        if not pending.failed:
            for item in pending.injected:
                self._aliases.forget(item.alias)
        if pending.failed:
            self.drop(pending)
        elif pending.lease is not None:
            self._holds.unpin(pending)
        if pending.pinned or pending.transfers:
            pending.peer.calls[pending.number] = pending
        else:
            self.drop(pending)
        frames = tuple(map(pack, pending.told()))
        owner = pending.lease.backend if pending.lease is not None and not pending.failed else None
        self._send(pending.peer, messages.Answer(pending.number, self._leasing.milliseconds, owner), frames)

    def _fail(self, pending: PendingCall, error: errors.MmprepError) -> None:
        """Answer a call as a whole with an error."""
        self.drop(pending)
        self._send(pending.peer, messages.Failed(pending.number, messages.Fault.of(error)))

    def unpin(self, peer: Peer, number: int) -> None:
        """The frontend has let go of what a call's answer pinned."""
        pending = peer.calls.get(number)
        if pending is not None and pending.answered:
            self.drop(pending)

    def cancel(self, peer: Peer, message: messages.Cancel, now: float) -> None:
        """Nobody waits for a call any more."""
        pending = peer.calls.get(message.call)
        if pending is not None:
            self.drop(pending)
            self.carry_out(self._flights.cancel(pending.call, now), now)

    def drop(self, pending: PendingCall) -> None:
        """Forget a call and let go of what it pinned."""
        self._holds.let_go(pending)
        pending.peer.calls.pop(pending.number, None)
        self._waiting.pop(pending.call, None)

    # --- flights --------------------------------------------------------------------------------------------------

    def carry_out(self, steps: Sequence[Step], now: float) -> None:
        """Do what flights and lanes' words lead to."""
        for step in steps:
            match step:
                case flight_events.Ask():
                    self._ask(step)
                case flight_events.Expire():
                    self._expire(step)
                case flight_events.Fail():
                    if step.ended:
                        self._tasks.drop(step.flight_id, now)
                    self._settle(step.flight_id, step.calls, step.error, now)
                case flight_events.Abandon():
                    if step.lane is None:
                        self._tasks.drop(step.flight_id, now)
                case flight_events.Reprioritise():
                    self._queue.reprioritise(step.flight_id, step.priority)
                case Ended():
                    self._tasks.drop(step.flight_id, now)
                    self._settle(step.flight_id, step.calls, step.result, now, step.times)

    def _ask(self, action: flight_events.Ask) -> None:
        pending = self._waiting[action.call]
        position = pending.by_flight[action.flight_id][0]
        self._send(pending.peer, messages.Wants(pending.number, (messages.Want(position, action.flight_id),)))

    def _expire(self, action: flight_events.Expire) -> None:
        """The call's time is over. It is over for all its flights at once, so the first of them ends the call."""
        pending = self._waiting.get(action.call)
        if pending is not None:
            late = errors.DeadlineExceeded("the request's time was over before its media were processed")
            self._fail(pending, late)

    def _settle(
        self,
        flight_id: int,
        calls: Sequence[Call],
        result: Result,
        now: float,
        times: messages.StageTimes | None = None,
    ) -> None:
        """Give waiting calls what a flight ended with."""
        for call in calls:
            pending = self._waiting[call]
            for position in pending.by_flight.pop(flight_id):
                answer = self._holds.outcome(pending, position, flight_id, result)
                if pending.traced:
                    answer = msgspec.structs.replace(answer, times=times)
                pending.answers[position] = answer
                pending.missing -= 1
            if not pending.missing:
                self._finish(pending, now)
        if isinstance(result, Transfer):
            self._transfers.landed(result)
