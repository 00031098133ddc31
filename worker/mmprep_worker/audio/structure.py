"""A look at a recording's structure before a library does.

It finds what a library would not say, a missing end, and what would make it work for minutes or take gigabytes over some
kilobytes. Each number below is far above what programs write. Nothing is judged here that a library judges well.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from mmprep.errors import DecodeError
from mmprep_worker.audio.kinds import READ, Kind

#: A length that programs write which do not know it yet when they begin: 2 or 4 GiB, or somewhat less.
_UNKNOWN = (1 << 31) - (1 << 16)
#: Bytes by which a header may promise too much; some programs count themselves wrong.
_SLACK = 1024
#: Parts of a WAV or AIFF before its samples, and of a FLAC before its frames.
_MOST_CHUNKS = 4096
#: Boxes of an MP4, each of which takes libavformat up to 30 microseconds. A fragment has ten, and an hour 7,200 fragments.
_MOST_BOXES = 100_000
_DEEPEST_BOX = 16
#: Pages of an Ogg, of which there are 50 a second at most; and false ones, for each of which libogg checks 64 KiB.
_MOST_PAGES = 500_000
_FALSE_PAGES = 16
_LONGEST_PAGE = 27 + 255 + 255 * 255

#: Formats of samples in a WAV: PCM, Microsoft's ADPCM, float, A-law, mu-law, IMA's ADPCM, and "see the extension".
_WAV_FORMATS = frozenset({0x0001, 0x0002, 0x0003, 0x0006, 0x0007, 0x0011})
_EXTENSIBLE = 0xFFFE


# --- WAV and AIFF -----------------------------------------------------------------------------------------------------


def check_chunks(kind: Kind, data: memoryview) -> str | None:
    """Look at the chunks of a WAV or AIFF, of which libsndfile takes one whose end is missing for a shorter one.

    Returns
    -------
    what is wrong with the format of its samples, ``None`` where nothing is

    Raises
    ------
    DecodeError
        The samples end before their header says so, or there are far too many chunks.
    """
    order = "<I" if kind is Kind.WAV else ">I"
    wanted = b"data" if kind is Kind.WAV else b"SSND"
    position, large = 12, 0
    for _ in range(_MOST_CHUNKS):
        if position + 8 > len(data):
            return None  # libsndfile will say what is missing
        name, (size,) = bytes(data[position : position + 4]), struct.unpack_from(order, data, position + 4)
        body = data[position + 8 : position + 8 + size]
        if name == wanted:
            _check_samples(large if size == 0xFFFFFFFF and large else size, len(data) - position - 8)
            return None
        if name == b"fmt " and kind is Kind.WAV and not _is_readable(body):
            return f"its samples are in a format that is not read; send it as 16-bit PCM, or another of {READ}"
        if name == b"ds64" and len(body) >= 16:
            (large,) = struct.unpack_from("<Q", body, 8)
        position += 8 + size + size % 2
    raise _too_many("chunks before its samples")


def _check_samples(promised: int, there: int) -> None:
    if there + _SLACK < promised < _UNKNOWN:
        raise DecodeError(
            f"the recording is truncated: its header promises {promised} bytes of samples, and {there} are there; send "
            "all of it"
        )


def _is_readable(body: memoryview) -> bool:
    """Whether a WAV's ``fmt`` chunk names a format that is read; the extension begins with the format's number."""
    if len(body) < 16:
        return True  # libsndfile will say so
    (tag,) = struct.unpack_from("<H", body)
    if tag == _EXTENSIBLE and len(body) >= 26:
        (tag,) = struct.unpack_from("<H", body, 24)
    return tag in _WAV_FORMATS


# --- FLAC and Ogg -----------------------------------------------------------------------------------------------------


def flac_length(data: memoryview) -> int:
    """Return the samples of one channel that a FLAC's header announces; 0 where it does not know, or has none.

    Raises
    ------
    DecodeError
        There are far too many blocks of metadata.
    """
    position = 4
    for _ in range(_MOST_CHUNKS):
        if position + 4 > len(data):
            break
        head = int.from_bytes(data[position : position + 4], "big")
        position += 4 + (head & 0xFFFFFF)
        if head >> 31:
            break
    else:
        raise _too_many("blocks of metadata")
    if len(data) < 26 or data[4] & 0x7F != 0:
        return 0
    return int.from_bytes(data[18:26], "big") & ((1 << 36) - 1)


def ogg_end(data: memoryview) -> int:
    """Return where the last whole page of an Ogg ends: what follows is no page, or the beginning of one, and is left out.

    Raises
    ------
    DecodeError
        Something else lies between or behind its pages, or there are far too many.
    """
    last = position = pages = 0
    while position + 27 <= len(data) and bytes(data[position : position + 4]) == b"OggS":
        lacing = data[position + 27 : position + 27 + data[position + 26]]
        end = position + 27 + len(lacing) + sum(lacing)
        if end > len(data):
            break
        last, position, pages = position, end, pages + 1
        if pages > _MOST_PAGES:
            raise _too_many("pages")
    # Where a page begins within the last one, or behind it, bytes are missing before it.
    if len(data) - position > _LONGEST_PAGE or any(
        last + 1 + found.start() != position for found in re.finditer(b"OggS", data[last + 1 :])
    ):
        raise DecodeError(
            f"the recording is broken: no page of the Ogg begins at byte {position}; send it encoded anew"
        )
    for number, _ in enumerate(re.finditer(b"OggS", data[:position])):
        if number >= pages + _FALSE_PAGES:
            raise DecodeError("the recording is broken: the Ogg has beginnings of pages within its pages")
    return position


# --- MP4 --------------------------------------------------------------------------------------------------------------

#: Boxes that hold boxes, and how many bytes of their own stand before these.
_HOLDERS = {
    **dict.fromkeys((b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"tref", b"udta", b"ilst"), 0),
    **dict.fromkeys((b"moof", b"traf", b"mvex", b"sinf", b"schi", b"wave", b"gmhd"), 0),
    b"meta": 4,
    b"stsd": 8,
}
#: Boxes that hold tables, texts or pictures, however long; of what is not named here there is less than so many bytes.
_PLAIN = frozenset(
    b"mdat ftyp styp free skip wide uuid mvhd tkhd mdhd hdlr elst stts ctts stsz stz2 stsc stco co64 stss sdtp sbgp sgpd "
    b"sidx emsg prft mfhd tfhd tfdt trun mfra saiz saio senc data name mean keys pssh".split()
)
_MOST_OTHERS = 1 << 20


def check_boxes(data: memoryview) -> None:
    """Look at the boxes of an MP4: libavformat makes room for as many samples as their tables announce.

    Raises
    ------
    DecodeError
        They announce more samples than there are bytes, are far too many, or are compressed.
    """
    samples = others = 0
    for boxes, (kind, body) in enumerate(_walk(data, 0)):
        if kind == b"stsz" and len(body) >= 12:
            size, count = struct.unpack_from(">II", body, 4)
            samples += max(1, size) * count
        elif kind == b"trun" and len(body) >= 8:
            samples += int.from_bytes(body[4:8], "big")
        elif kind in {b"cmov", b"hoov"}:
            raise DecodeError("the recording's header is compressed, which is not read; encode it anew")
        elif kind not in _PLAIN and kind not in _HOLDERS:
            others += len(body)
        if boxes >= _MOST_BOXES or others > _MOST_OTHERS:
            raise _too_many("boxes")
        if samples > len(data):
            raise DecodeError("the recording is broken: its tables announce more samples than it has bytes")


def _walk(data: memoryview, depth: int) -> Iterator[tuple[bytes, memoryview]]:
    """Yield each box and what is in it, then the boxes in it (ISO 14496-12, 4.2)."""
    at = 0
    while at + 8 <= len(data):
        size, kind, head = int.from_bytes(data[at : at + 4], "big"), bytes(data[at + 4 : at + 8]), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        end = len(data) if size == 0 else at + size
        if end < at + head:
            return
        body = data[at + head : end]
        yield kind, body
        if kind in _HOLDERS and depth < _DEEPEST_BOX:
            yield from _walk(body[_HOLDERS[kind] :], depth + 1)
        at = end


def _too_many(parts: str) -> DecodeError:
    return DecodeError(f"the recording has far too many {parts}; encode it anew")
