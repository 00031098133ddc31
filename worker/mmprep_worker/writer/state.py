"""What the writer's state machine consists of: actions, peers, calls and lanes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import msgspec

from mmprep.errors import MmprepError
from mmprep.wire import messages
from mmprep.wire.messages import ItemAnswer
from mmprep_worker.ring.ring import Grant


class Send(NamedTuple):
    """Send to a connected peer."""

    peer: bytes
    message: msgspec.Struct
    frames: tuple[bytes, ...] = ()


class ToLane(NamedTuple):
    """Send to a lane; ``medium`` is the reference that came with the upload."""

    lane: int
    message: msgspec.Struct
    medium: Any = None


class KillLane(NamedTuple):
    """The lane is beyond its time: kill it; ``lane_exited`` follows."""

    lane: int


Action: TypeAlias = Send | ToLane | KillLane


class Peer:
    """A connected frontend, backend or control process."""

    __slots__ = ("calls", "id", "identity", "pid", "role")

    def __init__(self, identity: bytes, role: str, peer_id: str, pid: int) -> None:
        self.identity = identity
        self.role = role
        self.id = peer_id
        self.pid = pid
        self.calls: dict[int, PendingCall] = {}


class PendingCall:
    """An offer that has no answer yet, or one whose entries are still pinned."""

    __slots__ = (
        "answered",
        "answers",
        "by_flight",
        "holder",
        "lease",
        "missing",
        "need",
        "number",
        "offered",
        "opened",
        "peer",
    )

    def __init__(self, peer: Peer, offer: messages.Offer) -> None:
        self.peer = peer
        self.number = offer.call
        self.need = offer.need
        self.lease = offer.lease
        self.offered = offer.items
        self.holder = f"{peer.identity.decode('ascii', 'replace')}#{offer.call}"
        self.answers: list[ItemAnswer | None] = [None] * len(offer.items)
        self.by_flight: dict[int, list[int]] = {}
        self.opened: set[int] = set()
        self.missing = 0
        self.answered = False

    @property
    def call(self) -> tuple[str, int]:
        """How flights know this call."""
        return (self.peer.identity.decode("ascii", "replace"), self.number)


class LaneState:
    """One lane as the writer sees it."""

    __slots__ = ("deadline", "flight", "grant", "heavy_allowed", "pid", "ready")

    def __init__(self, *, heavy_allowed: bool) -> None:
        self.heavy_allowed = heavy_allowed
        self.ready = False
        self.pid = 0
        self.flight: int | None = None
        self.grant: Grant | None = None
        self.deadline = math.inf

    @property
    def name(self) -> str:
        """``starting``, ``idle`` or ``busy``."""
        if not self.ready:
            return "starting"
        return "idle" if self.flight is None else "busy"


#: Makes a waiting call's answer of a flight's outcome.
MakeAnswer: TypeAlias = Callable[[PendingCall], ItemAnswer]


def failing(error: MmprepError) -> MakeAnswer:
    """Return what gives every waiter the same error."""
    answer = ItemAnswer("failed", fault=messages.Fault.of(error))
    return lambda _: answer
