"""The queues of jobs against a model that knows of each job where it is, and of each token whether it is good."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.machines import at_length

from mmprep.errors import Busy, NotFound, StaleDelivery, TooLarge
from mmprep_worker.scheduling.job import Held, Job, Limits, Place, token_incarnation
from mmprep_worker.scheduling.queues import Queues

LIMITS = Limits(
    jobs=6, nbytes=60, pinned=40, queues=4, dead=3, attempts=3, seconds=10.0, idle_seconds=30.0, remembered=200
)
BACKENDS = ("b0", "b1", "b2")
QUEUES = ("a", "b", "always", "nobody")
PICK = st.integers(0, 1_000)


class QueuesMachine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.now = 0.0
        self.incarnation = 1
        self.queues = self.make()
        self.ids = count()
        #: Every job that was accepted and has not ended, with what a frontend would post again.
        self.jobs: dict[str, Job] = {}
        self.ended: dict[str, str] = {}
        self.failures: dict[str, int] = {}
        self.attempts: dict[str, int] = {}
        #: Good tokens, with what their backends know; and those that were good once.
        self.good: dict[bytes, tuple[str, Held]] = {}
        self.stale: list[tuple[str, bytes]] = []
        self.known: dict[bytes, Held] = {}
        self.acked: list[tuple[str, bytes]] = []
        self.credits = dict.fromkeys(BACKENDS, 0)
        self.pulls: dict[str, tuple[str, ...]] = dict.fromkeys(BACKENDS, ())

    def make(self):
        return Queues(LIMITS, incarnation=self.incarnation, declared=("always",))

    # --- producers ------------------------------------------------------------------------------------------------

    @rule(
        queue=st.sampled_from(QUEUES),
        producer=st.sampled_from("pq"),
        priority=st.integers(-1, 1),
        nbytes=st.integers(0, 32),
        places=st.sets(st.integers(0, 5), max_size=2),
    )
    def post(self, queue, producer, priority, nbytes, places):
        # An entry has one size, whoever holds it.
        at = tuple(Place(slot, slot + 1, (slot * 5) % 23) for slot in places)
        job = Job(
            f"job-{next(self.ids)}",
            queue,
            poster=("f", b""),
            producer=producer,
            priority=priority,
            nbytes=nbytes,
            places=at,
            expires=self.now + 1 + (7 * nbytes) % 40,
        )
        before = len(self.queues)
        try:
            self.queues.post(job, self.now)
        except NotFound:
            assert queue not in self.queues
            assert queue != "always"
        except Busy:
            assert len(self.jobs) > 0, "there is room for a first job"
        except TooLarge:
            assert nbytes > LIMITS.nbytes // 2 or sum(place.extent for place in at) > LIMITS.pinned // 2
        else:
            self.jobs[job.id] = job
            self.failures[job.id] = 0
            self.attempts[job.id] = 0
            before += 1
        assert len(self.queues) == before

    @precondition(lambda self: self.ended)
    @rule()
    def an_ended_job_is_known(self):
        for job_id in [*self.ended][-20:]:
            assert self.queues.knows(job_id)
            assert self.queues.has_ended(job_id)

    # --- backends -------------------------------------------------------------------------------------------------

    @rule(backend=st.sampled_from(BACKENDS), names=st.sets(st.sampled_from(QUEUES[:3])), credit=st.integers(0, 3))
    def pull(self, backend, names, credit):
        names = tuple(sorted(names))
        self.queues.pull(backend, names, credit, self.now)
        self.pulls[backend] = names
        self.credits[backend] = credit

    @rule(backend=st.sampled_from(BACKENDS), kept=st.integers(0, 7))
    def connect_again(self, backend, kept):
        """The backend's connection broke, and some of what it was given did not arrive."""
        self.queues.away(backend, self.now)
        self.pulls[backend], self.credits[backend] = (), 0
        mine = [(made, held) for made, (owner, held) in self.good.items() if owner == backend]
        # Of this writer: what an earlier one gave may be taken up again, since its end may not have been heard.
        stale = [made for owner, made in self.stale if (owner, token_incarnation(made)) == (backend, self.incarnation)]
        old = [Held(made, "a", "job-0", 1) for made in stale[-2:]]
        listed = [held for number, (_, held) in enumerate(mine) if kept >> number & 1]
        lost = self.queues.resume(backend, [*listed, *old], self.now)
        assert set(lost) == {held.token for held in old}
        for made, held in mine:
            if held not in listed:
                self.over(made, failed=False)
        self.collect()

    @rule(backend=st.sampled_from(BACKENDS))
    def die(self, backend):
        self.queues.gone(backend, self.now)
        self.pulls[backend], self.credits[backend] = (), 0
        for made in [made for made, (owner, _) in self.good.items() if owner == backend]:
            self.over(made, failed=True)
        self.collect()

    @precondition(lambda self: self.good)
    @rule(pick=PICK)
    def ack(self, pick):
        made, (backend, held) = self.picked(pick)
        self.queues.ack(backend, made, self.now)
        del self.good[made]
        self.acked.append((backend, made))
        if held.job_id in self.jobs:
            assert [(one.job.id, one.outcome) for one in self.queues.take_ended()] == [(held.job_id, "acked")]
            del self.jobs[held.job_id]
        self.ended[held.job_id] = "acked"

    @precondition(lambda self: self.good)
    @rule(pick=PICK, failed=st.booleans())
    def give_back(self, pick, failed):
        made, (backend, _) = self.picked(pick)
        self.queues.give_back(backend, made, self.now, failed="broken" if failed else None)
        self.over(made, failed=failed)
        self.collect()

    @precondition(lambda self: self.good)
    @rule(pick=PICK)
    def somebody_elses_word_is_refused(self, pick):
        made, (backend, _) = self.picked(pick)
        for other in BACKENDS:
            if other != backend:
                with pytest.raises(StaleDelivery):
                    self.queues.ack(other, made, self.now)

    @precondition(lambda self: self.stale)
    @rule(pick=PICK)
    def a_late_word_is_refused(self, pick):
        backend, made = self.stale[pick % len(self.stale)]
        with pytest.raises(StaleDelivery):
            self.queues.ack(backend, made, self.now)
        with pytest.raises(StaleDelivery):
            self.queues.give_back(backend, made, self.now, failed=None)

    @precondition(lambda self: self.acked)
    @rule(pick=PICK)
    def a_repeated_word_changes_nothing(self, pick):
        self.queues.ack(*self.acked[pick % len(self.acked)], self.now)
        assert not self.queues.take_ended()

    # --- deliveries and time --------------------------------------------------------------------------------------

    @rule(fails=st.booleans())
    def match(self, fails):
        self.collect()
        waiting = self.waiting()
        delivery = self.queues.match(self.now)
        if delivery is None:
            self.nothing_can_be_delivered(waiting)
            return
        job = delivery.job
        assert job.id in waiting
        assert job.queue in self.pulls[delivery.backend]
        mine = [held for owner, held in self.good.values() if owner == delivery.backend]
        assert len(mine) < self.credits[delivery.backend]
        others = [self.jobs[one] for one in waiting if self.jobs[one].queue == job.queue]
        assert job.priority == min(other.priority for other in others), "a more urgent job waits"
        assert delivery.attempt == self.attempts[job.id] + 1
        self.attempts[job.id] += 1
        assert delivery.token not in self.good
        held = Held(delivery.token, job.queue, job.id, delivery.attempt)
        self.good[delivery.token] = delivery.backend, held
        self.known[delivery.token] = held
        if fails:
            self.queues.put_off(delivery.token, self.now + 1.0, self.now)
            self.over(delivery.token, failed=False)
            self.collect()

    def nothing_can_be_delivered(self, waiting):
        needed = {self.jobs[job_id].queue for job_id in waiting}
        for backend in BACKENDS:
            puller = self.queues._pullers.get(backend)
            if puller is not None and not puller.silent and puller.paused_until <= self.now:
                mine = [owner for owner, _ in self.good.values() if owner == backend]
                assert len(mine) >= self.credits[backend] or not needed & set(self.pulls[backend])

    @rule(seconds=st.sampled_from([0.5, 3.0, 9.0, 31.0]))
    def wait(self, seconds):
        until = self.now + seconds
        while self.queues.wake_at <= until:
            self.now = max(self.now, self.queues.wake_at)
            over = {made for made, one in self.queues._deliveries.items() if one.deadline <= self.now}
            self.queues.tick(self.now)
            for made in over:
                self.over(made, failed=True)
            self.collect()
        self.now = until

    # --- a restart ------------------------------------------------------------------------------------------------

    @rule(order=st.randoms(use_true_random=False), forgetful=st.booleans())
    def the_writer_is_replaced(self, order, forgetful):
        """Frontends post again what has not ended; backends say what they have, in any order, or have ended meanwhile."""
        self.incarnation += 1
        self.queues = self.make()
        self.credits = dict.fromkeys(BACKENDS, 0)
        self.pulls = dict.fromkeys(BACKENDS, ())
        over = [(backend, self.known[made]) for backend, made in self.stale]
        self.stale, self.acked = [], []
        steps = [("post", job_id) for job_id in self.jobs]
        steps += [("resume", backend) for backend in BACKENDS[forgetful:]]
        order.shuffle(steps)
        former, self.good = self.good, {}
        self.failures = dict.fromkeys(self.jobs, 0)
        self.attempts = dict.fromkeys(self.jobs, 0)
        self.ended = {}
        for step, name in steps:
            if step == "post":
                old = self.jobs[name]
                job = self.jobs[name] = Job(
                    old.id,
                    old.queue,
                    poster=old.poster,
                    producer=old.producer,
                    priority=old.priority,
                    nbytes=old.nbytes,
                    places=old.places,
                    expires=old.expires,
                )
                self.queues.post(job, self.now, again=True)
            else:
                held = [held for owner, held in [*former.values(), *over] if owner == name]
                order.shuffle(held)
                self.queues.resume(name, held, self.now)
        self.good = {d.token: (b, self.known[d.token]) for b in BACKENDS for d in self.queues.deliveries_of(b)}
        alive = {made for made, (backend, _) in former.items() if backend in BACKENDS[forgetful:]}
        assert alive <= self.good.keys(), "a backend lost what it had"
        held_before = {held.job_id for made, (_, held) in former.items() if made in alive}
        for made in self.good.keys() - alive:
            assert self.good[made][1].job_id not in held_before, "an earlier attempt has come before a later one"
        for _, held in self.good.values():
            if held.job_id in self.attempts:
                self.attempts[held.job_id] = held.attempt
        self.collect()

    # --- the model ------------------------------------------------------------------------------------------------

    def picked(self, pick):
        return [*self.good.items()][pick % len(self.good)]

    def waiting(self):
        delivered = {held.job_id for _, held in self.good.values()}
        return {job_id for job_id in self.jobs if job_id not in delivered}

    def over(self, made, *, failed):
        backend, held = self.good.pop(made)
        self.stale.append((backend, made))
        if held.job_id in self.failures:
            self.failures[held.job_id] += failed

    def collect(self):
        """Take what has ended; each job ends once, and for a reason."""
        for job, outcome in self.queues.take_ended():
            assert outcome != "acked"
            assert job.id in self.waiting(), "a job ends that is not here, or is in somebody's hands"
            if outcome == "dead":
                assert self.failures[job.id] == LIMITS.attempts
            else:
                assert job.expires <= self.now
            del self.jobs[job.id]
            self.ended[job.id] = outcome

    @invariant()
    def holds(self):
        if not hasattr(self, "queues"):
            return
        self.queues.validate()
        assert {job.id for job in self.queues.jobs} == self.jobs.keys(), "a job was lost, or has come from nowhere"
        held = {d.token: (b, d.job_id) for b in BACKENDS for d in self.queues.deliveries_of(b)}
        assert held == {made: (owner, one.job_id) for made, (owner, one) in self.good.items()}
        by_job = [one.job_id for _, one in self.good.values()]
        assert len(by_job) == len(set(by_job)), "two hold a good token of one job"
        assert all(self.failures[job_id] < LIMITS.attempts for job_id in self.jobs)
        assert "always" in self.queues

    def teardown(self):
        """When the faults stop, every job ends, and each that somebody takes in time is acknowledged."""
        if not hasattr(self, "queues"):
            return
        for made in [*self.good]:
            backend, held = self.good[made]
            self.queues.ack(backend, made, self.now)
            del self.good[made]
            self.jobs.pop(held.job_id, None)
        self.queues.take_ended()
        left = len(self.jobs)
        names = sorted({job.queue for job in self.jobs.values()})
        self.queues.pull("healthy", names[:4], 1, self.now)
        for _ in range(left):
            delivery = self.queues.match(self.now)
            if delivery is None:  # others with credit may be chosen first: they too are alive
                break
            self.queues.ack(delivery.backend, delivery.token, self.now)
            assert self.queues.take_ended()[0].outcome == "acked"
        assert not len(self.queues)
        self.queues.validate()


QueuesMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None, database=None)
TestQueuesMachine = QueuesMachine.TestCase
TestQueuesMachineAtLength = at_length(QueuesMachine)


@settings(max_examples=50, deadline=None, database=None)
@given(
    costs=st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(1, 20), min_size=5, max_size=20), min_size=2),
    failing=st.sets(st.integers(0, 60), max_size=5),
)
def test_producers_that_always_have_jobs_are_never_further_apart_than_a_job_of_each(costs, failing):
    queues = Queues(Limits(jobs=1000, nbytes=1000, pinned=0), incarnation=1, declared=("q",))
    number = count()
    for producer, jobs in costs.items():
        for cost in jobs:
            job = Job(str(next(number)), "q", poster=("f", b""), producer=producer, cost=cost, expires=1e9)
            queues.post(job, 0.0)
    queues.pull("b", ["q"], 1, 0.0)
    left = {producer: len(jobs) for producer, jobs in costs.items()}
    served = dict.fromkeys(costs, 0)
    history = [dict(served)]
    turn = 0
    while all(left.values()):
        delivery = queues.match(0.0)
        served[delivery.job.producer] += delivery.job.cost  # what comes back has taken its producer's turn
        if turn in failing:
            queues.give_back("b", delivery.token, 0.0, failed=None)
        else:
            queues.ack("b", delivery.token, 0.0)
            left[delivery.job.producer] -= 1
        history.append(dict(served))
        turn += 1
    for start in history:
        for end in history:
            for a in costs:
                for b in costs:
                    apart = (end[a] - start[a]) - (end[b] - start[b])
                    assert abs(apart) <= max(costs[a]) + max(costs[b])
