"""The writer as a state machine: messages, lane events and ``now`` in, actions out.

A call is an offer of a frontend. Its hits are pinned at once, its misses wait for flights, and when the last of them has
ended the call gets its one answer. The holds then either become leases of a backend or stay pinned until the frontend
says that it has read them. A call that is refused, fails or is cancelled leaves nothing behind.

What found no shared memory travels inline: the answer names it, the frontend fetches it, and says when it has it.

A finished request can become a job in a queue, which backends pull.

The parts: :mod:`.tasks` (uploaded media, queue, lanes), :mod:`.holds` (pins and the answers about them), :mod:`.leasing`,
:mod:`.transfers` (what travels inline), :mod:`.jobs` (queues), :mod:`.aliases` (what a frontend names without having it).

WARNING: the shell must write ``ring.take_writes()`` into the directory before it carries out the actions of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from mmprep import errors
from mmprep.metrics import Metrics
from mmprep.segment import sibling_name
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL, pack
from mmprep_worker.ring.ring import Ring
from mmprep_worker.scheduling import flight as flight_events
from mmprep_worker.scheduling.admission import Admission, Quarantine
from mmprep_worker.scheduling.flight import Call, nobody_has_it
from mmprep_worker.scheduling.flights import Flights
from mmprep_worker.scheduling.job import Limits
from mmprep_worker.scheduling.queue import FairQueue
from mmprep_worker.scheduling.queues import Queues
from mmprep_worker.writer.aliases import MOST_ALIASES, Aliases
from mmprep_worker.writer.holds import Holds
from mmprep_worker.writer.inspection import clear, inspect
from mmprep_worker.writer.jobs import JobMessage, Jobs
from mmprep_worker.writer.leasing import Leasing
from mmprep_worker.writer.plans import PlanStore
from mmprep_worker.writer.state import (
    Action,
    Ended,
    Peer,
    PendingCall,
    ReadersSilent,
    RemoveSegment,
    Result,
    Send,
    failed,
)
from mmprep_worker.writer.tasks import LaneState, Step, Tasks
from mmprep_worker.writer.transfers import Transfer, Transfers

#: What each role may send after its hello.
_MAY_SEND: dict[str, frozenset[type]] = {
    "frontend": frozenset(
        {
            messages.Offer,
            messages.Cancel,
            messages.Unpin,
            messages.Repin,
            messages.Reassert,
            messages.Renew,
            messages.Release,
            messages.Clear,
            messages.Post,
        }
    ),
    "backend": frozenset(
        {
            messages.Acquire,
            messages.Reassert,
            messages.Renew,
            messages.Release,
            messages.Upgrade,
            messages.Retag,
            messages.Pull,
            messages.Holding,
            messages.Ack,
            messages.GiveBack,
        }
    ),
    "control": frozenset({messages.Clear, messages.Inspect}),
}

#: Control processes that are remembered. They hold no process lock, so nothing tells when they are gone.
_MOST_CONTROLS = 16

#: Roles of those who read the segment, each under a process lock.
READERS = frozenset({"frontend", "backend"})

#: Seconds until silent readers are reported again.
_SILENT_AGAIN = 5.0

#: Leases in one question to a backend.
_ASKED_BATCH = 512

#: Calls of one frontend that are under way or not let go of.
_MOST_CALLS = 65_536


class WriterCore:
    """The state machine of one writer.

    Parameters
    ----------
    queue:
        With room for all that ``admission`` lets in.
    lanes:
        How many.
    task_seconds:
        How long a lane may work on one item.
    inline_bytes:
        Of tensors that may be on their way inline.
    read:
        Returns bytes of the segment: ``read(offset, length)``.
    new_id:
        Returns 12 fresh random bytes.
    awaited:
        Readers, as roles and ids, that may hold something of a restored ring: nothing is granted until each has said
        what, or is gone.
    silent_at:
        When those that have not are reported as :class:`~.state.ReadersSilent`, in seconds of ``now``.
    most_aliases:
        That are remembered.
    queue_limits:
        Bounds of the queues of jobs.
    declared_queues:
        Names of those that are always there.
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
        inline_bytes: int = 0,
        awaited: Iterable[tuple[str, str]] = (),
        silent_at: float = math.inf,
        most_aliases: int = MOST_ALIASES,
        queue_limits: Limits,
        declared_queues: Iterable[str] = (),
    ) -> None:
        self.ring = ring
        self.flights = flights
        self.queue = queue
        self.admission = admission
        self.quarantine = quarantine
        self.plans = plans
        self.metrics = metrics
        self.segment = segment
        self.card = b""
        #: Why a lane does not get warm, while there is no card.
        self.cold = ""
        self.peers: dict[bytes, Peer] = {}
        #: Calls without an answer yet.
        self._calls: dict[Call, PendingCall] = {}
        self._out: list[Action] = []
        self._awaited = set(awaited)
        self._silent_at = silent_at if self._awaited else math.inf
        self.aliases = Aliases(most_aliases)
        self.transfers = Transfers(inline_bytes)
        self._holds = Holds(ring, flights, self.transfers, plans, read)
        self._leasing = Leasing(ring, lease_seconds, new_id)
        self._tasks = Tasks(
            lanes=lanes,
            ring=ring,
            flights=flights,
            transfers=self.transfers,
            queue=queue,
            admission=admission,
            plans=plans,
            metrics=metrics,
            task_seconds=task_seconds,
            holds=self._holds,
            calls=self._calls,
            new_id=new_id,
            spill_name=self._spill_name,
            out=self._out,
        )
        self._jobs = Jobs(
            Queues(queue_limits, incarnation=ring.incarnation, declared=declared_queues),
            ring,
            self._holds,
            self._leasing,
            metrics,
            peers=self.peers,
            out=self._out,
        )
        #: Who takes what peers say; the others are about leases.
        self._takers: dict[type, Callable[[Peer, Any, float], None]] = {
            messages.Offer: self._offer,
            messages.Unpin: lambda peer, unpin, _: self._unpin(peer, unpin.call),
            messages.Cancel: self._cancel,
            messages.Repin: self._repin,
            messages.Clear: self._operate,
            messages.Inspect: self._operate,
            **dict.fromkeys((messages.Pull, messages.Holding, messages.Ack, messages.GiveBack), self._about_jobs),
        }
        if self._awaited:
            self._tasks.paused = True
        else:
            ring.settle()

    # --- what the shell calls -------------------------------------------------------------------------------------

    @property
    def lanes(self) -> Sequence[LaneState]:
        """The lanes by number; to be read only."""
        return self._tasks.lanes

    @property
    def queues(self) -> Queues:
        """The queues of jobs; to be read only."""
        return self._jobs.queues

    def take_actions(self) -> list[Action]:
        """Return what is to be done since the last call, in order.

        The segments of spills that have ended go first: what is granted after them may need their memory.
        """
        removed = [RemoveSegment(sibling_name(self.segment.name, epoch)) for epoch in self.ring.take_removed()]
        out = [*removed, *self._out]
        self._out.clear()
        return out

    @property
    def wake_at(self) -> float:
        """When :meth:`tick` has something to do, in seconds of ``now``."""
        lease = self.ring.leases.next_deadline()
        return min(
            self.flights.wake_at,
            math.inf if lease is None else lease,
            self._tasks.wake_at,
            self._jobs.wake_at,
            self._silent_at,
        )

    def succeed(self, former: WriterCore, now: float) -> None:
        """Go on for the peers of a core with another ring; each is welcomed anew, and asks again for what it waits for."""
        self.card, self.cold = former.card, former.cold
        self._jobs.succeed(former._jobs, now)
        for peer in former.peers.values():
            if peer.connected:
                hello = messages.Hello(
                    PROTOCOL, "", peer.role, peer.id, peer.pid, peer.instance, peer.connection, peer.turn
                )
                self._welcome(peer.identity, hello)

    def go_on_beside(self, now: float) -> None:
        """Give lanes work although readers are silent: what they compute finds no room in the ring, and goes beside it."""
        self._tasks.paused = False
        self._tasks.dispatch(now)

    @property
    def awaited(self) -> frozenset[tuple[str, str]]:
        """The readers that have not said yet what they hold of an earlier writer's segment."""
        return frozenset(self._awaited)

    def message(self, identity: bytes, message: Any, now: float, frames: Sequence[bytes] = ()) -> None:
        """Take a control message of a peer; ``frames`` are the content of a posted job."""
        peer = self.peers.get(identity)
        if isinstance(message, messages.Hello):
            self._hello(identity, peer, message, now)
        elif peer is None or not peer.connected:
            self._refuse(identity, "the first message of a connection must be a hello", now)
        elif isinstance(message, messages.Offer) and message.call in peer.calls:
            self._refuse(identity, "the call's number is in use", now)
        else:
            try:
                self._from_peer(peer, message, frames, now)
            except errors.MmprepError as error:
                self.count_refused("writer", error)
                self._send(peer, messages.Failed(message.call, messages.Fault.of(error)))
        self._tasks.dispatch(now)
        self._jobs.dispatch(now)

    def count_refused(self, link: str, error: Exception) -> None:
        """Count a message that was refused on one of the writer's links."""
        self.metrics.count("mmprep_refused_total", link=link, error=type(error).__name__)

    def put(self, message: messages.Put, medium: Any, nbytes: int, now: float) -> None:
        """Take the bytes of a wanted medium; those that nobody wants any more are dropped."""
        if message.flight not in self.flights:
            return
        flight = self.flights[message.flight]
        peer = self.peers.get(flight.uploader[0].encode("latin-1"))
        if flight.state != "wanted" or peer is None or peer.id != message.frontend:
            return
        self._carry_out(self._tasks.upload(flight, message, medium, nbytes, now), now)
        self._tasks.dispatch(now)

    def lane_ready(self, number: int, pid: int, card: bytes, now: float) -> None:
        """A lane is warm. When all are for the first time, the frontends get the model card."""
        if self._tasks.ready(number, pid) and not self.card:
            self.card, self.cold = card, ""
            for peer in self.peers.values():
                if peer.role == "frontend":
                    self._send(peer, messages.Card(card))
        self._tasks.dispatch(now)

    def not_warm(self, why: str) -> None:
        """A lane does not get warm. Frontends hear why while they have no card; a service that works goes on."""
        if self.card:
            return
        self.cold = why
        for peer in self.peers.values():
            if peer.role == "frontend":
                self._send(peer, messages.NotWarm(why))

    def from_lane(self, number: int, message: Any, frames: Sequence[Any], now: float) -> None:
        """Take a lane's message about its task; one about another task is passed over."""
        self._carry_out(self._tasks.message(number, message, frames, now), now)
        self._tasks.dispatch(now)

    def lane_broke_protocol(self, number: int) -> None:
        """What a lane sent is no message: it is killed, and its task is another's."""
        self._tasks.broke_the_protocol(number)

    def lane_exited(self, number: int, now: float) -> None:
        """A lane's exit is confirmed: its extent is free again, its item is tried once more or quarantined."""
        self._carry_out(self._tasks.exited(number, now), now)
        self._tasks.dispatch(now)

    def peer_gone(self, role: str, peer_id: str, now: float) -> None:
        """A peer's process lock has fallen: its calls, pins and leases end."""
        for peer in [peer for peer in self.peers.values() if (peer.role, peer.id) == (role, peer_id)]:
            del self.peers[peer.identity]
            self._end_calls(peer, now)
        if role == "backend":
            self.ring.owner_gone(peer_id)
            self._jobs.gone(peer_id, now)
        self._heard_of(role, peer_id)
        self._tasks.dispatch(now)
        self._jobs.dispatch(now)

    def unreachable(self, identity: bytes, now: float) -> None:
        """A connection is gone; its calls end.

        Leases stay: they are the process's, not the connection's. So a backend stays among :attr:`peers` until it
        connects again, or until :meth:`peer_gone` says that its process lock has fallen.
        """
        peer = self.peers.get(identity)
        if peer is None:
            return
        peer.connected = False
        self._jobs.away(peer, now)
        if peer.role != "backend":
            del self.peers[identity]
        self._end_calls(peer, now)
        self._tasks.dispatch(now)
        self._jobs.dispatch(now)

    def tick(self, now: float) -> None:
        """Time has passed."""
        self._carry_out(self.flights.tick(now), now)
        overdue = self.ring.leases.overdue_count
        self.ring.tick(now)
        if self.ring.leases.overdue_count > overdue:
            for peer in self.peers.values():
                self._ask_about_overdue(peer)
        self._tasks.tick(now)
        self._jobs.tick(now)
        if self._silent_at <= now:
            self._silent_at = now + _SILENT_AGAIN
            self._out.append(ReadersSilent(tuple(sorted(self._awaited))))
        self._tasks.dispatch(now)
        self._jobs.dispatch(now)

    def tensors(self, number: int) -> Any | None:
        """Return the tensors that an answer named as inline, as the lane sent them; ``None``: they are gone."""
        return self.transfers.frame(number)

    # --- peers ----------------------------------------------------------------------------------------------------

    def _hello(self, identity: bytes, known: Peer | None, hello: messages.Hello, now: float) -> None:
        if hello.role not in _MAY_SEND:
            self._refuse(identity, f"a {hello.role} has nothing to say to the writer", now)
            return
        process = (hello.role, hello.id)
        same = [p for p in self.peers.values() if (p.role, p.id, p.instance) == (*process, hello.instance)]
        if any(hello.connection < peer.connection for peer in same):
            return  # it was on its way when its connection broke, and the next one is there already
        if known is not None and (known.connected or (known.role, known.id) != process):
            self._refuse(identity, "a connection has one hello, its first message", now)
            return
        for peer in [peer for peer in self.peers.values() if (peer.role, peer.id) == process]:
            # The process lock lets only one process have an id: another instance means that the former one is gone.
            if peer.instance != hello.instance:
                self.peer_gone(*process, now)
            else:
                self._jobs.away(peer, now)
                del self.peers[peer.identity]
                self._end_calls(peer, now)
        controls = [peer for peer in self.peers.values() if peer.role == "control"]
        if hello.role == "control" and len(controls) >= _MOST_CONTROLS:
            del self.peers[controls[0].identity]
        self._welcome(identity, hello)

    def _welcome(self, identity: bytes, hello: messages.Hello) -> None:
        peer = self.peers[identity] = Peer(identity, hello)
        welcome = messages.WriterWelcome(
            hello.protocol, self.ring.incarnation, self.segment, self._leasing.milliseconds, self.card
        )
        self._send(peer, welcome)
        if self.cold and peer.role == "frontend":
            self._send(peer, messages.NotWarm(self.cold))

    def _refuse(self, identity: bytes, why: str, now: float) -> None:
        """The peer broke the protocol: its connection is over."""
        error = errors.ProtocolError(why)
        self.count_refused("writer", error)
        self.unreachable(identity, now)
        self._out.append(Send(identity, messages.Refused(messages.Fault.of(error))))

    def _end_calls(self, peer: Peer, now: float) -> None:
        for call in list(peer.calls.values()):
            self._drop(call)
        self._carry_out(self.flights.peer_gone(peer.name, now), now)

    def _spill_name(self, epoch: bytes) -> str | None:
        name = sibling_name(self.segment.name, epoch)
        return None if name == self.segment.name else name

    def _send(self, peer: Peer, message: Any, frames: tuple[bytes, ...] = ()) -> None:
        self._out.append(Send(peer.identity, message, frames))

    def _from_peer(self, peer: Peer, message: Any, frames: Sequence[bytes], now: float) -> None:
        kind = type(message)
        if kind not in _MAY_SEND[peer.role]:
            raise errors.InvalidRequest(f"a {peer.role} does not send a {kind.__name__}")
        if kind is messages.Post:
            self._post(peer, message, frames, now)
        else:
            self._takers.get(kind, self._about_leases)(peer, message, now)

    def _post(self, peer: Peer, post: messages.Post, content: Sequence[bytes], now: float) -> None:
        if post.items:
            self.aliases.note(post.items)
            self._supersede(post.items)
        self._send(peer, self._jobs.post(peer, post, tuple(content), now))
        if post.releases is not None:
            self._unpin(peer, post.releases)

    def _about_jobs(self, peer: Peer, message: JobMessage, now: float) -> None:
        answer = self._jobs.answer(peer, message, now)
        if answer is not None:
            self._send(peer, answer)

    def _about_leases(self, peer: Peer, message: Any, now: float) -> None:
        if isinstance(message, messages.Release) and peer.role == "frontend":
            self._give_back(peer, message)
            return
        answer = self._leasing.answer(peer, message, now)
        if answer is not None:
            self._send(peer, answer)
        if isinstance(message, messages.Reassert) and message.last:
            self._heard_of(peer.role, peer.id)
            self._ask_about_overdue(peer)

    def _operate(self, peer: Peer, message: messages.Clear | messages.Inspect, _: float) -> None:
        """Do what the operator asks."""
        if isinstance(message, messages.Inspect):
            self._send(peer, inspect(self.ring, message))
            return
        self.plans.clear()
        self.aliases.clear()
        self.quarantine.clear()
        self._send(peer, clear(self.ring, message))

    def _ask_about_overdue(self, peer: Peer) -> None:
        """Ask a backend about views beyond their time: answers that granted them may have been lost on the way to it."""
        if peer.role == "backend":
            self._ask_whether_held(peer, self.ring.leases.overdue_ids(peer.id))

    def _give_back(self, peer: Peer, release: messages.Release) -> None:
        """A frontend gives leases back: those of an answer that seems to have reached nobody, or that an HTTP caller names.

        The backend may have taken them up all the same, and may be reading: it is asked.
        """
        name, leases = self._leasing.given_back(peer, release)
        for backend in self.peers.values():
            if (backend.role, backend.id) == ("backend", name):
                self._ask_whether_held(backend, leases)
        if release.call:
            self._send(peer, messages.Done(release.call))

    def _ask_whether_held(self, backend: Peer, leases: Sequence[bytes]) -> None:
        if backend.connected:
            for start in range(0, len(leases), _ASKED_BATCH):
                self._send(backend, messages.StillHeld(tuple(leases[start : start + _ASKED_BATCH])))

    def _heard_of(self, role: str, peer_id: str) -> None:
        """The reader has said what it holds, or is gone. After the last one the ring is this writer's alone."""
        self._awaited.discard((role, peer_id))
        if not self._awaited and self._silent_at < math.inf:
            self._silent_at = math.inf
            self.ring.settle()
            self._tasks.paused = False

    # --- calls ----------------------------------------------------------------------------------------------------

    def _repin(self, peer: Peer, message: messages.Repin, _: float) -> None:
        """Pin again what an answer of an earlier writer pinned; what is not there any more is passed over."""
        if message.call in peer.calls:
            raise errors.ProtocolError("the call's number is in use")
        pending = PendingCall(peer, messages.Offer(message.call, "tensors", 1, 0, ()))
        self._holds.repin(pending, message.places)
        if pending.pinned:
            pending.answered = True
            peer.calls[pending.number] = pending

    def _offer(self, peer: Peer, offer: messages.Offer, now: float) -> None:
        if len(peer.calls) >= _MOST_CALLS:
            raise errors.Busy("too many calls are under way", retry_after=1.0)
        if offer.lease is not None:
            self._backend(offer.lease)
        pending = PendingCall(peer, offer)
        self.aliases.recall(pending)
        self.aliases.note(offer.items)
        try:
            for position, key in enumerate(pending.keys):
                if pending.answers[position] is None:
                    pending.answers[position] = self._holds.hit(pending, key)
            self._supersede(offer.items)
            self._wait_for_misses(pending, offer, now)
        except errors.MmprepError:
            self._holds.let_go(pending)
            raise
        self._count(pending)
        if pending.missing:
            peer.calls[pending.number] = self._calls[pending.call] = pending
        else:
            self._finish(pending, now)

    def _supersede(self, items: Iterable[messages.Item]) -> None:
        """Take out what was injected under the names that came with other content now; its own call may have pinned it."""
        for item in items:
            if isinstance(item, messages.Offered) and item.alias is not None and item.alias.injected is not None:
                self._holds.forget(item.alias.injected)

    def _backend(self, to: messages.LeaseTo) -> Peer:
        for peer in self.peers.values():
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
        found = self.flights.openings([(pending.keys[p], need) for p, need in zip(misses, needs, strict=True)])
        openings = [misses[index] for index in found]
        if nowhere := {pending.keys[position] for position in openings if position in pending.recalled}:
            for position in misses:
                if pending.keys[position] in nowhere:
                    pending.answers[position] = failed(nobody_has_it())
            self._wait_for_misses(pending, offer, now)
            return
        self.admission.check(pending.peer.id, [pending.offered[position].nbytes for position in openings])
        wants = []
        for position, need in zip(misses, needs, strict=True):
            item = pending.offered[position]
            joined = self.flights.join(
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
                self.admission.add(joined.flight_id, pending.peer.id, item.nbytes, now)
                pending.opened.add(joined.flight_id)
                wants.append(messages.Want(position, joined.flight_id))
            if joined.priority is not None:
                self.queue.reprioritise(joined.flight_id, joined.priority)
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
                refusal = self.quarantine.refusal(key, now)
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
            self.metrics.count("mmprep_mm_cache_queries_total", modality=item.modality)
            if position not in computed and (answer is None or answer.outcome != "failed"):
                self.metrics.count("mmprep_mm_cache_hits_total", modality=item.modality)
        if joined := len(pending.by_flight.keys() - pending.opened):
            self.metrics.count("mmprep_singleflight_joins_total", joined)

    def _finish(self, pending: PendingCall, now: float) -> None:
        """Send the one answer; pins become leases, or stay until the frontend lets go, as transfers always do."""
        pending.answered = True
        self._calls.pop(pending.call, None)
        try:
            if pending.lease is not None and not pending.failed:
                self._leasing.lease_out(pending, self._backend(pending.lease), pending.lease.kind, now)
        except errors.MmprepError as error:
            self._fail(pending, error)
            return
        if not pending.failed:
            for item in pending.injected:
                self.aliases.forget(item.alias)
        if pending.failed:
            self._drop(pending)
        elif pending.lease is not None:
            self._holds.unpin(pending)
        if pending.pinned or pending.transfers:
            pending.peer.calls[pending.number] = pending
        else:
            self._drop(pending)
        frames = tuple(map(pack, pending.told()))
        owner = pending.lease.backend if pending.lease is not None and not pending.failed else None
        self._send(pending.peer, messages.Answer(pending.number, self._leasing.milliseconds, owner), frames)

    def _fail(self, pending: PendingCall, error: errors.MmprepError) -> None:
        """Answer a call as a whole with an error."""
        self._drop(pending)
        self._send(pending.peer, messages.Failed(pending.number, messages.Fault.of(error)))

    def _unpin(self, peer: Peer, number: int) -> None:
        """The frontend has let go of what a call's answer pinned."""
        pending = peer.calls.get(number)
        if pending is not None and pending.answered:
            self._drop(pending)

    def _cancel(self, peer: Peer, message: messages.Cancel, now: float) -> None:
        pending = peer.calls.get(message.call)
        if pending is not None:
            self._drop(pending)
            self._carry_out(self.flights.cancel(pending.call, now), now)

    def _drop(self, pending: PendingCall) -> None:
        """Forget a call and let go of what it pinned."""
        self._holds.let_go(pending)
        pending.peer.calls.pop(pending.number, None)
        self._calls.pop(pending.call, None)

    # --- flights --------------------------------------------------------------------------------------------------

    def _carry_out(self, steps: Sequence[Step], now: float) -> None:
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
                    self.queue.reprioritise(step.flight_id, step.priority)
                case Ended():
                    self._tasks.drop(step.flight_id, now)
                    self._settle(step.flight_id, step.calls, step.result, now, step.times)

    def _ask(self, action: flight_events.Ask) -> None:
        pending = self._calls[action.call]
        position = pending.by_flight[action.flight_id][0]
        self._send(pending.peer, messages.Wants(pending.number, (messages.Want(position, action.flight_id),)))

    def _expire(self, action: flight_events.Expire) -> None:
        """The call's time is over. It is over for all its flights at once, so the first of them ends the call."""
        pending = self._calls.get(action.call)
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
            pending = self._calls[call]
            for position in pending.by_flight.pop(flight_id):
                answer = self._holds.outcome(pending, position, flight_id, result)
                if pending.traced:
                    answer = msgspec.structs.replace(answer, times=times)
                pending.answers[position] = answer
                pending.missing -= 1
            if not pending.missing:
                self._finish(pending, now)
        if isinstance(result, Transfer):
            self.transfers.landed(result)

    # --- invariants -----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every invariant, of the parts too.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        parts = (self.ring, self.flights, self.queue, self.admission, self.quarantine, self.plans, self.transfers)
        for part in (*parts, self.aliases, self._tasks, self._jobs):
            part.validate()
        calls = [call for peer in self.peers.values() for call in peer.calls.values()]
        assert self._calls == {call.call: call for call in calls if not call.answered}, "the indices of calls differ"
        for call in calls:
            call.validate()
            self._holds.validate(call)
            for flight_id in call.by_flight:
                assert flight_id in self.flights, f"call {call.call} waits for a flight that has ended"
                assert call.call in self.flights[flight_id].waiters, f"call {call.call} waits for a flight in vain"
        for flight in self.flights:
            for waiter in flight.waiters:
                assert flight.id in self._calls[waiter].by_flight, f"flight {flight.id} would answer what is not asked"
        assert bool(self._awaited) == (self._silent_at < math.inf), "readers are awaited without end, or none is"
        assert bool(self._awaited) == (not self.ring.settled), "the ring is settled before all readers were heard"
        holders = {call.holder for call in calls}
        assert self.ring.holders <= holders | self._jobs.holders, "something is pinned for a call or job that is over"
        assert all(transfer.holders <= holders for transfer in self.transfers), (
            "a transfer is kept for a call that is over"
        )
        backends = {peer.id for peer in self.peers.values() if peer.role == "backend"}
        assert {lease.owner for lease in self.ring.leases} <= backends, "a process that is gone has a lease"
        for identity, peer in self.peers.items():
            assert identity == peer.identity, "a peer is found by another identity"
            assert peer.connected or peer.role == "backend", f"{peer.role} {peer.id} is gone and remembered"
            assert peer.role == "frontend" or not peer.calls, f"{peer.role} {peer.id} has calls"
        processes = [(peer.role, peer.id) for peer in self.peers.values() if peer.role != "control"]
        assert len(processes) == len(set(processes)), "a process is connected twice"
