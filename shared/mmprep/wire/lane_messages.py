"""Messages between a lane and the writer."""

from __future__ import annotations

from typing import Literal, TypeAlias

from mmprep.items import Generation, Natural
from mmprep.wire.parts import Digest, Epoch, Fault, ShortText, Wire, Work


class LaneReady(Wire, frozen=True):
    """The lane is warm. ``token`` proves that it is the child that the writer started."""

    lane: Natural
    token: Digest
    card: bytes


class LaneBroken(Wire, frozen=True):
    """The lane cannot start; the message is for the person who runs the service.

    ``lasting``: the next start would meet the same, as a file that is missing. Else its warm-up has failed.
    """

    lane: Natural
    token: Digest
    fault: Fault
    lasting: bool


class Task(Wire, frozen=True):
    """One medium to process. Frames: the medium, or, for ``injected``, an item that only has to be checked and copied."""

    task: Natural
    need: Work
    modality: str
    hasher: Literal["blake3", "sha256"]
    digest: Digest
    options: bytes


class AskExtent(Wire, frozen=True):
    """The lane knows the item's size. Frames: the packed metadata."""

    task: Natural
    tensor_length: Natural


class Granted(Wire, frozen=True):
    """The lane may write ``[offset, offset + length)`` of the segment until it answers the task."""

    task: Natural
    offset: Natural
    length: Natural


class GrantedSpill(Wire, frozen=True):
    """The lane is to make the segment ``name`` with one slot and to fill it.

    It writes the header (``epoch``, ``incarnation``), the item, and last the READY record (``key``, ``generation``), then
    answers the task; where there is no memory for the segment, :class:`NoSpill`. ``length`` bytes are used of its arena.
    """

    task: Natural
    name: ShortText
    epoch: Epoch
    incarnation: Natural
    key: Digest
    generation: Generation
    length: Natural


class GrantedInline(Wire, frozen=True):
    """The lane is to send the item's tensors, as :class:`Inlined`."""

    task: Natural


class NoSpill(Wire, frozen=True):
    """The segment could not be made; nothing of it is left. Answered like :class:`AskExtent`."""

    task: Natural


class Denied(Wire, frozen=True):
    """No extent for this task; the task is over."""

    task: Natural


class Filled(Wire, frozen=True):
    """The extent holds the item. Stage times in microseconds."""

    task: Natural
    decode_us: Natural
    process_us: Natural


class Inlined(Wire, frozen=True):
    """The item, computed outside of any segment; on the socket for tensors. Frames: its tensor region."""

    task: Natural
    decode_us: Natural
    process_us: Natural


class Planned(Wire, frozen=True):
    """The plan that was asked for. Frames: the packed metadata."""

    task: Natural


class TaskFailed(Wire, frozen=True):
    """The medium could not be processed; the lane writes no more for this task."""

    task: Natural
    fault: Fault


FromLane: TypeAlias = LaneReady | LaneBroken | AskExtent | NoSpill | Filled | Planned | TaskFailed
ToLane: TypeAlias = Granted | GrantedSpill | GrantedInline | Denied
