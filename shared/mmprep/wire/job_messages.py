"""Messages about queues of jobs: between frontends and the writer, and between the writer and backends."""

from __future__ import annotations

from typing import Annotated

import msgspec

from mmprep.items import Generation, Natural
from mmprep.wire.parts import (
    MAX_CREDITS,
    MAX_FINISHED,
    MAX_ITEMS,
    MAX_PULLED,
    Call,
    Digest,
    Fault,
    JobId,
    LeaseId,
    Name,
    Offered,
    Remembered,
    ShortText,
    Token,
    Wire,
)


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
    job, which is taken where each is there, in its place, or, of a job without places, as a plan, and where each alias stands
    for what it is remembered for. None is both sent and remembered.
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
    items: Annotated[tuple[Offered | Remembered, ...], msgspec.Meta(max_length=MAX_ITEMS)] = ()


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
    """The deliveries that are over, of those that the backend has named."""

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


class Acks(Wire, frozen=True):
    """These jobs are done. Answered as :class:`Ack`, and by :class:`Kept` where some of the deliveries are over."""

    call: Call
    tokens: Annotated[tuple[Token, ...], msgspec.Meta(max_length=MAX_CREDITS)]


class GiveBack(Wire, frozen=True):
    """The job is not done: ``failed`` says why it failed, ``None`` that it was not begun. Answered as :class:`Ack`."""

    call: Call
    token: Token
    failed: ShortText | None
