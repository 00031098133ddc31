"""What a picture may ask of its decoder beside its pixels: judged from its structure, before the decoder sees it.

The limit of pixels bounds memory and, in most formats, time. These are the ways around it: a small file that makes a
decoder pass over all pixels again and again, or an interpreted parser loop for minutes. A lane's time limit would end
them too, at the price of a lane; here they are an error within milliseconds.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Final, NamedTuple

from mmprep.errors import DecodeError, TooLarge, UnsupportedMedia
from mmprep.picture_header import Boxes, Data, PictureHeader, TiffTags, frame_of, jpeg_segments

#: Scans of a JPEG, each of which costs a pass over all pixels, however short it is. libjpeg writes 10 to 18, others some more.
MOST_SCANS: Final = 64
#: Chunks of a PNG that do not hold pixels. Each may hold text or a profile that takes a millisecond to unpack.
MOST_CHUNKS: Final = 1000
#: Chunks of a PNG that do, of all its frames, and the bytes for which it may have one more.
MOST_PIXEL_CHUNKS: Final = 20_000
CHUNK_BYTES: Final = 1024
#: Strips or tiles of a TIFF: rows of the tallest picture that other formats know.
MOST_STRIPS: Final = 1 << 16
#: How often the strips of a TIFF may cover it: its channels may be stored apart.
MOST_LAYERS: Final = 5
#: Items of an AVIF, of which a grid has one for each cell: each costs its decoder a millisecond, however small it is.
MOST_ITEMS: Final = 1024
#: Pixels of a run-length encoded BMP, which Pillow decodes in Python.
MOST_RUN_PIXELS: Final = 1 << 24

#: TIFF compressions that are read: none, CCITT, LZW, JPEG, deflate, PackBits, LZMA, Zstandard. Not the old JPEG, nor
#: what a few scanners and renderers wrote thirty years ago: their decoders are old, and nobody tries them any more.
_COMPRESSIONS = frozenset((1, 2, 3, 4, 5, 7, 8, 32773, 32946, 34925, 50000))
_COMPRESSION, _STRIP_OFFSETS, _TILE_OFFSETS = 259, 273, 324
_SOS = 0xDA
#: Frames whose scan holds everything where it holds all components.
_SEQUENTIAL = frozenset((0xC0, 0xC1, 0xC9))
_SCAN = re.compile(rb"\xff\xda")
#: What ends the coded pixels of a scan: a marker that is neither padding nor a restart.
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_PIXEL_CHUNKS = frozenset((b"IDAT", b"fdAT", b"fcTL"))
_RUN_LENGTHS = frozenset((1, 2))


def check_effort(header: PictureHeader, data: Data) -> None:
    """Refuse a picture whose structure would cost far more than its pixels.

    Parameters
    ----------
    header:
        Of ``data``; its pixels are within their limit.

    Raises
    ------
    DecodeError
        It has too many parts for any picture of use.
    TooLarge
        It has more pixels than a decoder that is slow may be given.
    UnsupportedMedia
        A compression that is not read.
    """
    check = _CHECKS.get(header.format)
    if check is None:
        return
    try:
        check(header, data)
    except (struct.error, IndexError, OverflowError):
        raise DecodeError("the picture is broken or truncated: its structure cannot be read to its end") from None


# --- JPEG -------------------------------------------------------------------------------------------------------------


def _check_jpeg(_header: PictureHeader, data: Data) -> None:
    first = _next_scan(data, 2)
    if first is None or first.whole:
        return
    if sum(1 for _ in islice(_SCAN.finditer(data), MOST_SCANS + 1)) <= MOST_SCANS:
        return  # as nearly all: not even with what looks like scans in metadata, or behind the picture
    scans, scan = 1, first
    while (end := _END_OF_SCAN.search(data, scan.end)) and (found := _next_scan(data, end.start())):
        scans, scan = scans + 1, found
        if scans > MOST_SCANS:
            raise DecodeError(f"the picture has more than {MOST_SCANS} scans; send a JPEG that is encoded anew")


class _Scan(NamedTuple):
    """Where the header of a scan ends, and whether the scan holds all of its picture."""

    end: int
    whole: bool


def _next_scan(data: Data, at: int) -> _Scan | None:
    """Return the next scan of the first picture in the file; ``None`` where that ends before."""
    components = 0
    for segment in jpeg_segments(data, at):
        if frame_of(segment):
            components = 0 if segment.marker not in _SEQUENTIAL else data[segment.start + 5]
        elif segment.marker == _SOS:
            return _Scan(segment.end, data[segment.start] == components)
    return None


# --- PNG --------------------------------------------------------------------------------------------------------------


def png_chunks(data: Data) -> Iterator[bytes]:
    """Yield the kinds of a PNG's chunks, up to its end; the file may go on behind it."""
    position, kind = 8, b""
    while kind != b"IEND" and position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        yield kind
        position += length + 12


def _check_png(_header: PictureHeader, data: Data) -> None:
    others, pixels = MOST_CHUNKS, MOST_PIXEL_CHUNKS + len(data) // CHUNK_BYTES
    for kind in png_chunks(data):
        if kind in _PIXEL_CHUNKS:
            pixels -= 1
        else:
            others -= 1
        if others < 0 or pixels < 0:
            raise DecodeError("the picture has too many chunks for its size; send a PNG that is encoded anew")


# --- TIFF, BMP --------------------------------------------------------------------------------------------------------


def _check_tiff(_header: PictureHeader, data: Data) -> None:
    tags = TiffTags(data)
    compression = tags.whole(_COMPRESSION, 1)
    if compression not in _COMPRESSIONS:
        raise UnsupportedMedia(f"TIFF pictures with compression {compression} are not read; use LZW or deflate")
    if max(tags.count(_STRIP_OFFSETS), tags.count(_TILE_OFFSETS)) > MOST_STRIPS:
        raise DecodeError(f"the picture has more than {MOST_STRIPS} strips or tiles; send it encoded anew")


def check_tiles(extents: Iterable[tuple[int, int, int, int]], pixels: int) -> None:
    """Refuse strips or tiles that would have the same pixels decoded again and again.

    Parameters
    ----------
    extents:
        Left, top, right and bottom of each, in pixels.
    pixels:
        Of the picture.
    """
    covered = sum(max(1, (right - left) * (bottom - top)) for left, top, right, bottom in extents)
    if covered > MOST_LAYERS * pixels:
        raise DecodeError("the picture is broken: its strips or tiles cover it more than once")


def _check_bmp(header: PictureHeader, data: Data) -> None:
    (size,) = struct.unpack_from("<I", data, 14)
    compression = struct.unpack_from("<I", data, 30)[0] if size > 12 else 0
    if compression not in _RUN_LENGTHS:
        return
    if header.pixels > MOST_RUN_PIXELS:
        raise TooLarge(
            f"the picture has {header.pixels} pixels, and a BMP with run lengths may have {MOST_RUN_PIXELS}; "
            "send it as a PNG"
        )
    # A pixel takes at most two bytes, and so does the end of a row: more is there to keep the decoder busy.
    if len(data) > 2 * (header.pixels + header.height) + 4096:
        raise DecodeError("the picture is broken: this BMP has more run lengths than pixels")


# --- AVIF -------------------------------------------------------------------------------------------------------------


def _check_avif(_header: PictureHeader, data: Data) -> None:
    boxes = Boxes(data)
    for meta in boxes.named(b"meta", 0, len(data)):
        for listed in boxes.within(meta, b"iinf", skip=4):
            form = ">H" if data[listed.start] == 0 else ">I"
            if struct.unpack_from(form, data, listed.start + 4)[0] > MOST_ITEMS:
                raise DecodeError(f"the picture has more than {MOST_ITEMS} parts; send an AVIF of larger cells")


_CHECKS: Final[dict[str, Callable[[PictureHeader, Data], None]]] = {
    "JPEG": _check_jpeg,
    "PNG": _check_png,
    "TIFF": _check_tiff,
    "BMP": _check_bmp,
    "AVIF": _check_avif,
}
