"""What an MP4 or QuickTime file claims in its headers, read before FFmpeg sees the file.

FFmpeg makes an index of all samples that the tables of the header announce, 24 bytes each and more, before it reads one
of them, and some tables announce billions in a few bytes. So the announcements are added up here, and refused where no
honest file makes them. A file that keeps its data in other files, or its header compressed, is refused too: FFmpeg is
told not to follow the first, and inflates the second to whatever size it claims.

Only the boxes on the way to those tables are entered (ISO/IEC 14496-12, and Apple's QuickTime File Format); what is in
the others is FFmpeg's business, which bounds it by the bytes that are there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from mmprep.errors import DecodeError, UnsupportedMedia

#: Samples that all tracks together may announce: two hours of 240 frames and 1,000 audio packets a second.
MOST_SAMPLES = 9_000_000
#: Boxes that a header may have: thousands of fragments have a dozen each.
_MOST_BOXES = 1_000_000
#: References to data that a list may have; one is usual.
_MOST_REFERENCES = 256
#: Boxes on the way to the tables.
_STRICT = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"moof", b"traf", b"mvex"})
#: Boxes in which FFmpeg would find such boxes too, and in which honest files have other things.
_LOOSE = frozenset({b"edts", b"udta", b"tref", b"sinf", b"schi", b"meta"})
#: Tables that begin with a count behind four bytes of version and flags, and the bytes of an entry.
_TABLES = {b"stts": 8, b"ctts": 8, b"stss": 4, b"stsc": 12, b"stco": 4, b"co64": 8}
#: Flags of a track fragment's run that add four bytes to each sample: duration, size, flags, composition time.
_RUN_FIELDS = (0x100, 0x200, 0x400, 0x800)
_BROKEN = "the video is broken: its header's boxes do not fit into each other"


class _Box(NamedTuple):
    kind: bytes
    #: Where its content is.
    start: int
    end: int


def check_boxes(data: memoryview) -> None:
    """Refuse a file whose headers announce what it can't hold, or that is not all of the video.

    Parameters
    ----------
    data:
        The file, bytes.

    Raises
    ------
    DecodeError
        The headers are broken, or announce more samples than any file of that size has.
    UnsupportedMedia
        The header is compressed, or the samples are in other files.
    """
    samples = 0
    waiting = [_Box(b"", 0, len(data))]
    boxes = 0
    while waiting:
        parent = waiting.pop()
        for box in _children(data, parent):
            boxes += 1
            samples += _announced(data, box)
            if samples > MOST_SAMPLES or boxes > _MOST_BOXES:
                raise DecodeError(f"the video is broken: its header announces more than {MOST_SAMPLES} samples")
            if box.kind in _STRICT or box.kind in _LOOSE:
                waiting.append(box)


def _children(data: memoryview, parent: _Box) -> Iterator[_Box]:
    """Yield the boxes in ``parent``; the last of a file may be cut off, and in loose ones anything may follow."""
    outermost, loose = not parent.kind, parent.kind in _LOOSE
    at = parent.start
    while at + 8 <= parent.end:
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1 and at + 16 <= parent.end:
            (size,) = struct.unpack_from(">Q", data, at + 8)
            head = 16
        elif size == 0:  # up to the end; in a header it is the mark that QuickTime ends a list with
            if not outermost:
                return
            size = parent.end - at
        end = at + size
        if size < head or (end > parent.end and not outermost):
            if loose:
                return
            raise DecodeError(_BROKEN)
        yield _Box(kind, at + head, min(end, parent.end))
        at = end


def _announced(data: memoryview, box: _Box) -> int:
    """Return how many samples a box announces; refuse tables that end before their entries, and what leads elsewhere."""
    kind = box.kind
    if kind == b"cmov":
        raise UnsupportedMedia("the video's header is compressed, which is not read; send it without")
    if kind == b"dref":
        _check_references(data, box)
    elif kind in _TABLES:
        (count,) = _numbers(data, box, 4, 1)
        _check_room(box, 8 + count * _TABLES[kind])
    elif kind == b"trun":
        flags, count = _numbers(data, box, 0, 2)
        _check_room(box, 8 + count * 4 * sum(1 for field in _RUN_FIELDS if flags & field))
        return count
    elif kind in {b"stsz", b"stz2"}:
        size, count = _numbers(data, box, 4, 2)
        if kind == b"stz2" or not size:
            return count
        # All of one size, as those of uncompressed sound, of which each instant is a sample: their bytes must be there.
        if size * count > len(data):
            raise DecodeError(f"the video is broken: its header announces {count} samples of {size} bytes each")
    return 0


def _check_room(box: _Box, needed: int) -> None:
    if box.start + needed > box.end:
        raise DecodeError(_BROKEN)


def _numbers(data: memoryview, box: _Box, offset: int, count: int) -> tuple[int, ...]:
    """Return 32-bit numbers of a box's content; raises DecodeError where the box is too small for them."""
    _check_room(box, offset + 4 * count)
    return struct.unpack_from(f">{count}I", data, box.start + offset)


def _check_references(data: memoryview, box: _Box) -> None:
    """Refuse a list of data references of which one leads out of the file."""
    entries = _Box(box.kind, box.start + 8, box.end)
    for number, entry in enumerate(_children(data, entries)):
        (flags,) = _numbers(data, entry, 0, 1)
        if number == _MOST_REFERENCES:
            raise DecodeError(_BROKEN)
        if not flags & 1:
            raise UnsupportedMedia("the video keeps its data in other files, which are not read; send it in one piece")
