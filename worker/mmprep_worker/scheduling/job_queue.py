"""One named queue: the jobs that wait in it, what they hold, its counts, and its dead letters. A part of :mod:`.queues`.

Jobs wait by priority, and share the backends fairly between producers: see :mod:`.queue`. A queue is bounded in jobs, in
bytes, and in what it holds of the ring; delivered jobs count until they have ended, so one that comes back always finds
its place. One producer may have three quarters of the jobs: the rest is for others, however fast it posts.
"""

from __future__ import annotations

import math
from collections import Counter, deque

from mmprep.errors import Busy, TooLarge
from mmprep_worker.scheduling.job import DeadLetter, Job, Limits, Outcome, Place
from mmprep_worker.scheduling.queue import Entry, FairQueue

#: Seconds after which a post that was refused may be tried again.
RETRY_AFTER = 1.0


class Holding:
    """Bytes of the ring that jobs hold; an entry counts once, however many of them hold it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.nbytes = 0
        #: ``{generation: [jobs, bytes]}``
        self._entries: dict[int, list[int]] = {}

    def has_room(self, places: tuple[Place, ...]) -> bool:
        """Whether a job may hold these, too."""
        nbytes = self.nbytes
        for place in places:
            if place.generation not in self._entries:
                nbytes += place.extent
        return nbytes <= self.most

    def add(self, places: tuple[Place, ...]) -> None:
        """A job holds these."""
        for place in places:
            entry = self._entries.get(place.generation)
            if entry is None:
                self._entries[place.generation] = [1, place.extent]
                self.nbytes += place.extent
            else:
                entry[0] += 1

    def remove(self, places: tuple[Place, ...]) -> None:
        """A job holds these no more."""
        for place in places:
            entry = self._entries[place.generation]
            entry[0] -= 1
            if not entry[0]:
                del self._entries[place.generation]
                self.nbytes -= place.extent

    def validate(self, jobs: list[Job]) -> None:
        """Check it against the jobs; raises AssertionError."""
        held = Counter(place.generation for job in jobs for place in job.places)
        assert {generation: jobs for generation, (jobs, _) in self._entries.items()} == held, "holds are miscounted"
        assert self.nbytes == sum(nbytes for _, nbytes in self._entries.values()), "the bytes held do not add up"
        assert self.nbytes <= self.most, "queues hold more of the ring than they may"


class JobQueue:
    """The jobs of one queue.

    Attributes
    ----------
    declared: it is there whether anybody pulls or not.
    backends: ids of those who pull.
    idle_since: when the last of them left, or when it was made; infinite while somebody pulls.
    jobs: all, by serial; delivered ones too.
    depth: how many of them wait.
    counts: jobs by what has happened to them: posted, delivered, returned, refused, and the outcomes.
    """

    def __init__(self, name: str, limits: Limits, *, declared: bool, now: float) -> None:
        self.name = name
        self.declared = declared
        self.backends: dict[str, None] = {}
        self.idle_since = now
        self.jobs: dict[int, Job] = {}
        self.depth = 0
        self.nbytes = 0
        self.counts: Counter[str] = Counter()
        self.dead: deque[DeadLetter] = deque(maxlen=limits.dead)
        self.holding = Holding(limits.pinned // 2)
        self._limits = limits
        self._max_bytes = limits.nbytes // 2
        self._producers: dict[str, int] = {}
        #: The one job that waits: without others there are no turns to take.
        self._lone: Job | None = None
        #: Those that wait, where they are several.
        self._waiting = FairQueue(max_items=limits.jobs, max_bytes=self._max_bytes)

    def waits(self, serial: int) -> bool:
        """Whether a job waits; else it is delivered, or not here."""
        return serial in self._waiting if self._lone is None else self._lone.serial == serial

    def check(self, job: Job) -> None:
        """Refuse a job for which there is no room; nothing changes.

        Raises
        ------
        Busy
            There is none at the moment.
        TooLarge
            There never is.
        """
        held = 0
        for place in job.places:
            held += place.extent
        if job.nbytes > self._max_bytes or held > self.holding.most:
            raise TooLarge(
                "the request's result is larger than what a queue may hold (--queue-size, and a quarter of --cache-size "
                "for its tensors); send less in one request",
                param="queue",
            )
        jobs = self._limits.jobs
        if len(self.jobs) >= jobs or self.nbytes + job.nbytes > self._max_bytes:
            raise Busy(f"queue {self.name!r} is full; post again later", param="queue", retry_after=RETRY_AFTER)
        if self._producers.get(job.producer, 0) >= max(1, jobs - jobs // 4):
            raise Busy(
                f"your jobs take the most that one producer may have of queue {self.name!r}; post again later",
                param="queue",
                retry_after=RETRY_AFTER,
            )
        if not self.holding.has_room(job.places):
            raise Busy(
                f"the tensors of the jobs in queue {self.name!r} fill its part of the cache; post again later",
                param="queue",
                retry_after=RETRY_AFTER,
            )

    def add(self, job: Job, *, waits: bool) -> None:
        """Take a job that :meth:`check` allows; one that does not wait is with a backend."""
        self.jobs[job.serial] = job
        self.nbytes += job.nbytes
        self._producers[job.producer] = self._producers.get(job.producer, 0) + 1
        self.holding.add(job.places)
        self.counts["posted"] += 1
        if waits:
            self._wait(job)

    def _wait(self, job: Job, *, first: bool = False) -> None:
        self.depth += 1
        if self.depth == 1:
            self._lone = job
            return
        if self._lone is not None:
            self._waiting.push(_entry(self._lone))
            self._lone = None
        self._waiting.push(_entry(job), first=first)

    def pop(self) -> Job:
        """Take the job whose turn it is; one must wait."""
        self.depth -= 1
        if self._lone is not None:
            job, self._lone = self._lone, None
            return job
        entry = self._waiting.pop(heavy_allowed=True)
        assert entry is not None, f"queue {self.name} has no job that waits"
        return self.jobs[entry.flight_id]

    def take(self, job: Job) -> None:
        """Take this job, whose holder of an earlier writer's time has come back."""
        self._take(job)

    def put_back(self, job: Job) -> None:
        """A delivered job waits again, before its producer's others."""
        self.counts["returned"] += 1
        self._wait(job, first=True)

    def remove(self, job: Job, outcome: Outcome, why: str, now: float) -> None:
        """A job has ended."""
        self._take(job)
        del self.jobs[job.serial]
        self.nbytes -= job.nbytes
        if self._producers[job.producer] > 1:
            self._producers[job.producer] -= 1
        else:
            del self._producers[job.producer]
        self.holding.remove(job.places)
        self.counts[outcome] += 1
        if outcome != "acked":
            self.dead.append(DeadLetter(job.id, job.producer, job.attempt, why, now))

    def _take(self, job: Job) -> None:
        """Let a job wait no more; nothing where it does not."""
        if not self.depth:
            return
        if self._lone is job:
            self._lone = None
        elif not self._waiting.remove(job.serial):
            return
        self.depth -= 1

    def forgotten_at(self) -> float:
        """Return when the queue may be forgotten, if nothing happens until then; infinite where never."""
        if self.declared or self.backends or self.jobs:
            return math.inf
        return self.idle_since + self._limits.idle_seconds

    def validate(self) -> None:
        """Check every invariant; raises AssertionError."""
        self._waiting.validate()
        assert self._lone is None or not len(self._waiting), "a job waits beside its queue's others"
        assert self.depth == len(self._waiting) + (self._lone is not None), "the jobs that wait are miscounted"
        assert self._lone is None or self.jobs.get(self._lone.serial) is self._lone, "a job waits that has ended"
        jobs = list(self.jobs.values())
        self.holding.validate(jobs)
        assert Counter(job.producer for job in jobs) == self._producers, "jobs by producer are miscounted"
        assert self.nbytes == sum(job.nbytes for job in jobs) <= self._max_bytes, "a queue's bytes are off its bound"
        assert len(jobs) <= self._limits.jobs, "a queue has more jobs than it may"
        assert len(self.dead) <= self._limits.dead, "a queue has more dead letters than it may"
        ended = self.counts["acked"] + self.counts["dead"] + self.counts["expired"]
        assert self.counts["posted"] == ended + len(jobs), f"a job of queue {self.name} was lost"
        assert (self.idle_since == math.inf) == bool(self.backends), "a queue does not know whether anybody pulls"


def _entry(job: Job) -> Entry:
    return Entry(job.serial, job.producer, job.cost, job.priority, job.nbytes, False)
