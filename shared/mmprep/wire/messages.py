"""Every message between mmprep's processes, by link.

Each is a tagged array. A comment behind a type names the frames that follow its header frame, where there are any.
Calls are numbered by the asking side, unique within one connection (an incarnation of the peer).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from mmprep import errors
from mmprep.items import Generation, Natural

Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
LeaseId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Epoch = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}\Z")]
ShortText = Annotated[str, msgspec.Meta(max_length=2048)]
Modality = Annotated[str, msgspec.Meta(max_length=16)]
JobId = Annotated[str, msgspec.Meta(min_length=1, max_length=160)]
#: Of :data:`mmprep_worker.scheduling.job.TOKEN_SIZE` bytes.
Token = Annotated[bytes, msgspec.Meta(min_length=12, max_length=12)]
Call = Natural
#: Items of one offer.
MAX_ITEMS = 256
#: Deliveries that one backend may have at a time: those that it holds are told in one message.
MAX_CREDITS = 128
#: Queues that one backend pulls from.
MAX_PULLED = 32
#: Ids of jobs in one message.
MAX_FINISHED = 256
#: Bytes of one frame of a job's content, and of all of them: what has more is no job.
JOB_PIECE = 48 * 1024
JOB_LIMIT = 4 << 20
#: Estimated pixels of an item from which it is slow work, which one lane never takes.
HEAVY_COST = 16_000_000
#: Entries of the ring in one message; about 32 KiB.
MAX_INSPECTED = 512
Need = Literal["tensors", "plan"]
Work = Literal["tensors", "plan", "injected"]
LeaseKind = Literal["copy", "view"]
Cache = Literal["mm", "media"]


class Wire(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """What all messages share: a tagged array, closed to unknown fields."""


class Fault(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An error of the tree as data."""

    kind: Annotated[str, msgspec.Meta(max_length=64)]
    message: ShortText
    param: ShortText | None = None
    retry_after_ms: Natural | None = None

    @classmethod
    def of(cls, error: errors.MmprepError) -> Fault:
        """Return ``error`` as data."""
        plain = errors.to_plain(error)
        return cls(plain["kind"], plain["message"][:2048], plain["param"], plain["retry_after_ms"])

    def error(self) -> errors.MmprepError:
        """Return the error that this describes."""
        return errors.from_plain(self.kind, self.message, self.param, self.retry_after_ms)


# --- handshake, on every link ---------------------------------------------------------------------------------------


class Hello(Wire, frozen=True):
    """The first message of a connection.

    ``instance`` is random, the same for all connections under one hold of the process lock: another one under the same
    id means that the former process is gone. ``connection`` counts its connections, so that a hello that was on its way
    when its connection broke is not taken for the newest. Leases that are granted to a backend are tagged for its
    ``instance`` and ``turn``: see :mod:`mmprep.lease_id`.
    """

    protocol: int
    version: ShortText
    role: Literal["frontend", "backend", "lane", "writer", "client", "control", "remote"]
    id: Name
    pid: Natural
    instance: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    connection: Natural = 0
    turn: Natural = 0


class Refused(Wire, frozen=True):
    """The handshake failed, or a message broke the protocol; nothing else follows on this connection."""

    fault: Fault


class Failed(Wire, frozen=True):
    """The call has failed; its one final answer."""

    call: Call
    fault: Fault


class Done(Wire, frozen=True):
    """The call has succeeded and has nothing to say; its one final answer."""

    call: Call


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


class Alias(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A caller's name for content, from :func:`mmprep_frontend.media.keys.alias`, and the digest of that content.

    ``injected`` is the key of what may have been injected under this name, of which the content takes the place.
    """

    id: Digest
    digest: Digest
    injected: Digest | None = None


class Offered(Wire, frozen=True):
    """One item of an offer whose medium the frontend has.

    ``cost`` is the estimated work in pixels, ``nbytes`` the size of the encoded medium. ``alias`` stands for the medium
    from now on.
    """

    key: Digest
    modality: Modality
    cost: Natural
    nbytes: Natural
    alias: Alias | None = None


class Recalled(Wire, frozen=True):
    """One item of an offer whose medium the frontend does not have: the content that ``alias`` stands for.

    Its key is that of ``variant`` with the content's digest; where the alias stands for none, it is ``injected``, the key
    of what was injected under the name. It is never what a flight is opened for.
    """

    alias: Digest
    variant: Digest
    modality: Modality
    injected: Digest | None = None

    @property
    def cost(self) -> int:
        """Nothing is computed for it."""
        return 0

    @property
    def nbytes(self) -> int:
        """There are none."""
        return 0


class Injected(Wire, frozen=True):
    """One item of an offer that was processed elsewhere; the frontend has it, laid out as :mod:`mmprep.injected` says.

    Its key is that of its name, not of its content: what is there may be another than the one that is offered, and its
    metadata tell. ``replace``: it is put in the place of what is there, whatever that is. ``alias`` stands for no content
    any more once it is there.
    """

    key: Digest
    modality: Modality
    cost: Natural
    nbytes: Natural
    alias: Digest
    replace: bool


#: One item of an offer.
Item: TypeAlias = Offered | Recalled | Injected


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


# --- queues -----------------------------------------------------------------------------------------------------------


class Once(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request that its client may send again: digests of the client's key for it, in the client's scope, and of its body."""

    key: Digest
    body: Digest


class Post(Wire, frozen=True):
    """A frontend posts a job. Answered by :class:`Posted`, :class:`Unlike` or Failed. Frames: its content, in pieces of
    :data:`JOB_PIECE`.

    The frontend keeps it until :class:`Finished`, and posts it to each writer that welcomes it meanwhile; ``again``: one
    has accepted it before. ``places`` are slots and generations of its tensors; the writer pins them. ``releases``: the offer
    whose pins end with it, as by :class:`Unpin`, unless it is refused.

    ``items``: the job was made of what the frontend remembers of these, without an offer. They count as offered with the
    job, which is taken where each is there: in its place, or, of a job without places, as a plan.
    """

    call: Call
    job: JobId
    queue: Name
    producer: Annotated[str, msgspec.Meta(max_length=256)]
    priority: int
    cost: Natural
    expires_ms: Natural
    places: Annotated[tuple[tuple[Natural, Generation], ...], msgspec.Meta(max_length=MAX_ITEMS)]
    once: Once | None = None
    again: bool = False
    releases: Call | None = None
    items: Annotated[tuple[Offered, ...], msgspec.Meta(max_length=MAX_ITEMS)] = ()


class Posted(Wire, frozen=True):
    """The job is in its queue. ``job``: its id, another one where an equal request was posted before under that id."""

    call: Call
    job: JobId


class Unlike(Wire, frozen=True):
    """The job is not taken: what it was made of is not there, or not where it was. Its items are to be offered."""

    call: Call


class Finished(Wire, frozen=True):
    """These jobs of the frontend have ended, however: it need not keep them any more."""

    jobs: Annotated[tuple[JobId, ...], msgspec.Meta(max_length=MAX_FINISHED)]


class Pull(Wire, frozen=True):
    """A backend takes jobs of these queues from now on, and of no others, so many at a time. Answered by Done or Failed."""

    call: Call
    queues: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_PULLED)]
    credits: Annotated[int, msgspec.Meta(ge=0, le=MAX_CREDITS)]


class HeldJob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A delivery that a backend has."""

    token: Token
    queue: Name
    job: JobId
    attempt: Natural


class Holding(Wire, frozen=True):
    """What this backend has, told to each writer that welcomes it, before anything else. Answered by :class:`Kept`."""

    call: Call
    jobs: Annotated[tuple[HeldJob, ...], msgspec.Meta(max_length=MAX_CREDITS)]


class Kept(Wire, frozen=True):
    """The deliveries that are over, of those that the backend has."""

    call: Call
    lost: tuple[Token, ...]


class Delivery(Wire, frozen=True):
    """A job for this backend. Frames: its content. ``leases`` are views, one for each of the places it was posted with.

    ``left_ms``: until it is delivered again if it is not acknowledged. ``fault``: what has become of it instead, and then
    it has no leases. ``done``: the call of this backend that is answered by the way, as by :class:`Done`; 0: none.
    """

    token: Token
    queue: Name
    job: JobId
    attempt: Natural
    left_ms: Natural
    lease_ms: Natural
    leases: Annotated[tuple[LeaseId, ...], msgspec.Meta(max_length=MAX_ITEMS)]
    fault: Fault | None = None
    done: Call = 0


class Ack(Wire, frozen=True):
    """The job is done. Answered by :class:`Done`, by the next :class:`Delivery`, or by Failed where the delivery is over."""

    call: Call
    token: Token


class GiveBack(Wire, frozen=True):
    """The job is not done: ``failed`` says why it failed, ``None`` that it was not begun. Answered as :class:`Ack`."""

    call: Call
    token: Token
    failed: ShortText | None


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


# --- lane and writer --------------------------------------------------------------------------------------------------


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


# --- client and frontend ----------------------------------------------------------------------------------------------


class FrontendWelcome(Wire, frozen=True):
    """The frontend's answer to a client's :class:`Hello`. ``max_frame``: bytes of the largest frame that it takes."""

    protocol: int
    version: ShortText
    max_frame: Natural


class Request(Wire, frozen=True):
    """One call. Frames: the request as JSON, then attachments, which its URLs name as ``attachment:0`` and so on; of an
    injection, its body as over HTTP.

    ``traceparent`` and ``tracestate`` are the W3C's headers, of the caller's trace. ``once``: the caller's key for a chat that
    goes to a queue, under which it may be sent again.
    """

    call: Call
    operation: Literal["chat", "completions", "tokenize", "detokenize", "inject", "reset_mm_cache", "reset_media_cache"]
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
    """A process says whether it is ready, and if not, why; ``fatal`` says that it never will be."""

    ready: bool
    reason: ShortText
    fatal: bool = False


class SupervisorWelcome(Wire, frozen=True):
    """The supervisor's answer to :class:`Hello`."""

    protocol: int


ToSupervisor: TypeAlias = Hello | Report | Ask | StateChange | Forget | Done
FromSupervisor: TypeAlias = SupervisorWelcome | Refused | Collect | Told | Failed | Forget | Done
