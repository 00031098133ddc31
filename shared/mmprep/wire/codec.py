"""MessagePack in, checked structs out.

Everything received is untrusted until it has passed :func:`unpack`, which decodes by the schema: what is not of it is
refused where it begins, before room is made for it. A message is one frame of at most :data:`CONTROL_LIMIT` bytes, with at
most :data:`MAX_FRAMES` further frames behind it (opaque blobs, tensors, media); which further frames a message has is part
of its type.

Wire structs are arrays, and have no maps, extension types or floating-point fields: no key comes twice, times travel as
remaining milliseconds, and NaN has no place to hide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from mmprep.errors import ProtocolError
from mmprep.schemas import decoder

#: The version of everything on the wire. Peers of different versions refuse each other in the handshake.
PROTOCOL = 6

#: The largest frame of a control socket, and the largest header frame of a bulk socket, in bytes.
CONTROL_LIMIT = 64 * 1024

#: Frames behind the header frame of one message.
MAX_FRAMES = 512

_encode = msgspec.msgpack.Encoder().encode


def pack(message: msgspec.Struct) -> bytes:
    """Return ``message`` as one MessagePack frame.

    Raises
    ------
    ProtocolError
        The frame would be above :data:`CONTROL_LIMIT`: ZeroMQ would drop it without a word.
    """
    frame = _encode(message)
    if len(frame) > CONTROL_LIMIT:
        raise ProtocolError(f"a {type(message).__name__} of {len(frame)} bytes is above the limit of {CONTROL_LIMIT}")
    return frame


def unpack(frame: bytes | memoryview, kind: Any, *, limit: int = CONTROL_LIMIT) -> Any:
    """Return the message in ``frame``, checked against ``kind``.

    Parameters
    ----------
    frame:
        One MessagePack value.
    kind:
        A struct type or a union of tagged struct types.
    limit:
        The most bytes that are looked at.

    Raises
    ------
    ProtocolError
        Too large, no MessagePack, or not of the schema. The message says where.
    """
    return _read(frame, decoder(kind), limit)


def unpacker(kind: Any) -> Callable[[bytes | memoryview], Any]:
    """Return :func:`unpack` for one kind: for a loop that takes many, it saves the search for the kind's decoder."""
    known = decoder(kind)
    return lambda frame: _read(frame, known, CONTROL_LIMIT)


def _read(frame: bytes | memoryview, known: msgspec.msgpack.Decoder[Any], limit: int) -> Any:
    if len(frame) > limit:
        raise ProtocolError(f"a frame of {len(frame)} bytes is above the limit of {limit}")
    try:
        return known.decode(frame)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"a message does not fit its schema: {error}") from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame is not valid MessagePack: {error}") from None
