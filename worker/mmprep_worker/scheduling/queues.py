"""Named queues that backends pull from: at least once, with credits, priorities and dead letters. Pure.

A *job* is posted to a queue and waits until a backend that pulls from it has credit. Then it is *delivered*, with an attempt
and a token, and the backend has so many seconds to acknowledge it. A delivery ends by its backend's word (acknowledged,
failed, given back), by its time, by the fall of its backend's process lock, or when its backend connects again and does
not have it. A job whose delivery ended without an acknowledgement is delivered again; after so many failures it is given
up and goes to the queue's list of dead letters. Rules:

* A token is good for one delivery, for its backend, while the delivery lasts. So no job is in two hands with a good token.
* A backend never has more deliveries than credits. One whose delivery ran out of time gets no more until it says a word.
* What comes back goes to another backend, if there is one with credit.
* A queue is there while somebody pulls from it, while it has jobs, and for a while after that; or always, if declared.
  Nobody can post to one that is not there: a name that is wrong is an error, and not a place where jobs wait for nobody.
* A job has a time in which it must be taken. So in a queue that nobody pulls from any more, jobs end as dead letters.

After a restart of the writer, frontends post again what has not ended, and backends say what they hold
(:meth:`Queues.resume`), in whatever order. The tokens of an earlier writer stay good for what was not delivered since.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from mmprep.errors import Busy, NotFound, StaleDelivery
from mmprep_worker.scheduling.job import Delivery, Ended, Held, Job, Limits, Outcome, token, token_incarnation
from mmprep_worker.scheduling.job_queue import RETRY_AFTER, Holding, JobQueue
from mmprep_worker.scheduling.puller import Puller

_OVERDUE = "no acknowledgement in time"
_GONE = "the backend's process ended"
_LATE = "nobody took it in its time"
#: Outdated elements of the heap of expiries that are tolerated beyond as many as there are jobs.
_SLACK = 64


class Queues:
    """All queues of one writer. ``now`` is in monotonic seconds and never falls.

    Parameters
    ----------
    limits:
        Bounds.
    incarnation:
        Of the writer: its tokens are nobody else's.
    declared:
        Names of queues that are always there.
    """

    def __init__(self, limits: Limits, *, incarnation: int, declared: Iterable[str] = ()) -> None:
        self.limits = limits
        self.incarnation = incarnation
        self.nbytes = 0
        self.holding = Holding(limits.pinned)
        self._queues = {name: JobQueue(name, limits, declared=True, now=-math.inf) for name in declared}
        self._pullers: OrderedDict[str, Puller] = OrderedDict()
        self._jobs: dict[str, Job] = {}
        #: By deadline, because all have the same time.
        self._deliveries: OrderedDict[bytes, Delivery] = OrderedDict()
        self._by_job: dict[str, Delivery] = {}
        self._serial = 0
        self._tokens = 0
        #: ``(expires, serial, id)``; outdated where the job has ended.
        self._expiries: list[tuple[float, int, str]] = []
        self._finished: OrderedDict[str, None] = OrderedDict()
        #: Tokens that were good when they were acknowledged, and by whom: an answer may be lost.
        self._acked: OrderedDict[bytes, str] = OrderedDict()
        self._ended: list[Ended] = []
        #: Whether something has changed, a job's end for example, since :meth:`match` found nothing. To be read only.
        self.stirred = False

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[JobQueue]:
        return iter(self._queues.values())

    def __contains__(self, name: str) -> bool:
        return name in self._queues

    @property
    def jobs(self) -> Iterable[Job]:
        """All jobs, waiting and delivered."""
        return self._jobs.values()

    def job(self, job_id: str) -> Job | None:
        """Return the job of that id, if it has not ended."""
        return self._jobs.get(job_id)

    def deliveries_of(self, backend: str) -> Sequence[Delivery]:
        """Return what a backend has."""
        puller = self._pullers.get(backend)
        return [] if puller is None else list(puller.held.values())

    def held_of(self, queue: str) -> int:
        """Return how many jobs of a queue are delivered."""
        found = self._queues[queue]
        return len(found.jobs) - found.depth

    @property
    def wake_at(self) -> float:
        """When :meth:`tick` has something to do, in seconds of ``now``."""
        wake_at = self._expiries[0][0] if self._expiries else math.inf
        if self._deliveries:
            wake_at = min(wake_at, next(iter(self._deliveries.values())).deadline)
        for queue in self._queues.values():
            if queue.idle_since < math.inf:
                wake_at = min(wake_at, queue.forgotten_at())
        for puller in self._pullers.values():
            if -math.inf < puller.paused_until < wake_at:
                wake_at = puller.paused_until
        return wake_at

    def take_ended(self) -> Sequence[Ended]:
        """Return the jobs that have ended since the last call."""
        if not self._ended:
            return ()
        ended, self._ended = self._ended, []
        return ended

    def succeed(self, former: Queues, now: float) -> None:
        """Go on in place of another table of this process: its queues are here, and what has ended there stays ended."""
        self._finished.update(former._finished)
        for queue in former:
            if queue.name not in self._queues:
                self._make(queue.name, now)

    # --- producers ------------------------------------------------------------------------------------------------

    def knows(self, job_id: str) -> bool:
        """Whether a job of that id is here, or was and has ended."""
        return job_id in self._jobs or job_id in self._finished

    def has_ended(self, job_id: str) -> bool:
        """Whether a job of that id was here and has ended."""
        return job_id in self._finished

    def post(self, job: Job, now: float, *, again: bool = False) -> None:
        """Take a job; one whose id is known must not be posted: see :meth:`knows`.

        Parameters
        ----------
        again:
            It was accepted by a writer before this one, so its queue was there.

        Raises
        ------
        NotFound
            There is no such queue.
        Busy, TooLarge
            There is no room for it.
        """
        assert not self.knows(job.id), f"job {job.id} is posted twice"
        self.stirred = True
        queue = self._queues.get(job.queue)
        if queue is None:
            if not again:
                raise NotFound(
                    f"no backend pulls from a queue named {job.queue!r}; start one, or name the queue in --queues",
                    param="queue",
                )
            self._check_number([job.queue])
            queue = self._make(job.queue, now)
        try:
            queue.check(job)
            self._check_all(job)
        except Busy:
            queue.counts["refused"] += 1
            raise
        self._serial += 1
        job.serial = self._serial
        job.posted_at = now
        self._jobs[job.id] = job
        self.nbytes += job.nbytes
        self.holding.add(job.places)
        heapq.heappush(self._expiries, (job.expires, job.serial, job.id))
        delivery = self._by_job.get(job.id)
        if delivery is not None and delivery.queue == job.queue:  # its backend was here first
            delivery.job = job
            job.attempt = delivery.attempt
            queue.add(job, waits=False)
        else:
            if delivery is not None:
                self._end(delivery)
            queue.add(job, waits=True)

    def _check_all(self, job: Job) -> None:
        if self.nbytes + job.nbytes > self.limits.nbytes:
            raise Busy("the queues are full; post again later", param="queue", retry_after=RETRY_AFTER)
        if not self.holding.has_room(job.places):
            raise Busy(
                "the tensors of queued jobs fill their part of the cache; post again later",
                param="queue",
                retry_after=RETRY_AFTER,
            )

    # --- backends -------------------------------------------------------------------------------------------------

    def pull(self, backend: str, queues: Sequence[str], credits: int, now: float) -> None:  # noqa: A002 -- the word for it
        """A backend pulls from these queues from now on, and from no others; without credits it drains.

        Raises
        ------
        Busy
            There are too many queues.
        """
        self.stirred = True
        names = list(dict.fromkeys(queues))
        self._check_number(names)
        puller = self._puller(backend)
        puller.credits = credits
        puller.silent = False
        self._leave_queues(puller, now, keep=names)
        for name in names:
            queue = self._queues.get(name) or self._make(name, now)
            queue.backends[backend] = None
            queue.idle_since = math.inf
        puller.queues = [name for name in puller.queues if name in names] + [n for n in names if n not in puller.queues]
        self._forget_if_unused(puller)

    def resume(self, backend: str, held: Iterable[Held], now: float) -> list[bytes]:
        """A backend that has connected again says what it has; return the tokens that are good no more.

        What it was given and does not have comes back. What an earlier writer gave it is its own, unless it was delivered
        since.
        """
        puller = self._puller(backend)
        listed = set()
        self.stirred = True
        lost = []
        for one in held:
            known = puller.held.get(one.token)
            if known is not None or self._take_over(puller, one, now):
                listed.add(one.token)
            else:
                lost.append(one.token)
        for delivery in [d for d in puller.held.values() if d.token not in listed]:
            self._come_back(delivery, now, failed=None)
        self._forget_if_unused(puller)
        return lost

    def _take_over(self, puller: Puller, held: Held, now: float) -> bool:
        """Let a backend go on with what an earlier writer gave it; return whether it may."""
        if token_incarnation(held.token) >= self.incarnation or held.job_id in self._finished:
            return False
        if held.token in self._deliveries or not self._yields(held):
            return False
        job = self._jobs.get(held.job_id)
        if job is not None:
            if job.queue != held.queue or not self._queues[job.queue].waits(job.serial):
                return False
            self._queues[job.queue].take(job)
            job.attempt = max(job.attempt, held.attempt)
        self._pullers.setdefault(puller.id, puller)  # what yielded may have been all that it had
        self._hold(
            Delivery(
                held.token,
                puller.id,
                now + self.limits.seconds,
                job_id=held.job_id,
                queue=held.queue,
                attempt=held.attempt,
                job=job,
            )
        )
        return True

    def _yields(self, held: Held) -> bool:
        """Whether nobody has the job of a delivery, or one who had it before: earlier attempts were over with this one."""
        other = self._by_job.get(held.job_id)
        if other is None:
            return True
        if other.attempt >= held.attempt or token_incarnation(other.token) >= self.incarnation:
            return False
        self._end(other)
        if other.job is not None:
            self._queues[other.queue].put_back(other.job)
        return True

    def away(self, backend: str, now: float) -> None:
        """A backend's connection is gone: it gets nothing more until it pulls again, and keeps what it has for its time."""
        puller = self._pullers.get(backend)
        if puller is not None:
            puller.credits = 0
            self._leave_queues(puller, now)
            puller.queues = []
            self._forget_if_unused(puller)

    def gone(self, backend: str, now: float) -> None:
        """A backend's process lock has fallen: what it has comes back, and counts as failed."""
        self.stirred = True
        puller = self._pullers.get(backend)
        if puller is None:
            return
        puller.credits = 0
        self._leave_queues(puller, now)
        puller.queues = []
        for delivery in list(puller.held.values()):
            self._come_back(delivery, now, failed=_GONE)
        self._forget_if_unused(puller)

    def ack(self, backend: str, made: bytes, now: float) -> None:
        """A job is done. Repeated for one delivery, it changes nothing.

        Raises
        ------
        StaleDelivery
            The delivery is over, or was another backend's.
        """
        if self._acked.get(made) == backend:
            return
        self.stirred = True
        delivery = self._delivery(backend, made)
        self._end(delivery)
        _remember(self._acked, made, backend, self.limits.remembered)
        if delivery.job is None:
            self._finish(delivery.job_id)
        else:
            self._leave(delivery.job, "acked", "", now)

    def give_back(self, backend: str, made: bytes, now: float, *, failed: str | None) -> None:
        """A backend has not done a job: it failed over it, for the reason ``failed``, or did not begin, ``None``.

        Raises
        ------
        StaleDelivery
            The delivery is over, or was another backend's.
        """
        self.stirred = True
        self._come_back(self._delivery(backend, made), now, failed=failed)

    def put_off(self, made: bytes, until: float, now: float) -> None:
        """A delivery could not be made: its job comes back, and its backend gets nothing before ``until``."""
        self.stirred = True
        delivery = self._deliveries[made]
        puller = self._pullers[delivery.backend]
        puller.paused_until = until
        self._come_back(delivery, now, failed=None)

    # --- deliveries -----------------------------------------------------------------------------------------------

    def match(self, now: float) -> Delivery | None:
        """Deliver one job to one backend; ``None`` where none waits for one that may take it.

        The backend with the fewest deliveries is served, of several the one that was served longest ago, from its
        queues by turns.
        """
        if not self.stirred:
            return None
        if not self._something_waits():
            self.stirred = False
            return None
        chosen: Puller | None = None
        name = ""
        for puller in self._pullers.values():
            if (chosen is None or len(puller.held) < len(chosen.held)) and puller.may_take(now):
                for found in puller.queues:
                    if self._queues[found].depth:
                        chosen, name = puller, found
                        break
        if chosen is None:
            self.stirred = False
            return None
        job = self._queues[name].pop()
        if job.avoid == chosen.id:
            others = (self._pullers[backend] for backend in self._queues[name].backends if backend != job.avoid)
            chosen = next((puller for puller in others if puller.may_take(now)), chosen)
        self._pullers.move_to_end(chosen.id)
        if len(chosen.queues) > 1:
            chosen.queues.remove(name)
            chosen.queues.append(name)
        self._queues[name].counts["delivered"] += 1
        self._tokens += 1
        job.attempt += 1
        delivery = Delivery(
            token(self.incarnation, self._tokens),
            chosen.id,
            now + self.limits.seconds,
            job_id=job.id,
            queue=name,
            attempt=job.attempt,
            job=job,
        )
        self._hold(delivery)
        return delivery

    def _something_waits(self) -> bool:
        for queue in self._queues.values():  # noqa: SIM110 -- asked twice a job, and any() costs more
            if queue.depth:
                return True
        return False

    def tick(self, now: float) -> None:
        """Time has passed: deliveries run out, jobs expire, queues that nobody needs are forgotten."""
        self.stirred = True
        while self._deliveries:
            delivery = next(iter(self._deliveries.values()))
            if delivery.deadline > now:
                break
            self._pullers[delivery.backend].silent = True
            self._come_back(delivery, now, failed=_OVERDUE)
        while self._expiries and self._expiries[0][0] <= now:
            _, serial, job_id = heapq.heappop(self._expiries)
            job = self._jobs.get(job_id)
            if job is not None and job.serial == serial and job_id not in self._by_job:
                self._leave(job, "expired", _LATE, now)
        for puller in self._pullers.values():
            if puller.paused_until <= now:
                puller.paused_until = -math.inf
        for name in [name for name, queue in self._queues.items() if queue.forgotten_at() <= now]:
            del self._queues[name]

    # --- steps ----------------------------------------------------------------------------------------------------

    def _check_number(self, names: Iterable[str]) -> None:
        if len(self._queues.keys() | set(names)) > self.limits.queues:
            raise Busy(
                f"there are {self.limits.queues} queues, and no more are made; pull from one of them", param="queue"
            )

    def _make(self, name: str, now: float) -> JobQueue:
        queue = self._queues[name] = JobQueue(name, self.limits, declared=False, now=now)
        return queue

    def _puller(self, backend: str) -> Puller:
        puller = self._pullers.get(backend)
        if puller is None:
            puller = self._pullers[backend] = Puller(backend)
        return puller

    def _leave_queues(self, puller: Puller, now: float, keep: Sequence[str] = ()) -> None:
        for name in puller.queues:
            queue = self._queues[name]
            if name not in keep:
                del queue.backends[puller.id]
                if not queue.backends:
                    queue.idle_since = now

    def _forget_if_unused(self, puller: Puller) -> None:
        if not puller.held and not puller.queues:
            self._pullers.pop(puller.id, None)

    def _delivery(self, backend: str, made: bytes) -> Delivery:
        puller = self._pullers.get(backend)
        if puller is not None:
            puller.silent = False
            delivery = puller.held.get(made)
            if delivery is not None:
                return delivery
        raise StaleDelivery("the job is not this delivery's any more: its time was over, or it was delivered elsewhere")

    def _hold(self, delivery: Delivery) -> None:
        self._deliveries[delivery.token] = delivery
        self._by_job[delivery.job_id] = delivery
        self._pullers[delivery.backend].held[delivery.token] = delivery

    def _end(self, delivery: Delivery) -> None:
        del self._deliveries[delivery.token]
        del self._by_job[delivery.job_id]
        puller = self._pullers[delivery.backend]
        del puller.held[delivery.token]
        self._forget_if_unused(puller)

    def _come_back(self, delivery: Delivery, now: float, *, failed: str | None) -> None:
        """A delivery has ended without an acknowledgement; its job waits again, or is given up."""
        self._end(delivery)
        job = delivery.job
        if job is None:
            return
        if failed is not None:
            job.failures += 1
            job.avoid = delivery.backend
        if job.failures >= self.limits.attempts:
            self._leave(job, "dead", failed or "", now)
        elif job.expires <= now:
            self._leave(job, "expired", _LATE, now)
        else:
            self._queues[job.queue].put_back(job)

    def _leave(self, job: Job, outcome: Outcome, why: str, now: float) -> None:
        queue = self._queues[job.queue]
        queue.remove(job, outcome, why, now)
        if not queue.jobs and not queue.backends:
            queue.idle_since = now
        del self._jobs[job.id]
        self.nbytes -= job.nbytes
        self.holding.remove(job.places)
        if len(self._expiries) > 2 * len(self._jobs) + _SLACK:
            self._expiries = [one for one in self._expiries if one[2] in self._jobs]
            heapq.heapify(self._expiries)
        self._finish(job.id)
        self._ended.append(Ended(job, outcome))

    def _finish(self, job_id: str) -> None:
        _remember(self._finished, job_id, None, self.limits.remembered)

    # --- invariants -----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every invariant, of the parts too.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        for name, queue in self._queues.items():
            assert queue.name == name, f"queue {name} is found by another name"
            queue.validate()
            pulling = {puller.id for puller in self._pullers.values() if name in puller.queues}
            assert pulling == queue.backends.keys(), f"queue {name} does not know who pulls from it"
        jobs = list(self._jobs.values())
        self.holding.validate(jobs)
        assert self.nbytes == sum(job.nbytes for job in jobs) <= self.limits.nbytes, "the bytes of jobs are off"
        assert len(self._queues) <= self.limits.queues, "there are too many queues"
        for job_id, job in self._jobs.items():
            self._validate_job(job_id, job)
        assert sum(len(queue.jobs) for queue in self._queues.values()) == len(jobs), "a queue has a job that has ended"
        deadlines = [delivery.deadline for delivery in self._deliveries.values()]
        assert deadlines == sorted(deadlines), "deliveries are not in the order of their deadlines"
        held = {made: one for puller in self._pullers.values() for made, one in puller.held.items()}
        assert held == self._deliveries, "a delivery is nobody's, or two backends'"
        assert {one.job_id: one for one in self._deliveries.values()} == self._by_job, "a job has two good tokens"
        for made, delivery in self._deliveries.items():
            assert delivery.token == made, "a delivery is found by another token"
            assert delivery.job is self._jobs.get(delivery.job_id), "a delivery is of another job"
            assert made not in self._acked, "a delivery is acknowledged and lasts"
        for puller in self._pullers.values():
            assert puller.held or puller.queues, "a backend without a queue and without a job is remembered"
        if not self.stirred:
            free = [p for p in self._pullers.values() if p.paused_until == -math.inf and p.may_take(0.0)]
            overlooked = [name for puller in free for name in puller.queues if self._queues[name].depth]
            assert not overlooked, f"a job of queue {overlooked[:1]} waits for nothing"
        for memory in (self._finished, self._acked):
            assert len(memory) <= self.limits.remembered, "too much is remembered of what has ended"
        assert not self._finished.keys() & self._jobs.keys(), "a job has ended and is there"
        assert len(self._expiries) <= 2 * len(jobs) + _SLACK + 1, "the heap is full of ended jobs"

    def _validate_job(self, job_id: str, job: Job) -> None:
        assert job.id == job_id, "a job is found by another id"
        queue = self._queues[job.queue]
        assert queue.jobs.get(job.serial) is job, f"job {job_id} is not in its queue"
        assert queue.waits(job.serial) != (job_id in self._by_job), f"job {job_id} waits and is delivered, or neither"
        assert job.failures < self.limits.attempts, f"job {job_id} should have been given up"


def _remember(memory: OrderedDict, key: object, value: object, most: int) -> None:  # type: ignore[type-arg]
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > most:
        memory.popitem(last=False)
