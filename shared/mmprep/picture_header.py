"""What a picture's first bytes say: its format and its size, without any library that decodes.

Frontends read it to weigh a request before a lane sees it, lanes to refuse a picture before its decoder takes memory. A
lane also refuses a picture whose decoder finds more pixels than were read here, so what a request was weighed by is what
it costs.

The format is known by content, never by name or type. Every walk has a bound, so that the header of a hostile file costs
no more than a few milliseconds. Where a file breaks its format's rules, this takes the larger size or none at all.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeAlias

from mmprep.errors import DecodeError, TooLarge, UnsupportedMedia

Data: TypeAlias = bytes | memoryview

#: Pillow's names of the formats that are read.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

#: Segments, blocks and boxes of one file that are walked over. Real files have some dozens, few have hundreds.
MOST_STEPS: Final = 5000
#: Bytes between a JPEG's segments that belong to none.
MOST_PADDING: Final = 1 << 16
#: Entries of a TIFF's directory.
MOST_TAGS: Final = 4096

_SOS = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: JPEG markers without a length behind them.
_BARE = frozenset((0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_BMP_SIZES = frozenset((12, 40, 52, 56, 64, 108, 124))
_TIFF_MAGIC = (b"II\x2a\x00", b"MM\x00\x2a", b"II\x00\x2a", b"MM\x2a\x00", b"II\x2b\x00", b"MM\x00\x2b")
#: TIFF types of whole numbers without a sign: the length of one, and its code.
_TIFF_WHOLE = {1: (1, "B"), 3: (2, "H"), 4: (4, "I"), 16: (8, "Q")}
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
_HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))


class PictureHeader(NamedTuple):
    """Format and size of a picture.

    Attributes
    ----------
    format: one of :data:`FORMATS`.
    width, height: in pixels, as stored: before EXIF orientation.
    """

    format: str
    width: int
    height: int

    @property
    def pixels(self) -> int:
        """Of the picture, or of its first frame."""
        return self.width * self.height


def read_picture_header(data: Data) -> PictureHeader:
    """Return what the header says.

    Raises
    ------
    UnsupportedMedia
        Empty, or of none of :data:`FORMATS`.
    DecodeError
        Of one of them, and broken or truncated before its size.
    """
    name = _format(data)
    try:
        width, height = _READERS[name](data)
    except (struct.error, IndexError, OverflowError):
        raise DecodeError(f"the picture is broken or truncated: the header of this {name} ends too early") from None
    if not width or not height:
        raise DecodeError("the picture is broken: its header says that it has no pixels")
    return PictureHeader(name, width, height)


def check_pixels(pixels: int, most: int, *, param: str | None = None) -> None:
    """Refuse a picture that has more pixels than one may have, ``--max-image-pixels``; raises TooLarge."""
    if pixels > most:
        raise TooLarge(
            f"the picture has {pixels} pixels, above the limit of {most} (--max-image-pixels); send a smaller one",
            param=param,
        )


def _format(data: Data) -> str:
    """Return the format by its magic bytes."""
    head = bytes(data[:16])
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM"):
        return "BMP"
    if head.startswith(_TIFF_MAGIC):
        return "TIFF"
    kind = "not a picture of a kind that is read"
    if head[4:8] == b"ftyp":
        brands = _brands(data)
        if brands & _AVIF_BRANDS:
            return "AVIF"
        kind = "HEIC pictures are not read" if brands & _HEIC_BRANDS else kind
    raise UnsupportedMedia(f"{kind if len(data) else 'the picture is empty'}; send one of {', '.join(FORMATS)}")


# --- JPEG (ITU T.81) --------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """One marker segment of a JPEG: its marker's second byte, and where its content lies."""

    marker: int
    start: int
    end: int


def jpeg_segments(data: Data, at: int = 2) -> Iterator[Segment]:
    """Yield the segments from ``at`` on, up to the next start of a scan or the end of the picture.

    Raises
    ------
    DecodeError
        There are too many of them, or too much between them.
    """
    padding = MOST_PADDING
    for _ in range(MOST_STEPS):
        found = _MARKER.search(data, at, at + padding + 2)
        if found is None:
            raise DecodeError("the picture is broken or truncated: this JPEG has no pixels behind its header")
        padding -= found.start() - at
        marker, start = data[found.start() + 1], found.end()
        length = 0 if marker in _BARE else int(struct.unpack_from(">H", data, start)[0])
        yield Segment(marker, start + min(2, length), start + length)
        if marker in {_SOS, 0xD9}:
            return
        at = start + length
    raise DecodeError(f"the picture has more than {MOST_STEPS} segments before its pixels; send it encoded anew")


def frame_of(segment: Segment) -> bool:
    """Whether the segment describes a frame: a size, and how it is coded."""
    return segment.marker in _FRAMES


def _jpeg(data: Data) -> tuple[int, int]:
    for segment in jpeg_segments(data):
        if frame_of(segment):
            height, width = struct.unpack_from(">HH", data, segment.start + 1)
            return width, height
    raise DecodeError("the picture is broken: this JPEG has no size before its pixels")


# --- PNG, WebP, BMP ---------------------------------------------------------------------------------------------------


def _png(data: Data) -> tuple[int, int]:
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if kind != b"IHDR" or length != 13:
        raise DecodeError("the picture is broken: this PNG does not begin with its header")
    return width, height


def _webp(data: Data) -> tuple[int, int]:
    kind = bytes(data[12:16])
    if kind == b"VP8X":
        low, high, low2, high2 = struct.unpack_from("<HBHB", data, 24)
        return (low | high << 16) + 1, (low2 | high2 << 16) + 1
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and bytes(data[23:26]) == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise DecodeError("the picture is broken or truncated: this WebP has no frame at its start")


def _bmp(data: Data) -> tuple[int, int]:
    (size,) = struct.unpack_from("<I", data, 14)
    if size not in _BMP_SIZES:
        raise DecodeError("the picture is broken: this BMP has a header of an unknown length")
    if size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        return width, height
    width, height = struct.unpack_from("<II", data, 18)
    # Negative: its rows go from the top down. Pillow looks at the highest byte alone.
    return width, height if height < 0xFF000000 else (1 << 32) - height


# --- GIF --------------------------------------------------------------------------------------------------------------


def _gif(data: Data) -> tuple[int, int]:
    """Return the screen's size, or that which the first frame needs where it reaches out of it."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    inside = False
    for _ in range(MOST_STEPS):
        kind = data[at]
        if inside:  # a chain of blocks, each behind its length; the last one is empty
            inside, at = kind > 0, at + 1 + kind
        elif kind == 0x21:
            inside, at = True, at + 2
        elif kind == 0x2C:
            left, top, wide, high = struct.unpack_from("<HHHH", data, at + 1)
            return max(width, left + wide), max(height, top + high)
        elif kind == 0x3B:
            raise DecodeError("the picture is broken: this GIF has no frame")
        else:
            at += 1
    raise DecodeError("the picture has too much before its first frame; send it encoded anew")


# --- TIFF (6.0, and BigTIFF) ------------------------------------------------------------------------------------------


class Tag(NamedTuple):
    """One entry of a TIFF's directory: the type and number of its values, and where these or their place stand."""

    type: int
    values: int
    at: int


class TiffTags:
    """The first directory of a TIFF.

    Raises
    ------
    struct.error, OverflowError
        It reaches beyond the end.
    DecodeError
        It has too many entries.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        self._order = "<" if bytes(data[:2]) == b"II" else ">"
        big = 0x2B in {data[2], data[3]}
        (first,) = struct.unpack_from(self._order + ("Q" if big else "I"), data, 8 if big else 4)
        (count,) = struct.unpack_from(self._order + ("Q" if big else "H"), data, first)
        if count > MOST_TAGS:
            raise DecodeError(f"the picture has more than {MOST_TAGS} tags; send it encoded anew")
        step, entry, start = (20, "HHQ", 8) if big else (12, "HHI", 2)
        self._tags: dict[int, Tag] = {}
        for number in range(count):
            at = first + start + number * step
            kind, form, values = struct.unpack_from(self._order + entry, data, at)
            self._tags.setdefault(kind, Tag(form, values, at + step - (8 if big else 4)))  # of several the first counts

    def count(self, number: int) -> int:
        """Return how many values the tag has, 0 where it is not there."""
        found = self._tags.get(number)
        return found.values if found else 0

    def whole(self, number: int, default: int) -> int:
        """Return a tag's one whole number, ``default`` where it has none."""
        found = self._tags.get(number)
        if found is None or found.values != 1 or found.type not in _TIFF_WHOLE:
            return default
        return int(struct.unpack_from(self._order + _TIFF_WHOLE[found.type][1], self._data, found.at)[0])


def _tiff(data: Data) -> tuple[int, int]:
    tags = TiffTags(data)
    return tags.whole(_TIFF_WIDTH, 0), tags.whole(_TIFF_HEIGHT, 0)


# --- AVIF (ISO/IEC 14496-12, 23008-12) --------------------------------------------------------------------------------


class Box(NamedTuple):
    """One box of a file: its kind, and where its content lies."""

    kind: bytes
    start: int
    end: int


class Boxes:
    """The boxes of one file, of which so many are looked at and no more."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self._left = MOST_STEPS

    def named(self, kind: bytes, start: int, end: int) -> Iterator[Box]:
        """Yield the boxes of one kind from ``start`` to ``end``."""
        while start + 8 <= end:
            if not self._left:
                raise DecodeError("the picture has too many parts; send it encoded anew")
            self._left -= 1
            length, found = struct.unpack_from(">I4s", self.data, start)
            content = start + 8
            if length == 1:
                (length,) = struct.unpack_from(">Q", self.data, content)
                content += 8
            stop = end if length == 0 else start + length
            if stop < content:
                raise DecodeError("the picture is broken: a part of this AVIF is shorter than its own header")
            if found == kind:
                yield Box(found, content, min(stop, end))
            start = stop

    def within(self, parent: Box, kind: bytes, *, skip: int = 0) -> Iterator[Box]:
        """Yield the boxes of one kind in another one, behind ``skip`` bytes."""
        return self.named(kind, parent.start + skip, parent.end)


def _brands(data: Data) -> set[bytes]:
    (length,) = struct.unpack_from(">I", data)
    listed = bytes(data[8 : min(length, 8 + 4 * 64)])
    return {listed[at : at + 4] for at in range(0, len(listed), 4) if at != 4}  # the second is the brand's version


def _avif(data: Data) -> tuple[int, int]:
    """Return the largest size that any of the file's pictures or tracks has: the first one's is none larger."""
    boxes = Boxes(data)
    sizes = [(0, 0), *_extents(boxes), *_track_sizes(boxes)]
    return max(sizes, key=lambda size: size[0] * size[1])


def _extents(boxes: Boxes) -> Iterator[tuple[int, int]]:
    for meta in boxes.named(b"meta", 0, len(boxes.data)):
        for properties in boxes.within(meta, b"iprp", skip=4):
            for container in boxes.within(properties, b"ipco"):
                for extent in boxes.within(container, b"ispe"):
                    yield struct.unpack_from(">II", boxes.data, extent.start + 4)


def _track_sizes(boxes: Boxes) -> Iterator[tuple[int, int]]:
    for movie in boxes.named(b"moov", 0, len(boxes.data)):
        for track in boxes.within(movie, b"trak"):
            for header in boxes.within(track, b"tkhd"):
                at = header.start + (88 if boxes.data[header.start] else 76)
                width, height = struct.unpack_from(">II", boxes.data, at)
                yield width >> 16, height >> 16


_READERS: Final[dict[str, Callable[[Data], tuple[int, int]]]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
    "AVIF": _avif,
}
