"""What the processes of a chaos run tell the one that started them: one line of JSON an event, on standard output.

Times are of ``time.monotonic``, which all processes of a machine share.
"""

from __future__ import annotations

import sys
import threading
from typing import TypeAlias

import msgspec


class Started(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The process is connected and at work."""

    at: float


class Called(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """One call has ended.

    Attributes
    ----------
    kind: door and payload, as ``http shm``.
    outcome: ``ok``; ``unanswered``; ``refused as it should be`` or ``given up on purpose``; ``broken off`` by an error of
        the load's own; else the type of the error that it ended with.
    start, end: of the call, all its tries included, to its answer.
    wrong: bytes that were not those of the call's pictures; a wrong number of tokens counts as one.
    lookups, hits: items of re-used pictures in an answer that says whether they were there before.
    tries: how often it was sent.
    cold: whether a lane had to work for it.
    """

    kind: str
    outcome: str
    start: float
    end: float
    wrong: int = 0
    lookups: int = 0
    hits: int = 0
    tries: int = 1
    cold: bool = False


class Failed(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """One try of a call, or one read, was answered with an error.

    Attributes
    ----------
    retryable: whether the error says that the same may succeed later.
    start, end: of the try.
    backend: to which the addresses were to be leased, where the error is about it.
    """

    what: str
    error: str
    message: str
    retryable: bool
    start: float
    end: float
    backend: str | None = None


class Held(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """One item was held and read, again and again.

    Attributes
    ----------
    way: how, as ``view`` or ``after release``.
    reads, wrong: how often it was read, and bytes that were wrong.
    """

    way: str
    reads: int
    wrong: int


class Ended(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The process has done what it was to do; ``calls`` of its own have no outcome."""

    calls: int


Event: TypeAlias = Started | Called | Failed | Held | Ended

_encode = msgspec.json.Encoder().encode
_guard = threading.Lock()


def tell(event: Event) -> None:
    """Send an event; from any thread."""
    with _guard:
        sys.stdout.buffer.write(_encode(event) + b"\n")
        sys.stdout.buffer.flush()
