"""Which kind of recording some bytes are, by what they begin with; names and types that a sender gives are not asked.

A decoder is only reached through a kind that is named here, so that neither libsndfile nor FFmpeg chooses by itself
what to make of the bytes. The kinds are those that recorders, phones and browsers write. Not among them, since they are
rare and little tested: AU, CAF, W64, VOC, AMR, ADTS and what else the two libraries could read.
"""

from __future__ import annotations

import enum
import struct

from mmprep.errors import DecodeError

#: What is said to a sender whose bytes are none of these.
READ = "WAV, AIFF, FLAC, Ogg (Vorbis, Opus), MP3, MP4 (AAC, ALAC) or WebM"

#: A length that programs write which do not know it yet when they begin: 2 or 4 GiB, or somewhat less.
_UNKNOWN = (1 << 31) - (1 << 16)
#: Bytes by which a header may promise too much; some programs count themselves wrong.
_SLACK = 1024
_MOST_CHUNKS = 4096
_MOST_TAGS = 16

#: Formats of samples in a WAV: PCM, Microsoft's ADPCM, float, A-law, mu-law, IMA's ADPCM, and "see the extension".
_WAV_FORMATS = frozenset({0x0001, 0x0002, 0x0003, 0x0006, 0x0007, 0x0011})
_EXTENSIBLE = 0xFFFE


class Kind(enum.StrEnum):
    """A kind of recording, by its name for people."""

    WAV = "WAV"
    AIFF = "AIFF"
    FLAC = "FLAC"
    OGG = "Ogg"
    MP3 = "MP3"
    MP4 = "MP4"
    WEBM = "WebM"


def sniff(data: memoryview) -> tuple[Kind | None, int]:
    """Return the kind of ``data``, ``None`` for what is not read, and at which byte it begins, after any ID3 tags."""
    start = _after_tags(data)
    head = bytes(data[start : start + 12])
    if head[:4] in {b"RIFF", b"RF64"} and head[8:] == b"WAVE":
        return Kind.WAV, start
    if head[:4] == b"FORM" and head[8:] in {b"AIFF", b"AIFC"}:
        return Kind.AIFF, start
    if head[:4] == b"fLaC":
        return Kind.FLAC, start
    if head[:4] == b"OggS":
        return Kind.OGG, start
    if head[4:8] == b"ftyp":
        return Kind.MP4, start
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return Kind.WEBM, start
    if start or _is_mp3_frame(head):
        return Kind.MP3, 0
    return None, 0


def _after_tags(data: memoryview) -> int:
    """Return where the ID3v2 tags before a recording end, 0 where there are none; their size is in 7-bit bytes."""
    start = 0
    for _ in range(_MOST_TAGS):
        tag = bytes(data[start : start + 10])
        if len(tag) < 10 or tag[:3] != b"ID3" or max(tag[6:]) > 0x7F:
            break
        size = (tag[6] << 21) | (tag[7] << 14) | (tag[8] << 7) | tag[9]
        start = min(start + size + (20 if tag[5] & 0x10 else 10), len(data))
    return start


def _is_mp3_frame(head: bytes) -> bool:
    """Whether ``head`` begins with the header of an MPEG audio frame of layer III (ISO 11172-3, 2.4.1.3)."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer = (head[1] >> 3) & 3, (head[1] >> 1) & 3
    bitrate, rate = head[2] >> 4, (head[2] >> 2) & 3
    return version != 1 and layer == 1 and bitrate not in {0, 15} and rate != 3


def check_chunks(kind: Kind, data: memoryview) -> str | None:
    """Look at the chunks of a WAV or AIFF before a decoder does.

    libsndfile takes a recording whose end is missing for a shorter one, and a WAV may hold anything.

    Returns
    -------
    what is wrong with the format of its samples, ``None`` where nothing is

    Raises
    ------
    DecodeError
        The samples end before their header says so, or there are far too many chunks.
    """
    wide = "<I" if kind is Kind.WAV else ">I"
    wanted = b"data" if kind is Kind.WAV else b"SSND"
    position, large = 12, 0
    for _ in range(_MOST_CHUNKS):
        if position + 8 > len(data):
            return None  # a decoder will say what is missing
        name, (size,) = bytes(data[position : position + 4]), struct.unpack_from(wide, data, position + 4)
        body = data[position + 8 : position + 8 + size]
        if name == wanted:
            _check_samples(large if size == 0xFFFFFFFF and large else size, len(data) - position - 8)
            return None
        if name == b"fmt " and kind is Kind.WAV and not _is_readable(body):
            return f"its samples are in a format that is not read; send it as 16-bit PCM, or another of {READ}"
        if name == b"ds64" and len(body) >= 16:
            (large,) = struct.unpack_from("<Q", body, 8)
        position += 8 + size + size % 2
    raise DecodeError("the recording has thousands of chunks before its samples; encode it anew")


def _check_samples(promised: int, there: int) -> None:
    if there + _SLACK < promised < _UNKNOWN:
        raise DecodeError(
            f"the recording is truncated: its header promises {promised} bytes of samples, and {there} are there; send "
            "all of it"
        )


def _is_readable(body: memoryview) -> bool:
    """Whether a WAV's ``fmt`` chunk names a format that is read; the extension begins with the format's number."""
    if len(body) < 16:
        return True  # a decoder will say so
    (tag,) = struct.unpack_from("<H", body)
    if tag == _EXTENSIBLE and len(body) >= 26:
        (tag,) = struct.unpack_from("<H", body, 24)
    return tag in _WAV_FORMATS


def flac_length(data: memoryview) -> int:
    """Return the samples of one channel that a FLAC's header announces; 0 where it does not know, or has none."""
    if len(data) < 26 or data[4] & 0x7F != 0:
        return 0
    return int.from_bytes(data[18:26], "big") & ((1 << 36) - 1)
