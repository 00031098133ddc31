"""The form of a job's content, from the frontend that posts it to the backend that pulls it; opaque to the writer.

It travels in pieces that control sockets take. Its items have no leases: those come with each delivery.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgpack
import msgspec

from mmprep.errors import TooLarge
from mmprep.result import HeadItem
from mmprep.wire.codec import unpack
from mmprep.wire.messages import JOB_LIMIT, JOB_PIECE, Epoch


class JobContent(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A rendered request in a queue.

    Attributes
    ----------
    request: JSON of its GenerateRequest, without token ids and media.
    token_ids: little-endian uint32.
    items: in the order of the prompt; those with tensors have a place.
    segment, epoch: of the ring that the places lie in.
    """

    request: bytes
    token_ids: bytes
    items: tuple[HeadItem, ...]
    segment: str
    epoch: Epoch

    def pieces(self) -> tuple[bytes, ...]:
        """Return the packed form as frames; raises TooLarge above :data:`~mmprep.wire.messages.JOB_LIMIT`."""
        packed: bytes = msgpack.packb(msgspec.to_builtins(self, builtin_types=(bytes,)))
        if len(packed) > JOB_LIMIT:
            raise TooLarge(f"the rendered request has {len(packed):,} bytes, and a queue takes jobs of {JOB_LIMIT:,}")
        return tuple(packed[start : start + JOB_PIECE] for start in range(0, len(packed), JOB_PIECE))


def read_content(pieces: Iterable[bytes]) -> JobContent:
    """Return the content that :meth:`JobContent.pieces` wrote; raises :class:`~mmprep.errors.ProtocolError`."""
    content: JobContent = unpack(b"".join(pieces), JobContent, limit=JOB_LIMIT)
    return content
