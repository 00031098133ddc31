"""What stands before a value in MessagePack, so that large ones need not be copied behind it: the form is sent in pieces.

The source is MessagePack's specification; each head is the shortest that it has.
"""

from __future__ import annotations

import struct
from typing import Final, TypeAlias

#: A part of what is sent: pieces behind one another are one text.
Piece: TypeAlias = bytes | memoryview

#: Ext heads without a length, for so many bytes.
_FIXED_EXT: Final = {1: b"\xd4", 2: b"\xd5", 4: b"\xd6", 8: b"\xd7", 16: b"\xd8"}


def map_head(pairs: int) -> bytes:
    """Return what stands before a map of so many pairs."""
    return bytes((0x80 | pairs,)) if pairs < 16 else _sized(pairs, (None, b"\xde", b"\xdf"))


def array_head(elements: int) -> bytes:
    """Return what stands before an array of so many elements."""
    return bytes((0x90 | elements,)) if elements < 16 else _sized(elements, (None, b"\xdc", b"\xdd"))


def bin_head(nbytes: int) -> bytes:
    """Return what stands before so many raw bytes."""
    return _sized(nbytes, (b"\xc4", b"\xc5", b"\xc6"))


def ext_head(code: int, nbytes: int) -> bytes:
    """Return what stands before so many bytes of the extension type ``code``, 0 to 127."""
    fixed = _FIXED_EXT.get(nbytes)
    return (_sized(nbytes, (b"\xc7", b"\xc8", b"\xc9")) if fixed is None else fixed) + bytes((code,))


def _sized(size: int, marks: tuple[bytes | None, bytes, bytes]) -> bytes:
    """Return the mark for a size of 1, 2 or 4 bytes, and the size; ``struct.error`` where there is none for it."""
    one, two, four = marks
    if one is not None and size < 2**8:
        return one + struct.pack(">B", size)
    return two + struct.pack(">H", size) if size < 2**16 else four + struct.pack(">I", size)
