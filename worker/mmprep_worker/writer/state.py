"""What the writer's state machine consists of: actions, peers, calls, and what flights end with."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import msgspec

from mmprep.errors import MmprepError
from mmprep.lease_id import mark_of
from mmprep.wire import messages
from mmprep.wire.messages import ItemAnswer
from mmprep_worker.ring.directory import Entry
from mmprep_worker.scheduling.flight import Call
from mmprep_worker.writer.transfers import Transfer


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
    """The lane is beyond its time, or broke the protocol: kill it; ``lane_exited`` follows."""

    lane: int


class RemoveSegment(NamedTuple):
    """Unlink a spill's segment, if there is one of this name."""

    name: str


class ReadersSilent(NamedTuple):
    """These readers, as roles and ids, live and have not said what they hold of an earlier writer's segment."""

    readers: tuple[tuple[str, str], ...]


Action: TypeAlias = Send | ToLane | KillLane | RemoveSegment | ReadersSilent

#: What a flight ends with: a published entry, tensors that travel inline, a packed plan, or an error.
Result: TypeAlias = Entry | Transfer | bytes | MmprepError


class Ended(NamedTuple):
    """A flight has ended; these calls waited for it. ``times``: when what it ended with was computed."""

    flight_id: int
    calls: tuple[Call, ...]
    result: Result
    times: messages.StageTimes | None = None


class Peer:
    """A frontend, backend or control process.

    Attributes
    ----------
    name: its connection's identity as text, one to one.
    instance: the same for all connections of one process under its id.
    connection: which one of its process it is; a later one has a higher number.
    turn, mark: of the leases that are granted to it: what they are tagged for, and with.
    connected: false once its connection is gone. Only backends are remembered then, for their leases.
    calls: its offers that have no answer yet, or whose entries are still pinned or transfers still held.
    """

    __slots__ = (
        "calls",
        "connected",
        "connection",
        "id",
        "identity",
        "instance",
        "mark",
        "name",
        "pid",
        "role",
        "turn",
    )

    def __init__(self, identity: bytes, hello: messages.Hello) -> None:
        self.identity = identity
        self.name = identity.decode("latin-1")
        self.role = hello.role
        self.id = hello.id
        self.pid = hello.pid
        self.instance = hello.instance
        self.connection = hello.connection
        self.turn = hello.turn
        self.mark = mark_of(hello.instance, hello.turn)
        self.connected = True
        self.calls: dict[int, PendingCall] = {}

    def retag(self, turn: int) -> None:
        """Tag leases for a later turn from now on; an earlier one changes nothing."""
        self.turn = max(self.turn, turn)
        self.mark = mark_of(self.instance, self.turn)


class PendingCall:
    """An offer that has no answer yet, or one whose entries are still pinned or transfers still held.

    Attributes
    ----------
    call: how flights know it.
    holder: how the ring knows it.
    keys: of its items; empty for one that is recalled and not known.
    recalled: the positions whose media its frontend does not have.
    injected: its items that were processed elsewhere.
    by_flight: the positions that wait for each flight, those whose medium its frontend has first.
    traced: whether its answers are to say when what they are about was computed.
    missing: how many positions wait.
    pinned: bytes of the ring by generation, of the entries that it pins; 0 for spills.
    transfers: numbers of the transfers that it holds.
    """

    __slots__ = (
        "answered",
        "answers",
        "by_flight",
        "call",
        "holder",
        "injected",
        "keys",
        "lease",
        "missing",
        "need",
        "number",
        "offered",
        "opened",
        "peer",
        "pinned",
        "recalled",
        "traced",
        "transfers",
    )

    def __init__(self, peer: Peer, offer: messages.Offer) -> None:
        self.peer = peer
        self.number = offer.call
        self.need = offer.need
        self.lease = offer.lease
        self.traced = offer.traced
        self.offered = offer.items
        self.keys = [b"" if isinstance(item, messages.Recalled) else item.key for item in offer.items]
        self.recalled = {n for n, item in enumerate(offer.items) if isinstance(item, messages.Recalled)}
        self.injected = [item for item in offer.items if isinstance(item, messages.Injected)]
        self.call: Call = (peer.name, offer.call)
        self.holder = f"{peer.name}#{offer.call}"
        self.answers: list[ItemAnswer | None] = [None] * len(offer.items)
        self.by_flight: dict[int, list[int]] = {}
        self.opened: set[int] = set()
        self.missing = 0
        self.pinned: dict[int, int] = {}
        self.transfers: set[int] = set()
        self.answered = False

    @property
    def failed(self) -> bool:
        """Whether one of its items has failed."""
        return any(answer is not None and answer.outcome == "failed" for answer in self.answers)

    def told(self) -> list[ItemAnswer]:
        """Return the answers, those about recalled items with the keys that the frontend does not know."""
        answers = [answer for answer in self.answers if answer is not None]
        for position in self.recalled:
            answers[position] = msgspec.structs.replace(answers[position], key=self.keys[position] or None)
        return answers

    def validate(self) -> None:
        """Check what can be seen from here.

        Raises
        ------
        AssertionError
            An invariant does not hold; the message says which.
        """
        waiting = sorted(position for positions in self.by_flight.values() for position in positions)
        open_positions = [position for position, answer in enumerate(self.answers) if answer is None]
        assert waiting == open_positions, f"call {self.call} does not wait for what it has no answer for"
        assert self.missing == len(waiting), f"call {self.call} has miscounted what it waits for"
        assert self.answered == (not waiting), f"call {self.call} is answered and waits, or neither"
        if self.answered:
            assert self.lease is None or not self.pinned, f"call {self.call} is answered with leases and keeps pins"
            kept = self.need == "tensors" and not self.failed and (self.pinned or self.transfers)
            assert kept, f"call {self.call} is answered, keeps nothing, and is still there"


def failed(error: MmprepError) -> ItemAnswer:
    """Return the answer for an item that could not be had."""
    return ItemAnswer("failed", fault=messages.Fault.of(error))
