"""What a frontend keeps of the jobs that it posted, with writers that accept, refuse, vanish and forget."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.machines import at_length

from mmprep.errors import Busy, NotFound
from mmprep.wire import messages
from mmprep_frontend.posts import ItemsMovedError, Posts, Say

MAX_BYTES = 40
PICK = st.integers(0, 1000)


class PostsMachine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.posts = Posts(MAX_BYTES)
        self.now = 0.0
        self.up = False
        self.ids = count()
        #: Jobs that have not ended, with their size and expiry.
        self.jobs: dict[str, tuple[int, float]] = {}
        self.waiting: dict[int, str] = {}
        self.accepted: set[str] = set()
        #: What the present writer was told and has not answered: numbers and jobs.
        self.asked: dict[int, str] = {}
        self.outcomes: dict[int, object] = {}
        #: Jobs that bring their items.
        self.brings: set[str] = set()

    def carry_out(self, actions):
        for action in actions:
            if isinstance(action, Say):
                assert self.up, "something is sent to nobody"
                post = action.message
                assert post.again == (post.job in self.accepted)
                assert bool(post.items) == (post.job in self.brings and not post.again), "what was taken is looked for"
                assert post.call not in self.asked
                assert post.job not in self.asked.values(), "a job is posted twice to one writer"
                self.asked[post.call] = post.job
            else:
                assert action.token in self.waiting, "an outcome for nobody, or a second one"
                self.outcomes[action.token] = (self.waiting.pop(action.token), action.outcome)

    @rule(nbytes=st.integers(0, 15), lasts=st.sampled_from([0.2, 100.0]), brings=st.booleans())
    def post(self, nbytes, lasts, brings):
        job = f"job-{next(self.ids)}"
        items = (messages.Offered(bytes(32), "image", 1, 1),) if brings else ()
        asked = messages.Post(0, job, "q", "p", 0, 1, 0, (), items=items)
        if brings:
            self.brings.add(job)
        if sum(size for size, _ in self.jobs.values()) + nbytes > MAX_BYTES:
            with pytest.raises(Busy):
                self.posts.post(asked, [bytes(nbytes)], self.now + lasts, self.now)
            return
        self.jobs[job] = nbytes, self.now + lasts
        token, actions = self.posts.post(asked, [bytes(nbytes)], self.now + lasts, self.now)
        self.waiting[token] = job
        self.carry_out(actions)
        assert self.up == (job in self.asked.values())

    @precondition(lambda self: self.waiting)
    @rule(pick=PICK)
    def give_up(self, pick):
        token = [*self.waiting][pick % len(self.waiting)]
        del self.waiting[token]
        self.posts.give_up(token)

    @rule()
    def a_writer_comes(self):
        self.posts.down()
        self.up, self.asked = True, {}
        self.carry_out(self.posts.welcomed(self.now))
        assert sorted(self.asked.values()) == sorted(self.jobs), "a job was not posted again"

    @rule()
    def the_writer_goes(self):
        self.posts.down()
        self.up, self.asked = False, {}

    @precondition(lambda self: self.asked)
    @rule(pick=PICK, known=st.booleans())
    def accept(self, pick, known):
        number = [*self.asked][pick % len(self.asked)]
        job = self.asked.pop(number)
        known = known and job not in self.accepted
        if known:
            del self.jobs[job]
        else:
            self.accepted.add(job)
        tokens = [token for token, waits in self.waiting.items() if waits == job]
        self.carry_out(self.posts.posted(number, "earlier" if known else job))
        assert [self.outcomes[token][1] for token in tokens] == ["earlier" if known else job] * len(tokens)

    @precondition(lambda self: self.asked)
    @rule(pick=PICK, retryable=st.booleans())
    def refuse(self, pick, retryable):
        number = [*self.asked][pick % len(self.asked)]
        job = self.asked.pop(number)
        error = Busy("full") if retryable else NotFound("no queue")
        if not (job in self.accepted and retryable and self.now < self.jobs[job][1]):
            del self.jobs[job]
        tokens = [token for token, waits in self.waiting.items() if waits == job]
        self.carry_out(self.posts.failed(number, error, self.now))
        assert [self.outcomes[token][1] for token in tokens] == [error] * len(tokens)

    @precondition(lambda self: any(job in self.brings - self.accepted for job in self.asked.values()))
    @rule(pick=PICK)
    def say_that_the_items_are_elsewhere(self, pick):
        numbers = [number for number, job in self.asked.items() if job in self.brings - self.accepted]
        number = numbers[pick % len(numbers)]
        job = self.asked.pop(number)
        del self.jobs[job]
        tokens = [token for token, waits in self.waiting.items() if waits == job]
        self.carry_out(self.posts.unlike(number))
        for token in tokens:
            assert isinstance(self.outcomes[token][1], ItemsMovedError)

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK)
    def finish(self, pick):
        job = [*self.jobs][pick % len(self.jobs)]
        del self.jobs[job]
        self.asked = {number: asked for number, asked in self.asked.items() if asked != job}
        self.carry_out(self.posts.finished([job, "unknown"]))

    @rule(seconds=st.sampled_from([0.1, 0.6]))
    def wait(self, seconds):
        self.now += seconds
        self.carry_out(self.posts.tick(self.now))
        if self.up and seconds > 0.5:
            assert sorted(self.asked.values()) == sorted(set(self.jobs) - self.settled()), (
                "what was refused is forgotten"
            )

    def settled(self):
        """Jobs that the present writer has accepted."""
        return {job for job in self.accepted if job in self.jobs and job not in self.asked.values()}

    @rule()
    def answers_to_nobody_change_nothing(self):
        self.carry_out(self.posts.posted(10**9, "x"))
        self.carry_out(self.posts.unlike(10**9))
        self.carry_out(self.posts.failed(10**9, Busy("x"), self.now))

    @invariant()
    def holds(self):
        if hasattr(self, "posts"):
            self.posts.validate()
            assert len(self.posts) == len(self.jobs)
            assert self.posts.nbytes == sum(size for size, _ in self.jobs.values())


PostsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)
TestPostsMachine = PostsMachine.TestCase
TestPostsMachineAtLength = at_length(PostsMachine)
