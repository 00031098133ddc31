"""Jobs in queues, as the simulation orders, does and accounts for them.

The :class:`Ledger` knows from clients what was accepted, from backends what was done, and from the writer only what it has
put on its lists of dead letters. Where a job was accepted it must be on one side or the other in the end, unless both the
frontend that keeps it and the writer that had it are gone.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from typing import NamedTuple

from tests.simulation.world import Violation

from mmprep.errors import InvalidRequest, MmprepError, StaleDelivery
from mmprep.items import ItemMeta, Plan
from mmprep.wire import messages
from mmprep_worker.scheduling.job import token_incarnation

QUEUES = ("first", "second")
#: Seconds that no run lasts.
NEVER = 1000.0
#: Seconds in which jobs must be taken; in the first, some cannot be.
EXPIRIES = (1.0, 8.0, NEVER, NEVER)


class Order(NamedTuple):
    """A job as a client wants it; ``once``: of a client that says when it asks again."""

    number: int
    queue: str
    expires: float
    once: messages.Once | None

    @property
    def text(self):
        """Return what the job says, by which backends know it."""
        return b"order %d" % self.number


def same_as(number):
    """Return what makes an order the same one when it is sent again."""
    return messages.Once(hashlib.sha256(b"key %d" % number).digest(), hashlib.sha256(b"body %d" % number).digest())


def plain_meta(_):
    """In place of :func:`mmprep.items.unpack_meta`: the metadata of simulated media say nothing."""
    return ItemMeta("image", Plan(()), (), {})


class _Made:
    """A job that a frontend has made of an order."""

    def __init__(self, job_id, order, media, keeper, expires):
        self.id, self.order, self.media, self.keeper, self.expires = job_id, order, media, keeper, expires
        #: How many lives of the writer had begun when a client was told of it; ``None``: none was.
        self.accepted_in = None
        self.tried = False


class Ledger:
    """What has become of all jobs.

    Attributes
    ----------
    lives: how many lives of the cache's writer have begun.
    delivered, done, late: deliveries that were taken, acknowledged, and told that they are over.
    counts: of them, by name.
    """

    def __init__(self):
        self.lives = 0
        self.delivered = self.done = self.late = 0
        self._made = {}
        self._given_up = set()
        self._orders = defaultdict(set)
        self._taken = defaultdict(set)
        self._acked = {}
        self._numbers = 0
        self._letters = {}

    @property
    def counts(self):
        return Counter(
            jobs=len(self._made), delivered=self.delivered, done=self.done, late=self.late, dead=len(self._given_up)
        )

    def any_order(self, random):
        """Return a new order of a random kind."""
        order = self.order(random.choice(QUEUES), random.choice(EXPIRIES))
        return order._replace(once=same_as(order.number)) if random.random() < 0.5 else order

    def order(self, queue, expires=NEVER):
        """Return a new order."""
        self._numbers += 1
        return Order(self._numbers, queue, expires, None)

    def made(self, order, media, keeper, expires):
        """A frontend makes a job; returns its id."""
        job_id = f"job-{order.number}-{len(self._made)}"
        self._made[job_id] = _Made(job_id, order, media, keeper, expires)
        return job_id

    def accepted(self, job_id, order):
        """A client is told that its order has become this job."""
        job = self._made[job_id]
        if job.order != order:
            raise Violation(f"order {order.number} is told to be {job_id}")
        job.accepted_in = self.lives

    def taken(self, job_id, token, queue, text):
        """A backend has a job in its hands; returns the media that it must have."""
        job = self._made.get(job_id)
        if job is None or text != job.order.text or queue != job.order.queue:
            raise Violation(f"{job_id} of queue {queue} says {text!r}, which nobody has posted so")
        incarnation = token_incarnation(token)
        self.delivered += 1
        self._taken[job_id, incarnation].add(token)
        self._check_order(job_id, incarnation)
        if job.order.once is not None:
            jobs = self._orders[job.order.number, incarnation]
            jobs.add(job_id)
            if len(jobs) > 1:
                raise Violation(f"one request with a key has become the jobs {sorted(jobs)}")
        return job.media

    def says_done(self, job_id):
        """A backend begins to say that a job is done; the writer may hear of it even if the backend dies."""
        self._made[job_id].tried = True

    def acknowledged(self, job_id, token, incarnation):
        """A backend has heard from the writer of this incarnation that a job is done.

        A later writer than the one that delivered it may take the first who comes back for the only one who has the job.
        """
        self.done += 1
        if token_incarnation(token) == incarnation:
            if self._acked.setdefault((job_id, incarnation), token) != token:
                raise Violation(f"{job_id} was done twice in one life of the writer")
            self._check_order(job_id, incarnation)

    def _check_order(self, job_id, incarnation):
        """Nothing is delivered after it was done."""
        acked = self._acked.get((job_id, incarnation))
        if acked is not None and max(self._taken[job_id, incarnation]) > acked:
            raise Violation(f"{job_id} was delivered again after it was done")

    def look(self, queues):
        """See what a writer has given up."""
        for queue in queues:
            given_up = queue.counts["dead"] + queue.counts["expired"]
            if given_up != self._letters.get(queue):
                self._letters[queue] = given_up
                self._given_up.update(letter.job_id for letter in queue.dead)

    def lost(self, now):
        """Return the ids of accepted jobs of which nothing is known, and which should be known.

        One that must have been taken by now may have met a writer that had no room for it in that time.
        """
        return [
            job.id
            for job in self._made.values()
            if job.accepted_in is not None
            and not (job.tried or job.id in self._given_up or job.expires <= now)
            and (job.keeper.alive or job.accepted_in == self.lives)
        ]


class Work:
    """What a backend does with jobs.

    Parameters
    ----------
    backend:
        Whose.
    pulling:
        Where they come from.
    """

    def __init__(self, backend, pulling):
        self._backend, self.pulling = backend, pulling
        self._ledger = backend.service.ledger

    @property
    def _chance(self):
        """Return what may go wrong with a job, which is nothing any more in the end."""
        return (lambda _: False) if self._backend.service.calm else self._backend.world.chance

    async def one(self):
        """Take a job that has come, look at what it has, and say what became of it."""
        backend = self._backend
        await backend.nap(0.02 if backend.leaving or backend.world.chance(0.9) else 2 * backend.settings.queue_seconds)
        found = self.pulling.take_now()
        if found is None:
            return
        held, content = found
        media = self._ledger.taken(held.job_id, held.token, held.queue, content.request)
        if held.error is None:
            await self._use(held, content, media)
        if self._chance(0.1):
            await backend.nap(2 * backend.settings.queue_seconds)
        try:
            await self._end(held)
        except StaleDelivery:
            self._ledger.late += 1
        except InvalidRequest as error:
            raise Violation(f"{backend} may not end {held.job_id}: {error!r}") from error
        except MmprepError as error:
            backend.world.say(f"{backend} cannot end {held.job_id}: {error!r}")
            for item in held.items:
                item.release()

    async def _use(self, held, content, media):
        backend = self._backend
        keys = [medium.key for medium in media]
        if [item.hash for item in content.items] != keys:
            raise Violation(f"{held.job_id} has other items than it was posted with")
        for medium, posted, item in zip(media, content.items, held.items, strict=True):
            backend.oracle.read(f"{backend} (metadata)", medium, posted.meta, medium.meta)
            await backend.use_once(item.source, medium, item.address)

    async def _end(self, held):
        pulling, choose = self.pulling, self._backend.world.random.random()
        if self._chance(0.3):
            await pulling.give_back(held, "it is too hard" if choose < 0.5 else None)
            return
        self._ledger.says_done(held.job_id)
        if choose < 0.3:
            pulling.ack_soon(held)
            self._ledger.done += 1
            return
        if choose < 0.6:
            await pulling.ack(held)
        else:
            await self._ack_now(held)
        core = self._backend.service.writer.core
        self._ledger.acknowledged(held.job_id, held.token, core and core.ring.incarnation)
        if self._chance(0.2):
            try:
                await pulling.ack(held)
            except InvalidRequest:
                return
            raise Violation(f"{held.job_id} may be ended twice")

    async def _ack_now(self, held):
        """As :meth:`mmprep.job.Job.ack`."""
        told = self._backend.loop.create_future()
        try:
            self.pulling.ack_now(held, told.set_result)
        except MmprepError as error:
            outcome = error
        else:
            outcome = await told
        if isinstance(outcome, StaleDelivery):
            raise outcome
        if isinstance(outcome, MmprepError):
            await self.pulling.ack(held)
