"""What messages are made of: the fields that several links share, the first and last words of every link, items of offers."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from mmprep import errors
from mmprep.items import Natural

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


# --- items of offers ---------------------------------------------------------------------------------------------------


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


class Remembered(Wire, frozen=True):
    """One item of a job that was made without an offer, whose medium the frontend does not have: what ``alias`` stood for when
    it last heard of it. In ``variant`` that is the item of ``key``.
    """

    alias: Digest
    variant: Digest
    modality: Modality
    key: Digest


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
