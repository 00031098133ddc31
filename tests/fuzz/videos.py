"""Videos that are almost right: changed in the terms of their containers, and what their decoder promises of them."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from random import Random

import av
import numpy as np
from tests.fuzz.mutate import EDGES, mutate_bytes
from tests.videos import ENCODERS, animated, filmed, header_first, scene

from mmprep_worker.models.family import MediaLimits
from mmprep_worker.video.clip import FIRST_BOXES, open_clip

#: Of one video, so that an execution is short; in bytes, so that what was found fits on a command line.
LIMITS = MediaLimits(image_pixels=1 << 18, video_frames=16, video_seconds=60.0, audio_seconds=60.0)
LONGEST = 24_000
_HOLDERS = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"edts", b"moof", b"traf", b"mvex"})


@cache
def corpus() -> list[bytes]:
    """Return small videos of every container and codec."""
    pictures = scene(6, 64, 64)
    films = [filmed(pictures, encoder=encoder) for encoder in ENCODERS]
    films += [filmed(pictures, container=container) for container in ("mov", "matroska")]
    films += [
        filmed(pictures, options={"g": "2"}, muxer={"movflags": "frag_keyframe+empty_moov"}),
        filmed(pictures, options={"g": "2"}, rotation=90),
        header_first(filmed(pictures, encoder="mpeg4")),
    ]
    return films + [animated(pictures[:4], kind) for kind in ("GIF", "WEBP", "PNG")]


# --- what is promised -------------------------------------------------------------------------------------------------


def decode(data: bytes) -> str:
    """Decode some frames as a lane does, and compare the first with what plain FFmpeg makes of it; return the outcome."""
    clip = open_clip(data, LIMITS)
    assert clip.count >= 1
    assert 0 < clip.rate < float("inf")
    assert clip.width * clip.height <= LIMITS.image_pixels
    wanted = sorted({0, clip.count // 3, clip.count // 2, clip.count - 1})
    frames = list(clip.frames(wanted))
    assert len(frames) == len(wanted), "there are not as many frames as were asked for"
    for frame in frames:
        assert frame.shape == (clip.height, clip.width, 3), "a frame has another size than was announced"
        assert frame.dtype == np.uint8
        assert frame.flags.c_contiguous
    again = open_clip(data, LIMITS)
    assert (again.count, again.rate) == (clip.count, clip.rate), "another look counts otherwise"
    assert np.array_equal(next(iter(again.frames([0]))), frames[0]), "another look gives other pixels"
    _compare(data, frames[0])
    return f"accepted {type(clip).__name__}"


def _compare(data: bytes, first: np.ndarray) -> None:
    """Compare the first frame with what FFmpeg by itself makes of the file, where it reads it."""
    if data[:4] != b"\x1a\x45\xdf\xa3" and data[4:8] not in FIRST_BOXES:
        return
    try:
        with av.open(io.BytesIO(data)) as file:
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1  # what threads make of damaged frames differs from run to run
            pixels = next(file.decode(stream)).to_ndarray(format="rgb24", interpolation="BICUBIC")
    except (av.FFmpegError, StopIteration, ValueError, IndexError):
        return  # it guesses the kind of file, and looks at what the decoder is not shown
    assert any(np.array_equal(np.rot90(pixels, quarters), first) for quarters in range(4)), "FFmpeg shows another frame"


# --- changes ----------------------------------------------------------------------------------------------------------


def mutate(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return the video with some bytes changed, or with numbers, boxes or sizes of its container."""
    if rng.random() < 0.35:
        return mutate_bytes(rng, data, others)[:LONGEST]
    changed = data
    for _ in range(rng.choice((1, 1, 2, 4))):
        found = list(_boxes(changed, 0, len(changed))) if changed[4:8] == b"ftyp" else []
        changed = _change_box(rng, changed, rng.choice(found), others) if found else _change_header(rng, changed)
    return changed[:LONGEST]


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of the boxes of an MP4, and of those in them."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        if size < 8 or start + size > end:
            return
        yield start, start + size
        if kind in _HOLDERS:
            yield from _boxes(data, start + 8, start + size)
        start += size


def _change_box(rng: Random, data: bytes, box: tuple[int, int], others: Sequence[bytes]) -> bytes:
    start, end = box
    match rng.randrange(8):
        case 0:
            return data[:start] + data[end:]
        case 1:
            return data[:end] + data[start:end] + data[end:]
        case 2:
            return data[:start] + struct.pack(">I", rng.choice(EDGES) % (1 << 32)) + data[start + 4 :]
        case 3:
            other = rng.choice(others)
            found = list(_boxes(other, 0, len(other))) if other[4:8] == b"ftyp" else []
            taken = rng.choice(found) if found else (0, 0)
            return data[:start] + other[taken[0] : taken[1]] + data[start:]
        case _:
            return _change_number(rng, data, start + 8, min(end, start + 120))


def _change_header(rng: Random, data: bytes) -> bytes:
    """Change a number near the start, where other containers have what they say of themselves."""
    return _change_number(rng, data, 0, min(len(data), rng.choice((64, 400, len(data)))))


def _change_number(rng: Random, data: bytes, start: int, end: int) -> bytes:
    size, code = rng.choice(((1, "B"), (2, "H"), (4, "I")))
    if end - start < size:
        return data
    at = rng.randint(start, end - size)
    order = rng.choice("><")
    (value,) = struct.unpack_from(order + code, data, at)
    new = rng.choice((value + 1, value - 1, value * 2, value ^ 1 << rng.randrange(8 * size), rng.choice(EDGES)))
    return data[:at] + struct.pack(order + code, new % (1 << 8 * size)) + data[at + size :]
