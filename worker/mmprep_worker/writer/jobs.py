"""Queues of jobs in the writer: what is posted, pulled and acknowledged, and what jobs hold of the ring.

A part of the writer's state machine. Rules:

* A job pins the entries that its tensors lie in from when it is posted until it has ended. Leases are granted at delivery,
  to the backend that gets the job, as views, and end by that backend's word, as all leases do.
* While a writer that takes over waits for readers, nothing new is posted, and nothing is delivered: what was accepted
  before has its place first, and those who hold jobs have said so.
* A job that its frontend has made without an offer is taken where its items are what one would be answered with now. It is
  one step, so nothing of them can go in between; where they are something else, nothing is done.
* A job that comes from an earlier writer's time and whose tensors are gone stays a job, with an error in their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mmprep import errors
from mmprep.metrics import Metrics
from mmprep.wire import messages
from mmprep_worker.ring.ring import Ring
from mmprep_worker.ring.spills import Spill
from mmprep_worker.scheduling.job import Delivery, Held, Job, Place
from mmprep_worker.scheduling.once import Requests
from mmprep_worker.scheduling.queues import Queues
from mmprep_worker.writer.aliases import Aliases
from mmprep_worker.writer.holds import Holds
from mmprep_worker.writer.leasing import Leasing
from mmprep_worker.writer.state import Peer, Send

#: What backends say about jobs.
JobMessage = messages.Pull | messages.Holding | messages.Ack | messages.Acks | messages.GiveBack
#: What metrics and the status call the queue before the lanes.
MEDIA = "media"
#: Seconds until a frontend is told of jobs that have ended, several at a time.
_TELL_SECONDS = 0.05
#: Seconds until a backend that may get no leases is tried again.
_PAUSE_SECONDS = 1.0
_GAUGES = (
    "mmprep_queue_depth",
    "mmprep_queue_delivered",
    "mmprep_queue_bytes",
    "mmprep_queue_held_bytes",
    "mmprep_queue_backends",
    "mmprep_queue_dead_letters",
)
_TAKING_OVER = "the preprocessing worker was replaced and is being told what it has to know; post again"
_EARLY = "the preprocessing worker was replaced while the request was prepared; send it again"
_LOST = "the tensors were lost when the preprocessing worker was replaced; send the request again"


class Jobs:
    """The shell of :class:`~mmprep_worker.scheduling.queues.Queues` within the writer's core.

    Parameters
    ----------
    aliases:
        What jobs that were made without an offer may name their items by.
    out:
        Where what is to be sent goes.
    peers:
        The writer's peers by identity.
    """

    def __init__(
        self,
        queues: Queues,
        ring: Ring,
        holds: Holds,
        leasing: Leasing,
        metrics: Metrics,
        *,
        aliases: Aliases,
        peers: Mapping[bytes, Peer],
        out: list[Any],
    ) -> None:
        self.queues = queues
        self.requests = Requests()
        self._ring = ring
        self._holds = holds
        self._leasing = leasing
        self._metrics = metrics
        self._aliases = aliases
        self._peers = peers
        self._out = out
        #: Those who pull, by id.
        self._backends: dict[str, Peer] = {}
        #: Ids of ended jobs by the frontend that keeps them.
        self._finished: dict[tuple[str, bytes], list[str]] = {}
        self._tell_at = math.inf
        #: The backend and the call that the first job which it gets now answers.
        self._owed: tuple[str, int] = ("", 0)

    @property
    def wake_at(self) -> float:
        """When :meth:`tick` has something to do, in seconds of ``now``."""
        return min(self.queues.wake_at, self._tell_at)

    @property
    def holders(self) -> set[str]:
        """Who pins something of the ring."""
        return {_holder(job) for job in self.queues.jobs if job.places}

    def answer(self, peer: Peer, message: JobMessage, now: float) -> Any:
        """Do what a backend asks for, and return the answer; ``None`` where a delivery has brought it.

        Raises
        ------
        MmprepError
            What the call is to be answered with.
        """
        match message:
            case messages.Ack():
                self.queues.ack(peer.id, message.token, now)
                return self._deliver_with(peer, message.call, now)
            case messages.Acks():
                over = [token for token in message.tokens if not self._acked(peer, token, now)]
                return messages.Kept(message.call, tuple(over)) if over else self._deliver_with(peer, message.call, now)
            case messages.GiveBack():
                self.queues.give_back(peer.id, message.token, now, failed=message.failed)
                return self._deliver_with(peer, message.call, now)
            case messages.Pull():
                if MEDIA in message.queues:
                    raise errors.InvalidRequest(f"{MEDIA!r} is not a queue of jobs; choose another name", param="queue")
                self._backends[peer.id] = peer
                self.queues.pull(peer.id, message.queues, message.credits, now)
            case messages.Holding():
                held = [Held(one.token, one.queue, one.job, one.attempt) for one in message.jobs]
                return messages.Kept(message.call, tuple(self.queues.resume(peer.id, held, now)))
        return messages.Done(message.call)

    def _acked(self, peer: Peer, token: bytes, now: float) -> bool:
        """Take a job of several as done; return whether the delivery was not over before."""
        try:
            self.queues.ack(peer.id, token, now)
        except errors.StaleDelivery:
            return False
        return True

    def away(self, peer: Peer, now: float) -> None:
        """A connection is gone."""
        if self._backends.get(peer.id) is peer:
            del self._backends[peer.id]
            self.queues.away(peer.id, now)

    def gone(self, backend: str, now: float) -> None:
        """A backend's process lock has fallen."""
        self._backends.pop(backend, None)
        self.queues.gone(backend, now)

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self.queues.wake_at <= now:
            self.queues.tick(now)
        self._collect(now)
        if self._tell_at <= now:
            self._tell()

    def dispatch(self, now: float) -> None:
        """Let go of what has ended, and deliver what can be delivered."""
        if not self.queues.stirred:
            return
        self._collect(now)
        if self._ring.settled:
            while (delivery := self.queues.match(now)) is not None:
                self._deliver(delivery, now)

    def succeed(self, former: Jobs, now: float) -> None:
        """Go on for the jobs of a core with another ring: they are posted again, and those that have ended are not."""
        self.requests = former.requests
        self.requests.forget({job.id for job in former.queues.jobs})
        self.queues.succeed(former.queues, now)

    # --- posting --------------------------------------------------------------------------------------------------

    def post(
        self, peer: Peer, post: messages.Post, content: tuple[bytes, ...], now: float
    ) -> messages.Posted | messages.Unlike:
        """Take a frontend's job and return the answer.

        Raises
        ------
        MmprepError
            Why it is not taken.
        """
        made = None if post.once is None else self.requests.find(post.once.key, post.once.body, now)
        if made is not None and made != post.job:
            return messages.Posted(post.call, made)
        poster = (peer.id, peer.instance)
        if self.queues.knows(post.job):
            job = self.queues.job(post.job)
            if job is None:
                self._note_finished(poster, post.job, now)
            else:
                job.poster = poster
            return messages.Posted(post.call, post.job)
        if not self._ring.settled and not post.again:
            raise errors.ServiceUnavailable(_TAKING_OVER, retry_after=_TELL_SECONDS)
        if post.items and not self._finds(post):
            return messages.Unlike(post.call)
        job, slots = self._job(post, poster, content, now)
        self.queues.post(job, now, again=post.again)
        for slot in slots:
            self._ring.pin(_holder(job), slot)
        if post.once is not None:
            self.requests.note(post.once.key, post.once.body, job.id, now)
        return messages.Posted(post.call, job.id)

    def _finds(self, post: messages.Post) -> bool:
        """Whether the items of a job that was made without an offer are there; those that are count as found."""
        keys = [item.key for item in post.items]
        if not self._aliases.lead_to(post.items) or not self._holds.there(keys, post.places):
            return False
        for item in post.items:
            self._metrics.count("mmprep_mm_cache_queries_total", modality=item.modality)
            self._metrics.count("mmprep_mm_cache_hits_total", modality=item.modality)
        return True

    def _job(
        self, post: messages.Post, poster: tuple[str, bytes], content: tuple[bytes, ...], now: float
    ) -> tuple[Job, Iterable[int]]:
        """Return the job, and the ring's slots of its entries, which are there until something else is done."""
        places: dict[int, Place] = {}
        slots: dict[int, int] = {}
        fault = None
        for slot, generation in post.places:
            entry = self._ring.at(slot, generation)
            if entry is not None:
                places[generation] = Place(slot, generation, 0 if isinstance(entry, Spill) else entry.extent)
                slots[generation] = entry.slot
            elif post.again:
                fault = messages.Fault.of(errors.ServiceUnavailable(_LOST))
            else:
                raise errors.ServiceUnavailable(_EARLY)
        job = Job(
            post.job,
            post.queue,
            poster=poster,
            producer=post.producer,
            expires=now + post.expires_ms / 1000,
            priority=post.priority,
            cost=post.cost,
            nbytes=sum(map(len, content)),
            content=(post.places, content),
            places=() if fault else tuple(places.values()),
            error=fault,
        )
        return job, () if fault else slots.values()

    # --- delivering -----------------------------------------------------------------------------------------------

    def _deliver_with(self, peer: Peer, call: int, now: float) -> messages.Done | None:
        """Deliver what can be; return the answer to a backend's call, unless a job for it has brought that along."""
        self._owed = peer.id, call
        self.dispatch(now)
        (_, owed), self._owed = self._owed, ("", 0)
        return messages.Done(owed) if owed else None

    def _deliver(self, delivery: Delivery, now: float) -> None:
        job, peer = delivery.job, self._backends[delivery.backend]
        assert job is not None, "what is delivered is a job"
        places, content = job.content
        try:
            # Whether a backend may get leases does not change between two of them, so the first decides for all.
            granted = [
                self._leasing.grant(peer, slot, generation, "view", now)
                for slot, generation in (() if job.error else places)
            ]
        except errors.Busy:
            self.queues.put_off(delivery.token, now + _PAUSE_SECONDS, now)
            return
        if delivery.attempt == 1:
            self._metrics.observe("mmprep_queue_wait_seconds", now - job.posted_at, queue=job.queue)
        told = messages.Delivery(
            delivery.token,
            job.queue,
            job.id,
            delivery.attempt,
            int((delivery.deadline - now) * 1000),
            self._leasing.milliseconds,
            tuple(granted),
            job.error,
            self._done_with(peer),
        )
        self._out.append(Send(peer.identity, told, content))

    def _done_with(self, peer: Peer) -> int:
        """Return the call of this backend that is done and not answered; 0: there is none."""
        backend, owed = self._owed
        if backend != peer.id:
            return 0
        self._owed = "", 0
        return owed

    # --- ends -----------------------------------------------------------------------------------------------------

    def _collect(self, now: float) -> None:
        for job, _ in self.queues.take_ended():
            self._ring.unpin(_holder(job))
            self._note_finished(job.poster, job.id, now)

    def _note_finished(self, poster: tuple[str, bytes], job_id: str, now: float) -> None:
        self._finished.setdefault(poster, []).append(job_id)
        self._tell_at = min(self._tell_at, now + _TELL_SECONDS)

    def _tell(self) -> None:
        """Tell frontends what they need not keep any more. One that is away asks when it is back, by posting it again."""
        self._tell_at = math.inf
        finished, self._finished = self._finished, {}
        for peer in self._peers.values():
            ids = finished.get((peer.id, peer.instance), ()) if peer.role == "frontend" else ()
            for start in range(0, len(ids), messages.MAX_FINISHED):
                self._out.append(
                    Send(peer.identity, messages.Finished(tuple(ids[start : start + messages.MAX_FINISHED])))
                )

    def validate(self) -> None:
        """Check every invariant; raises AssertionError."""
        assert self._owed == ("", 0), "a call has no answer"
        self.queues.validate()
        self.requests.validate()
        for job in self.queues.jobs:
            pinned = sorted(entry.generation for entry in self._ring.pinned_by(_holder(job)))
            assert pinned == sorted(place.generation for place in job.places), (
                f"job {job.id} does not hold what it needs"
            )
        for backend, peer in self._backends.items():
            assert (peer.role, peer.id) == ("backend", backend), "a backend is found by another id"
            assert self._peers.get(peer.identity) is peer, "one that is gone pulls"
            assert peer.connected, "one that is away pulls"


def _holder(job: Job) -> str:
    """Return how the ring knows a job; calls have other names."""
    return f"job:{job.id}"


def report(queues: Queues, metrics: Metrics, now: float) -> dict[str, Any]:
    """Return what the status tells of the queues, by name, and count it."""
    told = {}
    for name in _GAUGES:
        metrics.forget_gauge(name)
    for queue in queues:
        delivered = queues.held_of(queue.name)
        values = (
            queue.depth,
            delivered,
            queue.nbytes,
            queue.holding.nbytes,
            len(queue.backends),
            len(queue.dead),
        )
        for name, value in zip(_GAUGES, values, strict=True):
            metrics.gauge(name, value, queue=queue.name)
        for event, number in queue.counts.items():
            metrics.total("mmprep_queue_jobs_total", number, queue=queue.name, event=event)
        told[queue.name] = {
            "depth": queue.depth,
            "delivered": delivered,
            "bytes": queue.nbytes,
            "held_bytes": queue.holding.nbytes,
            "backends": sorted(queue.backends),
            "jobs": dict(queue.counts),
            "dead_letters": [
                {
                    "request_id": letter.job_id,
                    "producer": letter.producer,
                    "attempts": letter.attempts,
                    "why": letter.why,
                    "seconds_ago": round(now - letter.since, 3),
                }
                for letter in queue.dead
            ],
        }
    return told
