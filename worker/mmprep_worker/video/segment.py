"""Whether a Matroska or WebM file is all there, by the size that it tells of itself.

FFmpeg takes one that breaks off for a shorter one. Its *segment* holds everything behind the first few bytes, and says in
front how long it is, unless it was written while nobody knew (RFC 8794 for the elements, RFC 9559 for the segment).
Whatever else is wrong with the elements is FFmpeg's to say.
"""

from __future__ import annotations

from typing import NamedTuple

from mmprep.errors import DecodeError

_SEGMENT = 0x18538067
#: Elements in front of the segment that are looked at: the header, and filling.
_MOST_ELEMENTS = 16
#: Bytes of the longest size.
_LONGEST = 8


class _Element(NamedTuple):
    #: With its marker, as the specifications write it.
    id: int
    #: Where its content begins.
    start: int
    #: Bytes of its content; ``None``: it does not tell.
    size: int | None


def check_whole(data: memoryview) -> None:
    """Refuse a file whose segment is longer than the file.

    Parameters
    ----------
    data:
        The file, bytes.

    Raises
    ------
    DecodeError
        Its end is missing.
    """
    at = 0
    for _ in range(_MOST_ELEMENTS):
        element = _element(data, at)
        if element is None or element.size is None:
            return
        at = element.start + element.size
        if element.id == _SEGMENT:
            if at > len(data):
                raise DecodeError(
                    f"the video is truncated: it announces {at:,} bytes, and {len(data):,} are there; send all of it"
                )
            return


def _element(data: memoryview, at: int) -> _Element | None:
    """Return the element that begins at ``at``; ``None`` where there is none."""
    id_bytes = _width(data, at)
    size_bytes = _width(data, at + id_bytes)
    start = at + id_bytes + size_bytes
    if not id_bytes or not size_bytes or start > len(data):
        return None
    size = int.from_bytes(data[at + id_bytes : start], "big") & (1 << 7 * size_bytes) - 1
    unknown = size == (1 << 7 * size_bytes) - 1
    return _Element(int.from_bytes(data[at : at + id_bytes], "big"), start, None if unknown else size)


def _width(data: memoryview, at: int) -> int:
    """Return the bytes of the number at ``at``, which its leading zeros tell; 0 where there is none."""
    first = data[at] if at < len(data) else 0
    return _LONGEST + 1 - first.bit_length() if first else 0
