"""Which kind of recording some bytes are, by what they begin with; names and types that a sender gives are not asked.

A decoder is only reached through a kind that is named here, so that neither libsndfile nor FFmpeg chooses by itself
what to make of the bytes. The kinds are those that recorders, phones and browsers write. Not among them, since they are
rare and little tested: AU, CAF, W64, VOC, AMR, ADTS and what else the two libraries could read.
"""

from __future__ import annotations

import enum

#: What is said to a sender whose bytes are none of these.
READ = "WAV, AIFF, FLAC, Ogg (Vorbis, Opus), MP3, MP4 (AAC, ALAC) or WebM"

_MOST_TAGS = 16


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
    """Return the kind of ``data``, ``None`` for what is not read, and at which byte it begins, after any ID3 tags.

    What follows such tags and is no other kind is taken for an MP3: they are its own.
    """
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
        return Kind.MP3, start
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
