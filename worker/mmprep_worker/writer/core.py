"""The writer as a state machine: messages, lane events and ``now`` in, actions out.

A call is an offer of a frontend. Its hits are pinned at once, its misses wait for flights, and when the last of them has
ended the call gets its one answer. The holds then either become leases of a backend or stay pinned until the frontend
says that it has read them. A call that is refused, fails or is cancelled leaves nothing behind.

What found no shared memory travels inline: the answer names it, the frontend fetches it, and says when it has it.

A finished request can become a job in a queue, which backends pull.

The parts: :mod:`.calls` (offers and their answers), :mod:`.tasks` (uploaded media, queue, lanes), :mod:`.holds` (pins and
the answers about them), :mod:`.leasing`, :mod:`.transfers` (what travels inline), :mod:`.jobs` (queues), :mod:`.aliases`
(what a frontend names without having it).

WARNING: the shell must write ``ring.take_writes()`` into the directory before it carries out the actions of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mmprep import errors
from mmprep.metrics import Metrics
from mmprep.segment import sibling_name
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL
from mmprep_worker.ring.ring import Ring
from mmprep_worker.scheduling.admission import Admission, Quarantine
from mmprep_worker.scheduling.flight import Call
from mmprep_worker.scheduling.flights import Flights
from mmprep_worker.scheduling.job import Limits
from mmprep_worker.scheduling.queue import FairQueue
from mmprep_worker.scheduling.queues import Queues
from mmprep_worker.writer.aliases import MOST_ALIASES, Aliases
from mmprep_worker.writer.calls import Calls
from mmprep_worker.writer.holds import Holds
from mmprep_worker.writer.inspection import clear, inspect
from mmprep_worker.writer.jobs import JobMessage, Jobs
from mmprep_worker.writer.leasing import Leasing
from mmprep_worker.writer.plans import PlanStore
from mmprep_worker.writer.state import (
    Action,
    Peer,
    PendingCall,
    ReadersSilent,
    RemoveSegment,
    Send,
)
from mmprep_worker.writer.tasks import LaneState, Tasks
from mmprep_worker.writer.transfers import Transfers

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
            messages.Acks,
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
        self._waiting: dict[Call, PendingCall] = {}
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
            calls=self._waiting,
            new_id=new_id,
            spill_name=self._spill_name,
            out=self._out,
        )
        self._calls = Calls(
            self._waiting,
            peers=self.peers,
            flights=flights,
            queue=queue,
            admission=admission,
            quarantine=quarantine,
            metrics=metrics,
            aliases=self.aliases,
            transfers=self.transfers,
            holds=self._holds,
            leasing=self._leasing,
            tasks=self._tasks,
            out=self._out,
        )
        self._jobs = Jobs(
            Queues(queue_limits, incarnation=ring.incarnation, declared=declared_queues),
            ring,
            self._holds,
            self._leasing,
            metrics,
            aliases=self.aliases,
            peers=self.peers,
            out=self._out,
        )
        #: Who takes what peers say; the others are about leases.
        self._takers: dict[type, Callable[[Peer, Any, float], None]] = {
            messages.Offer: self._calls.offer,
            messages.Unpin: lambda peer, unpin, _: self._calls.unpin(peer, unpin.call),
            messages.Cancel: self._calls.cancel,
            messages.Repin: self._calls.repin,
            messages.Clear: self._operate,
            messages.Inspect: self._operate,
            **dict.fromkeys(
                (messages.Pull, messages.Holding, messages.Ack, messages.Acks, messages.GiveBack), self._about_jobs
            ),
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
        out, removed = self._out.copy(), self.ring.take_removed()
        self._out.clear()
        return [RemoveSegment(sibling_name(self.segment.name, epoch)) for epoch in removed] + out if removed else out

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
        self._calls.carry_out(self._tasks.upload(flight, message, medium, nbytes, now), now)
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
        self._calls.carry_out(self._tasks.message(number, message, frames, now), now)
        self._tasks.dispatch(now)

    def lane_broke_protocol(self, number: int) -> None:
        """What a lane sent is no message: it is killed, and its task is another's."""
        self._tasks.broke_the_protocol(number)

    def lane_exited(self, number: int, now: float) -> None:
        """A lane's exit is confirmed: its extent is free again, its item is tried once more or quarantined."""
        self._calls.carry_out(self._tasks.exited(number, now), now)
        self._tasks.dispatch(now)

    def peer_gone(self, role: str, peer_id: str, now: float) -> None:
        """A peer's process lock has fallen: its calls, pins and leases end."""
        for peer in [peer for peer in self.peers.values() if (peer.role, peer.id) == (role, peer_id)]:
            del self.peers[peer.identity]
            self._calls.end(peer, now)
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
        self._calls.end(peer, now)
        self._tasks.dispatch(now)
        self._jobs.dispatch(now)

    def tick(self, now: float) -> None:
        """Time has passed."""
        self._calls.carry_out(self.flights.tick(now), now)
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
                self._calls.end(peer, now)
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
        try:
            answer = self._jobs.post(peer, post, tuple(content), now)
        finally:
            self.aliases.note(post.items)
            self._calls.supersede(post.items)
        self._send(peer, answer)
        if post.releases is not None:
            self._calls.unpin(peer, post.releases)

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
        assert self._waiting == {call.call: call for call in calls if not call.answered}, "the indices of calls differ"
        for call in calls:
            call.validate()
            self._holds.validate(call)
            for flight_id in call.by_flight:
                assert flight_id in self.flights, f"call {call.call} waits for a flight that has ended"
                assert call.call in self.flights[flight_id].waiters, f"call {call.call} waits for a flight in vain"
        for flight in self.flights:
            for waiter in flight.waiters:
                assert flight.id in self._waiting[waiter].by_flight, (
                    f"flight {flight.id} would answer what is not asked"
                )
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
