"""One flight, those who wait for it, and what the writer is to do about it: the data of :mod:`.flights`."""

from __future__ import annotations

import math
from typing import Final, Literal, TypeAlias

import msgspec

from mmprep import errors

#: One request of a frontend: (peer, its number there).
Call: TypeAlias = tuple[str, int]
#: ``apart``: tensors that must not lie in the ring, because the call pins as much of it as a call may. ``injected``: tensors
#: that somebody has made elsewhere, to be put in the place of what is there under their key.
Need: TypeAlias = Literal["tensors", "plan", "apart", "injected"]
#: Whose tensors may lie in the ring.
IN_RING: Final = frozenset({"tensors", "injected"})


class Joined(msgspec.Struct, frozen=True):
    """A call waits. ``ask``: it opened the flight, and its peer is to send the bytes.

    ``priority`` is set where a queued flight became more urgent by this call: the queue is to be told.
    """

    flight_id: int
    ask: bool
    priority: int | None


class Ask(msgspec.Struct, frozen=True):
    """Ask this call's peer for the flight's bytes; what an earlier uploader sends is dropped."""

    flight_id: int
    call: Call


class Expire(msgspec.Struct, frozen=True):
    """The call's deadline is over: answer it so for this flight."""

    call: Call
    flight_id: int


class Fail(msgspec.Struct, frozen=True):
    """Answer these calls with the error. ``ended``: the flight is gone with its bytes; else more is to come for others."""

    flight_id: int
    calls: tuple[Call, ...]
    error: errors.MmprepError
    ended: bool


class Abandon(msgspec.Struct, frozen=True):
    """No one waits any more. ``lane`` is ``None``: the flight is gone, drop its bytes; else it runs on at that lane."""

    flight_id: int
    lane: int | None


class Retry(msgspec.Struct, frozen=True):
    """Put the flight into the queue again, with the bytes that the writer still has."""

    flight_id: int


class Reprioritise(msgspec.Struct, frozen=True):
    """A queued flight's priority is now this one."""

    flight_id: int
    priority: int


Action: TypeAlias = Ask | Expire | Fail | Abandon | Reprioritise


class Waiter(msgspec.Struct, eq=False):
    """A call that waits for a flight.

    ``asked``: its peer was, at some time, asked for the bytes. ``sends``: its peer has them.
    """

    call: Call
    need: Need
    priority: int
    deadline: float
    asked: bool = False
    sends: bool = True

    @property
    def may_be_asked(self) -> bool:
        """Whether its peer may yet be asked for the bytes."""
        return self.sends and not self.asked


def nobody_has_it() -> errors.NotFound:
    """Return the error for who knows only the uuid of content that is neither here nor on its way."""
    return errors.NotFound("No medium is known here by this 'uuid', or no longer; send its data again.")


class Flight(msgspec.Struct, eq=False):
    """One computation; only :class:`Flights` changes it.

    Attributes
    ----------
    id: never used again in the life of a writer, nor, by chance, in that of another.
    cost: estimated pixels.
    uploader: who was asked for the bytes, or sent them.
    upload_deadline: when another is asked, in seconds; only read while wanted.
    nbytes: of the medium, from its upload on.
    lane: which computes; only while running.
    priority: lower is more urgent.
    """

    id: int
    key: bytes
    need: Need
    modality: str
    cost: int
    uploader: Call
    upload_deadline: float
    priority: int
    waiters: dict[Call, Waiter]
    state: Literal["wanted", "queued", "running"] = "wanted"
    nbytes: int = 0
    lane: int | None = None

    @property
    def deadline(self) -> float:
        """The latest deadline of those who wait, in seconds; minus infinity if nobody does."""
        return max((waiter.deadline for waiter in self.waiters.values()), default=-math.inf)
