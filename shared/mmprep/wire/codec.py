"""MessagePack in, checked structs out.

Everything received is untrusted until it has passed :func:`unpack`: MessagePack itself accepts duplicate keys, extension
types and timestamps, so the decoder refuses them, and the schema check refuses the rest. A message is one frame of at
most :data:`CONTROL_LIMIT` bytes, with at most :data:`MAX_FRAMES` further frames behind it (opaque blobs, tensors, media);
which further frames a message has is part of its type.

Wire structs hold no floating-point fields: times travel as remaining milliseconds, so NaN has no place to hide.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, get_args

import msgpack
import msgspec

from mmprep.errors import ProtocolError

#: The version of everything on the wire. Peers of different versions refuse each other in the handshake.
PROTOCOL = 4

#: The largest frame of a control socket, and the largest header frame of a bulk socket, in bytes.
CONTROL_LIMIT = 64 * 1024

#: Frames behind the header frame of one message.
MAX_FRAMES = 512

_MAX_COUNT = 16_384


def pack(message: msgspec.Struct) -> bytes:
    """Return ``message`` as one MessagePack frame.

    Raises
    ------
    ProtocolError
        The frame would be above :data:`CONTROL_LIMIT`: ZeroMQ would drop it without a word.
    """
    frame: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)))
    if len(frame) > CONTROL_LIMIT:
        raise ProtocolError(f"a {type(message).__name__} of {len(frame)} bytes is above the limit of {CONTROL_LIMIT}")
    return frame


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a map has the same key twice")
    return found


def _refuse_extension(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not part of the protocol")


@lru_cache(maxsize=64)
def _by_tag(kind: Any) -> dict[str, Any]:
    """Return the members of a union of tagged structs by their tags; converting to one struct is 5x as fast."""
    return {member.__struct_config__.tag: member for member in get_args(kind)}


def _member(kind: Any, plain: Any) -> Any:
    members = _by_tag(kind)
    if not members:
        return kind
    tag = plain[0] if isinstance(plain, list) and plain else None
    if not isinstance(tag, str) or tag not in members:
        raise ValueError("it is none of the messages that this link carries")
    return members[tag]


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
    if len(frame) > limit:
        raise ProtocolError(f"a frame of {len(frame)} bytes is above the limit of {limit}")
    try:
        # msgpack makes room for as many elements as a header claims, at every level; this makes sure that they are there.
        msgspec.msgpack.decode(frame, type=msgspec.Raw)
        plain = msgpack.unpackb(
            frame,
            use_list=True,
            strict_map_key=True,
            object_pairs_hook=_unique,
            ext_hook=_refuse_extension,
            max_array_len=_MAX_COUNT,
            max_map_len=_MAX_COUNT,
        )
        # Without the types named, text would be taken for bytes in base64.
        return msgspec.convert(plain, _member(kind, plain), builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise ProtocolError(f"a message does not fit its schema: {error}") from None
    except (msgspec.DecodeError, msgpack.UnpackException, ValueError, RecursionError, TypeError) as error:
        raise ProtocolError(f"a frame is not valid MessagePack: {error}") from None
