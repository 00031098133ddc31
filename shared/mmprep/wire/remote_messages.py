"""Every message between a backend on another host and the door that serves it.

What is said about queues and leases is said with the writer's own messages (:mod:`mmprep.wire.messages`): the door is a
backend on the writer's host, which passes them on under its own registration. A connection is a *session*: with it ends all
that the backend had.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from mmprep.items import Generation, Natural
from mmprep.wire import messages
from mmprep.wire.messages import Call, Epoch, Fault, LeaseId, LeaseKind, Name, ShortText, Wire

#: Bytes of the largest chunk that a door may send.
MAX_CHUNK = 4 << 20
#: The most chunks that may be under way to one backend.
MAX_CHUNK_CREDITS = 64

HostId = Annotated[bytes, msgspec.Meta(max_length=16)]
#: The runtime directory's id in bytes.
RuntimeId = Annotated[bytes, msgspec.Meta(min_length=4, max_length=4)]


class RemoteHello(Wire, frozen=True):
    """The first message of a connection.

    ``instance`` is random and secret, the same for all connections of one backend: with it a connection takes the place of
    the one before. ``queues`` and ``credits``: of jobs; none: it pulls none. ``host`` is :func:`mmprep.remote.endpoint.host_id`,
    or empty where the tensors are to travel even within one host.
    """

    protocol: int
    version: ShortText
    id: Name
    instance: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    queues: Annotated[tuple[Name, ...], msgspec.Meta(max_length=messages.MAX_PULLED)]
    credits: Annotated[int, msgspec.Meta(ge=0, le=messages.MAX_CREDITS)]
    host: HostId


class Neighbour(Wire, frozen=True):
    """Backend and service are on one host: the backend is to use shared memory, or to say hello again without ``host``."""

    runtime_dir: ShortText
    runtime_id: RuntimeId


class RemoteWelcome(Wire, frozen=True):
    """The answer to :class:`RemoteHello`: the backend is registered.

    A backend that says nothing for ``lease_ms`` is given up. Tensors travel in chunks of ``chunk`` bytes, the last of an item
    a shorter one, and at most ``credits`` of them may be under way.
    """

    protocol: int
    version: ShortText
    lease_ms: Natural
    chunk: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNK)]
    credits: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNK_CREDITS)]


class Alive(Wire, frozen=True):
    """The sender is there. Both say it again and again; nobody answers."""


class RemoteAddress(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where an item lies on the service's host: an :class:`mmprep.address.Address` without its fields."""

    segment: ShortText
    epoch: Epoch
    slot: Natural
    offset: Natural
    length: Natural
    generation: Generation
    metadata_length: Natural


class Open(Wire, frozen=True):
    """Take charge of the lease that came with an address; without one, or where it is none of this backend, lease it anew.

    Answered by :class:`Opened` or Failed.
    """

    call: Call
    address: RemoteAddress
    lease: LeaseId | None
    kind: LeaseKind


class Opened(Wire, frozen=True):
    """The door holds ``lease`` for the backend, and renews it for as long as the session lasts. Frames: the item's metadata."""

    call: Call
    lease: LeaseId


class Ask(Wire, frozen=True):
    """Send the chunks below ``upto`` of a leased item that were not asked for yet; ``received`` of them have come.

    A chunk is asked for once, and sent once, as :class:`Chunk`; where that cannot be, :class:`Ended` comes in its place.
    """

    lease: LeaseId
    upto: Natural
    received: Natural


class Chunk(Wire, frozen=True):
    """One chunk of an item's tensor region. Frames: its bytes."""

    lease: LeaseId
    number: Natural


class Ended(Wire, frozen=True):
    """No more chunks come of this item."""

    lease: LeaseId
    fault: Fault


class Bye(Wire, frozen=True):
    """The backend leaves. Answered by Done, when all that it had is given back."""

    call: Call


ToDoor: TypeAlias = (
    RemoteHello
    | Alive
    | Open
    | Ask
    | Bye
    | messages.Renew
    | messages.Release
    | messages.Pull
    | messages.Holding
    | messages.Ack
    | messages.Acks
    | messages.GiveBack
)
FromDoor: TypeAlias = (
    Neighbour
    | RemoteWelcome
    | Alive
    | Opened
    | Chunk
    | Ended
    | messages.Refused
    | messages.Failed
    | messages.Done
    | messages.Renewed
    | messages.Kept
    | messages.Delivery
)
