"""Jobs that this frontend has posted: a pure core of :mod:`mmprep_frontend.dispatch`.

Queues are in the writer's memory. So that they outlive it, a frontend keeps what it has posted until the writer says that
the job has ended, and posts it again to each writer that welcomes it, under the same id: the one that knows the id already
takes it for what it is, the next one in a line takes the job up. A job is lost only if the writer and its frontend die
together.

Whoever posts gets one outcome: the id of the job, or an error. What was accepted is kept whatever happens to him then.
A job that brings its items is looked at by the writer before it is accepted; then its places are as good as any other's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from mmprep.errors import Busy, MmprepError, ServiceUnavailable
from mmprep.wire import messages

#: Jobs that are kept.
MOST_JOBS = 65_536
#: Seconds until a job that the writer has no room for is posted again. One that it had accepted is never given up.
AGAIN_SECONDS = 0.5


class ItemsMovedError(ServiceUnavailable):
    """The items that a job brings are not where it says, so it was not posted."""


class Say(NamedTuple):
    """Send on the control link; ``token`` of who waits for the outcome, 0: nobody does."""

    message: messages.Post
    content: Sequence[bytes]
    token: int


class Settle(NamedTuple):
    """The outcome of a post, under its token: the job's id, or an error."""

    token: int
    outcome: str | MmprepError


Action: TypeAlias = Say | Settle


class _Kept:
    """One job; ``token`` of who waits for its outcome, 0: nobody does any more."""

    __slots__ = ("accepted", "again_at", "content", "expires", "nbytes", "number", "post", "token")

    def __init__(self, post: messages.Post, content: Sequence[bytes], expires: float, token: int) -> None:
        self.post = post
        self.content = content
        self.nbytes = sum(map(len, content))
        self.expires = expires
        self.token = token
        self.accepted = False
        self.again_at = math.inf
        self.number = 0


class Posts:
    """Posted jobs of one frontend. ``now`` is in seconds of the caller's clock.

    Parameters
    ----------
    max_bytes:
        Of the content of all jobs.
    first:
        Number of the first call.
    """

    def __init__(self, max_bytes: int, *, first: int = 1) -> None:
        self.nbytes = 0
        self._max_bytes = max_bytes
        self._numbers = first
        self._tokens = 0
        self._up = False
        self._jobs: dict[str, _Kept] = {}
        self._by_number: dict[int, _Kept] = {}
        #: Those that somebody waits for, by token.
        self._waited: dict[int, _Kept] = {}
        #: Those that were refused and are posted again, by id.
        self._refused: dict[str, _Kept] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def wake_at(self) -> float:
        """When :meth:`tick` has something to do."""
        return min((kept.again_at for kept in self._refused.values()), default=math.inf)

    # --- the caller's ---------------------------------------------------------------------------------------------

    def post(
        self, post: messages.Post, content: Sequence[bytes], expires: float, now: float
    ) -> tuple[int, list[Action]]:
        """Post a job whose id is new.

        Parameters
        ----------
        post:
            Its number and its remaining time are set here.
        expires:
            When it need not be delivered any more.

        Returns
        -------
        The token of the outcome, and what is to be done.

        Raises
        ------
        Busy
            Too much is kept.
        """
        nbytes = sum(map(len, content))
        if len(self._jobs) >= MOST_JOBS or self.nbytes + nbytes > self._max_bytes:
            raise Busy("too many queued jobs have not ended; post again later", param="queue", retry_after=1.0)
        self._tokens += 1
        kept = self._jobs[post.job] = _Kept(post, content, expires, self._tokens)
        self._waited[self._tokens] = kept
        self.nbytes += nbytes
        return self._tokens, self._say(kept, now) if self._up else []

    def give_up(self, token: int) -> None:
        """Nobody waits for an outcome any more. The job stays: the writer may have accepted it."""
        kept = self._waited.pop(token, None)
        if kept is not None:
            kept.token = 0

    # --- the writer's ---------------------------------------------------------------------------------------------

    def welcomed(self, now: float) -> list[Action]:
        """A writer has welcomed this frontend: post everything again, in the order in which it came."""
        self._up = True
        self._by_number.clear()
        return [action for kept in self._jobs.values() for action in self._say(kept, now)]

    def down(self) -> None:
        """The connection is gone; nothing is sent until the next welcome."""
        self._up = False
        self._refused.clear()

    def posted(self, number: int, job_id: str) -> list[Action]:
        """The writer has accepted a job, or names the one that an equal request has become."""
        kept = self._by_number.pop(number, None)
        if kept is None:
            return []
        kept.accepted = True
        if job_id != kept.post.job:
            self._forget(kept)
        return self._settle(kept, job_id)

    def failed(self, number: int, error: MmprepError, now: float) -> list[Action]:
        """The writer has refused a job. One that was accepted before is posted again soon, if that can help."""
        kept = self._by_number.pop(number, None)
        if kept is None:
            return []
        if kept.accepted and error.retryable and now < kept.expires:
            kept.again_at = now + AGAIN_SECONDS
            self._refused[kept.post.job] = kept
            return []
        self._forget(kept)
        return self._settle(kept, error)

    def unlike(self, number: int) -> list[Action]:
        """The items of a job are not where it says."""
        kept = self._by_number.pop(number, None)
        if kept is None:
            return []
        self._forget(kept)
        return self._settle(kept, ItemsMovedError("the job's items are not where they were"))

    def finished(self, job_ids: Sequence[str]) -> list[Action]:
        """These jobs have ended."""
        actions: list[Action] = []
        for job_id in job_ids:
            kept = self._jobs.get(job_id)
            if kept is not None:
                self._forget(kept)
                actions += self._settle(kept, job_id)
        return actions

    def refused(self, error: MmprepError) -> list[Action]:
        """The writer has ended the connection over what it was sent: what it has not accepted may be that."""
        waiting = [kept for kept in self._jobs.values() if not kept.accepted]
        for kept in waiting:
            self._forget(kept)
        return [action for kept in waiting for action in self._settle(kept, error)]

    def fail_all(self, error: MmprepError) -> list[Action]:
        """Give everybody who waits an error, and keep nothing."""
        waiting = list(self._jobs.values())
        for kept in waiting:
            self._forget(kept)
        return [action for kept in waiting for action in self._settle(kept, error)]

    def tick(self, now: float) -> list[Action]:
        """Time has passed: post again what was refused."""
        if not self._up:
            return []  # the next welcome posts everything
        due = [kept for kept in self._refused.values() if kept.again_at <= now]
        return [action for kept in due for action in self._say(kept, now)]

    # --- steps ----------------------------------------------------------------------------------------------------

    def _say(self, kept: _Kept, now: float) -> list[Action]:
        self._by_number.pop(kept.number, None)
        self._numbers += 1
        kept.number = self._numbers
        self._refused.pop(kept.post.job, None)
        self._by_number[kept.number] = kept
        left = max(0, int((kept.expires - now) * 1000))
        post = msgspec.structs.replace(kept.post, call=kept.number, expires_ms=left, again=kept.accepted)
        if kept.accepted:
            post = msgspec.structs.replace(post, items=())
        return [Say(post, kept.content, kept.token)]

    def _forget(self, kept: _Kept) -> None:
        del self._jobs[kept.post.job]
        self._by_number.pop(kept.number, None)
        self._refused.pop(kept.post.job, None)
        self.nbytes -= kept.nbytes

    def _settle(self, kept: _Kept, outcome: str | MmprepError) -> list[Action]:
        token, kept.token = kept.token, 0
        self._waited.pop(token, None)
        return [Settle(token, outcome)] if token else []

    def validate(self) -> None:
        """Check the invariants.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        assert self.nbytes == sum(kept.nbytes for kept in self._jobs.values()) <= self._max_bytes, "bytes are off"
        assert len(self._jobs) <= MOST_JOBS, "too many jobs are kept"
        for number, kept in self._by_number.items():
            assert kept.number == number, "a job is found by another number"
            assert self._jobs.get(kept.post.job) is kept, "an ended job waits for an answer"
        assert self._waited == {kept.token: kept for kept in self._jobs.values() if kept.token}, "waiters are off"
        assert all(self._jobs.get(job_id) is kept for job_id, kept in self._refused.items()), "an ended job is refused"
        for kept in self._jobs.values():
            asked = kept.number in self._by_number or not self._up
            assert kept.accepted or asked, "a job that was not accepted is not asked for"
            assert not (kept.accepted and kept.token), "a job was accepted and somebody waits"
