"""Every message between mmprep's processes, by link.

Each is a tagged array. A comment behind a type names the frames that follow its header frame, where there are any.
Calls are numbered by the asking side, unique within one connection (an incarnation of the peer). Those about jobs and those
of lanes have modules of their own, and are here by name like all others.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from mmprep.items import Generation, Natural
from mmprep.wire.job_messages import (
    Ack as Ack,
    Acks as Acks,
    Delivery as Delivery,
    Finished as Finished,
    GiveBack as GiveBack,
    HeldJob as HeldJob,
    Holding as Holding,
    Kept as Kept,
    Once as Once,
    Post as Post,
    Posted as Posted,
    Pull as Pull,
    Unlike as Unlike,
)
from mmprep.wire.lane_messages import (
    AskExtent as AskExtent,
    Denied as Denied,
    Filled as Filled,
    FromLane as FromLane,
    Granted as Granted,
    GrantedInline as GrantedInline,
    GrantedSpill as GrantedSpill,
    Inlined as Inlined,
    LaneBroken as LaneBroken,
    LaneReady as LaneReady,
    NoSpill as NoSpill,
    Planned as Planned,
    Task as Task,
    TaskFailed as TaskFailed,
    ToLane as ToLane,
)
from mmprep.wire.parts import (
    HEAVY_COST as HEAVY_COST,
    JOB_LIMIT as JOB_LIMIT,
    JOB_PIECE as JOB_PIECE,
    MAX_CREDITS as MAX_CREDITS,
    MAX_FINISHED as MAX_FINISHED,
    MAX_INSPECTED as MAX_INSPECTED,
    MAX_ITEMS as MAX_ITEMS,
    MAX_PULLED as MAX_PULLED,
    Alias as Alias,
    Cache as Cache,
    Call as Call,
    Digest as Digest,
    Done as Done,
    Epoch as Epoch,
    Failed as Failed,
    Fault as Fault,
    Hello as Hello,
    Injected as Injected,
    Item as Item,
    JobId as JobId,
    LeaseId as LeaseId,
    LeaseKind as LeaseKind,
    Modality as Modality,
    Name as Name,
    Need as Need,
    Offered as Offered,
    Recalled as Recalled,
    Refused as Refused,
    Remembered as Remembered,
    ShortText as ShortText,
    Token as Token,
    Wire as Wire,
    Work as Work,
)

# --- frontend and backend to writer (control) -------------------------------------------------------------------------


class SegmentInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where the ring lies."""

    name: ShortText
    epoch: Epoch
    size: Natural


class WriterWelcome(Wire, frozen=True):
    """The writer's answer to :class:`Hello`. ``card`` is empty until the lanes are warm, then comes as :class:`Card`.

    A reader that knows the segment's epoch already goes on with what it holds there, which it tells by
    :class:`Reassert`. Another epoch is another segment: the one before stays as it is, for whoever has it mapped.
    """

    protocol: int
    incarnation: Natural
    segment: SegmentInfo
    lease_ms: Natural
    card: bytes


class Card(Wire, frozen=True):
    """The lanes are warm; ``card`` is a packed :class:`mmprep.card.ModelCard`."""

    card: bytes


class NotWarm(Wire, frozen=True):
    """A lane's warm-up has failed and is tried again; ``why`` is what ``/ready`` says until :class:`Card` comes."""

    why: ShortText


class LeaseTo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The answer's addresses are to be leased to a registered backend."""

    backend: Name
    kind: LeaseKind


class Offer(Wire, frozen=True):
    """The keys of a whole request. Answered by one :class:`Answer` or Failed, before which :class:`Wants` may come.

    Without ``lease`` the answered entries stay pinned for this call until :class:`Unpin`. ``traced``: the answers about what
    was computed are to say when.
    """

    call: Call
    need: Need
    deadline_ms: Natural
    priority: int
    items: Annotated[tuple[Item, ...], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)]
    lease: LeaseTo | None = None
    traced: bool = False


class Want(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Item ``index`` of the offer, which the frontend has, is missing; its bytes are to be put under ``flight``."""

    index: Natural
    flight: Natural


class Wants(Wire, frozen=True):
    """These items' media are to be sent, on the bulk socket."""

    call: Call
    wants: tuple[Want, ...]


class StageTimes(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """When an item was computed, in microseconds of the monotonic clock, which all processes of a machine share.

    It waited from ``queued_us`` on, was given to a lane at ``started_us``, and came from it at ``done_us``. In between the
    lane took ``decode_us`` and ``process_us``; both are 0 where it only planned.
    """

    queued_us: Natural
    started_us: Natural
    done_us: Natural
    decode_us: Natural
    process_us: Natural


class ItemAnswer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One item of an answer, a frame of its own.

    ``outcome``: *hit* (was there), *joined* (another call computes it), *computed* (this call's flight did), *failed*.
    ``length`` is 0 where only a plan was asked for, and where the tensors travel inline. ``meta`` is a packed
    :class:`mmprep.items.ItemMeta`. ``spill`` is the epoch of the item's own segment where it is not in the ring.
    ``inline`` names the tensors for :class:`Fetch` where they are in no segment. ``key`` is that of an item that was
    :class:`Recalled`. ``times`` is there where the offer was ``traced`` and something was computed.
    """

    outcome: Literal["hit", "joined", "computed", "failed"]
    slot: Natural = 0
    offset: Natural = 0
    length: Natural = 0
    generation: Generation = 0
    lease: LeaseId | None = None
    meta: bytes = b""
    fault: Fault | None = None
    spill: Epoch | None = None
    inline: Natural = 0
    key: Digest | None = None
    times: StageTimes | None = None


class Answer(Wire, frozen=True):
    """The one final answer to an offer. Frames: one :class:`ItemAnswer` an item.

    ``leased_to`` names the backend that now has leases on them; else they are pinned, if they are tensors. Tensors that
    travel inline are kept for this call until :class:`Unpin` in both cases.
    """

    call: Call
    lease_ms: Natural
    leased_to: Name | None = None


class Cancel(Wire, frozen=True):
    """The asker no longer waits for the call; there will be no answer."""

    call: Call


class Unpin(Wire, frozen=True):
    """The asker has read what the call's answer pinned, and has what it kept for it."""

    call: Call


class Held(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A lease that was granted by an earlier writer."""

    lease: LeaseId
    slot: Natural
    generation: Generation
    kind: LeaseKind


class Reassert(Wire, frozen=True):
    """What this backend holds, told to a new writer before anything else; ``last``: that was all.

    Every reader tells the writer that welcomes it, if only that it holds nothing. Answered by :class:`Renewed`.
    """

    call: Call
    leases: Annotated[tuple[Held, ...], msgspec.Meta(max_length=1024)]
    last: bool


class Repin(Wire, frozen=True):
    """What the answer to an earlier writer's call had pinned, as slots and generations; :class:`Unpin` ends it."""

    call: Call
    places: Annotated[tuple[tuple[Natural, Generation], ...], msgspec.Meta(max_length=256)]


class Renew(Wire, frozen=True):
    """Prolong leases of this backend, from now. Answered by :class:`Renewed`."""

    call: Call
    leases: Annotated[tuple[LeaseId, ...], msgspec.Meta(max_length=1024)]
    owner: Name | None = None


class Renewed(Wire, frozen=True):
    """The leases that are over, of those that were to be renewed."""

    call: Call
    lost: tuple[LeaseId, ...]
    lease_ms: Natural


class Release(Wire, frozen=True):
    """End leases of this backend; unknown ones are passed over. Answered by :class:`Done` where ``call`` is above 0.

    Where a frontend says so of a backend, the backend is asked by :class:`StillHeld`: it may have taken them up.
    """

    call: Call
    leases: Annotated[tuple[LeaseId, ...], msgspec.Meta(max_length=1024)]
    owner: Name | None = None


class StillHeld(Wire, frozen=True):
    """The writer asks this backend about leases that may be nobody's: views beyond their time, and what a frontend gives back.

    What it holds it goes on to renew. What it does not hold it releases, and never takes up: the answer that granted it was
    lost, or comes too late.
    """

    leases: Annotated[tuple[LeaseId, ...], msgspec.Meta(max_length=1024)]


class Retag(Wire, frozen=True):
    """Leases that are granted to this backend from now on are to be tagged for a later ``turn``. Answered by :class:`Done`."""

    call: Call
    turn: Natural


class Acquire(Wire, frozen=True):
    """Lease the content of an address, by its slot and generation. Answered by :class:`Acquired` or Failed."""

    call: Call
    slot: Natural
    generation: Generation
    kind: LeaseKind


class Acquired(Wire, frozen=True):
    """A new lease."""

    call: Call
    lease: LeaseId
    lease_ms: Natural


class Upgrade(Wire, frozen=True):
    """Make a lease of this backend a view or a copy. Answered by :class:`Done` or Failed."""

    call: Call
    lease: LeaseId
    kind: LeaseKind


class Clear(Wire, frozen=True):
    """Drop every entry; what somebody holds goes when it is let go. Answered by :class:`Cleared`."""

    call: Call


class Cleared(Wire, frozen=True):
    """So many entries are found no more; ``nbytes`` became free at once, those that are held do later."""

    call: Call
    entries: Natural
    nbytes: Natural


class Inspect(Wire, frozen=True):
    """What is in the slots from ``start`` on? Answered by :class:`Inspected`."""

    call: Call
    start: Natural


class Inspected(Wire, frozen=True):
    """Some entries, by slot; spills come last, in slots above those of the ring. ``start``: of the next question, 0: none."""

    call: Call
    entries: Annotated[tuple[InspectedEntry, ...], msgspec.Meta(max_length=MAX_INSPECTED)]
    start: Natural


class InspectedEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One entry; ``nbytes`` are those that it occupies, with what aligns it, or those of a spill's segment."""

    slot: Natural
    generation: Natural
    key: Digest
    nbytes: Natural
    state: Literal["filling", "ready", "removed"]
    pins: Natural
    leases: Natural
    spill: bool


ToWriter: TypeAlias = (
    Hello
    | Offer
    | Cancel
    | Unpin
    | Reassert
    | Repin
    | Renew
    | Release
    | Acquire
    | Upgrade
    | Retag
    | Clear
    | Inspect
    | Post
    | Pull
    | Holding
    | Ack
    | Acks
    | GiveBack
)
FromWriter: TypeAlias = (
    WriterWelcome
    | Refused
    | Card
    | NotWarm
    | Wants
    | Answer
    | Failed
    | Done
    | Renewed
    | Acquired
    | StillHeld
    | Cleared
    | Inspected
    | Posted
    | Unlike
    | Finished
    | Kept
    | Delivery
)


# --- frontend to writer (bulk) ----------------------------------------------------------------------------------------


class Put(Wire, frozen=True):
    """The bytes of a wanted medium. Frames: the medium. ``options`` is a packed ItemOptions, opaque to the writer."""

    frontend: Name
    flight: Natural
    hasher: Literal["blake3", "sha256"]
    digest: Digest
    options: Annotated[bytes, msgspec.Meta(max_length=4096)]


# --- frontend and writer (tensors) ------------------------------------------------------------------------------------


class Fetch(Wire, frozen=True):
    """The tensors that an answer names as ``inline`` are wanted. Answered by :class:`Tensors` or Failed."""

    call: Call
    inline: Natural


class Tensors(Wire, frozen=True):
    """An item's tensors. Frames: its tensor region."""

    call: Call


FromTensors: TypeAlias = Tensors | Failed


# --- client and frontend ----------------------------------------------------------------------------------------------


class FrontendWelcome(Wire, frozen=True):
    """The frontend's answer to a client's :class:`Hello`. ``max_frame``: bytes of the largest frame that it takes."""

    protocol: int
    version: ShortText
    max_frame: Natural


#: What a client asks of a frontend.
Operation: TypeAlias = Literal[
    "chat", "completions", "tokenize", "detokenize", "inject", "reset_mm_cache", "reset_media_cache"
]


class Request(Wire, frozen=True):
    """One call. Frames: the request as JSON, then attachments, which its URLs name as ``attachment:0`` and so on; of an
    injection, its body as over HTTP.

    ``traceparent`` and ``tracestate`` are the W3C's headers, of the caller's trace. ``once``: the caller's key for a chat that
    goes to a queue, under which it may be sent again.
    """

    call: Call
    operation: Operation
    traceparent: ShortText | None = None
    tracestate: ShortText | None = None
    once: Annotated[str, msgspec.Meta(min_length=1, max_length=255)] | None = None


class Response(Wire, frozen=True):
    """The one final answer to a request other than chat, and to a chat that goes to a queue. Frames: the answer as JSON."""

    call: Call


class Rendered(Wire, frozen=True):
    """The one final answer to a chat request. Frames: see :mod:`mmprep.result`."""

    call: Call


ToFrontend: TypeAlias = Hello | Request | Cancel
FromFrontend: TypeAlias = FrontendWelcome | Refused | Response | Rendered | Failed


# --- supervisor -------------------------------------------------------------------------------------------------------


class Collect(Wire, frozen=True):
    """The supervisor asks a process for its report."""

    call: Call


class Report(Wire, frozen=True):
    """A process's report. Frames: JSON of :class:`mmprep.metrics.ProcessReport`."""

    call: Call


class Ask(Wire, frozen=True):
    """A question to the supervisor: the service's status, or its metrics. Answered by :class:`Told`."""

    call: Call
    subject: Literal["status", "metrics"]


class Forget(Wire, frozen=True):
    """A process asks the supervisor to let every frontend forget what it keeps of a cache; the supervisor asks each.

    Answered by :class:`Done`, by the supervisor when all have, or Failed.
    """

    call: Call
    cache: Cache


class Told(Wire, frozen=True):
    """The supervisor's answer. Frames: JSON."""

    call: Call


class StateChange(Wire, frozen=True):
    """A process says whether it is ready, and if not, why; ``fatal`` says that it never will be.

    The supervisor says it of the whole service, once, when every process was ready for the first time.
    """

    ready: bool
    reason: ShortText
    fatal: bool = False


class SupervisorWelcome(Wire, frozen=True):
    """The supervisor's answer to :class:`Hello`."""

    protocol: int


ToSupervisor: TypeAlias = Hello | Report | Ask | StateChange | Forget | Done
FromSupervisor: TypeAlias = SupervisorWelcome | StateChange | Refused | Collect | Told | Failed | Forget | Done
