"""Requests that their clients may send again: which job each has become. Pure; the writer has it, for all frontends.

A client names a request with a key of its own. The same key with the same body is the same request, and has the same job,
whether that has ended or not; with another body it is an error. Keys are scoped to their clients by whoever makes the
digests. They are remembered for a time, and the least recently made are forgotten first when there are too many.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from typing import NamedTuple

from mmprep.errors import Conflict

#: Keys that are remembered, and for how many seconds.
MOST_KEYS = 65_536
KEY_SECONDS = 86_400.0


class _Made(NamedTuple):
    body: bytes
    job_id: str
    until: float


class Requests:
    """The table.

    Parameters
    ----------
    most:
        Keys that are remembered.
    seconds:
        For how long.
    """

    def __init__(self, most: int = MOST_KEYS, seconds: float = KEY_SECONDS) -> None:
        self._most = most
        self._seconds = seconds
        #: By the time at which they are forgotten.
        self._made: OrderedDict[bytes, _Made] = OrderedDict()

    def __len__(self) -> int:
        return len(self._made)

    def find(self, key: bytes, body: bytes, now: float) -> str | None:
        """Return the job that the request has become, ``None`` where it is new.

        Raises
        ------
        Conflict
            The key was given to another body.
        """
        while self._made and next(iter(self._made.values())).until <= now:
            self._made.popitem(last=False)
        made = self._made.get(key)
        if made is None:
            return None
        if made.body != body:
            raise Conflict("this Idempotency-Key was sent with another body before; use a fresh key for each request")
        return made.job_id

    def note(self, key: bytes, body: bytes, job_id: str, now: float) -> None:
        """A new request has become this job."""
        self._made[key] = _Made(body, job_id, now + self._seconds)
        self._made.move_to_end(key)
        if len(self._made) > self._most:
            self._made.popitem(last=False)

    def forget(self, job_ids: Container[str]) -> None:
        """Forget the requests that have become these jobs: they are noted again with what comes back of them."""
        for key in [key for key, made in self._made.items() if made.job_id in job_ids]:
            del self._made[key]

    def validate(self) -> None:
        """Check every invariant; raises AssertionError."""
        assert len(self._made) <= self._most, "too many keys are remembered"
        untils = [made.until for made in self._made.values()]
        assert untils == sorted(untils), "keys are not in the order in which they are forgotten"
