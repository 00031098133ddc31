"""Lease ids: which writer granted a lease, and, for the reader that it was granted to, that it is this very lease.

``[incarnation of the writer, 3 bytes][tag, 5 bytes][random, 8 bytes]``. The tag is a hash of all that was granted (content,
kind, the rest of the id), keyed with the *mark* of the process that holds the backend's lock. So a reader needs no word
with the writer to see whether a lease was granted to itself, for the content of the address that it came with, and as
the kind that it is said to be. To it these are alike: a lease of a process before it under the same backend id, one that
went with another address, one of another kind, and one that is damaged.

WARNING: a tag guards against accidents, of which one in 2**40 escapes it. It is no secret between processes of one user.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, Literal

_INCARNATION: Final = 3
_TAG: Final = 5
#: Random bytes of an id.
RANDOM_SIZE: Final = 8

#: Slot and generation.
_CONTENT = struct.Struct(">QQ")
_TURN = struct.Struct(">Q")


def mark_of(instance: bytes, turn: int) -> bytes:
    """Return the mark of a reader.

    Parameters
    ----------
    instance:
        Of its hold of the process lock, as in its hello.
    turn:
        A number that it raises when it is to take up no lease any more that was granted before.
    """
    return instance + _TURN.pack(turn)


def lease_id(
    incarnation: int, random: bytes, *, mark: bytes, slot: int, generation: int, kind: Literal["copy", "view"]
) -> bytes:
    """Return the id of a lease on the content of a slot, granted to the reader with this mark.

    Parameters
    ----------
    incarnation:
        Of the writer that grants it.
    random:
        :data:`RANDOM_SIZE` bytes.
    """
    origin = incarnation.to_bytes(_INCARNATION, "big")
    granted = b"".join((origin, random, _CONTENT.pack(slot, generation), kind.encode()))
    return origin + hashlib.blake2b(granted, digest_size=_TAG, key=mark).digest() + random


def lease_incarnation(lease: bytes) -> int:
    """Return the incarnation of the writer that granted a lease."""
    return int.from_bytes(lease[:_INCARNATION], "big")


def was_granted_to(mark: bytes, lease: bytes, *, slot: int, generation: int, kind: Literal["copy", "view"]) -> bool:
    """Whether a lease was granted to the reader with this mark, on this content and as this kind."""
    random = lease[_INCARNATION + _TAG :]
    return lease == lease_id(lease_incarnation(lease), random, mark=mark, slot=slot, generation=generation, kind=kind)
