"""Pictures that are almost right: changed in the terms of their formats, and what their decoder promises of them."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from random import Random

import numpy as np
from PIL import Image, ImageOps
from tests.fuzz.mutate import BYTES, EDGES, mutate_bytes
from tests.pictures import SIGNATURE, chunk, samples

from mmprep.picture_header import read_picture_header
from mmprep_worker.images.decode import open_picture

#: Of one picture, so that an execution is short; in bytes, so that what was found fits on a command line.
MAX_PIXELS = 1 << 20
LONGEST = 24_000


def corpus(*formats: str) -> list[bytes]:
    """Return the samples of these formats, of all where none is named; those with an orientation stand for each other."""
    return [
        data
        for (kind, name), data in samples().items()
        if (not formats or kind in formats)
        and len(data) < LONGEST
        and (not name.startswith("orientation") or name[-1] in "16")
    ]


# --- what is promised -------------------------------------------------------------------------------------------------


def decode(data: bytes) -> str:
    """Decode as a lane does, and compare with what plain Pillow makes of the same file; return the outcome."""
    picture = open_picture(data, max_pixels=MAX_PIXELS)
    pixels = picture.rgb()
    header = read_picture_header(data)
    assert pixels.shape == (picture.height, picture.width, 3), "the pixels are not as many as the header says"
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert len(pixels) * len(pixels[0]) <= header.pixels <= MAX_PIXELS, (
        "there are more pixels than a request is weighed by"
    )
    if not picture.mode.startswith("I;16"):
        _compare(data, pixels)
    return f"accepted {picture.format} {picture.mode}"


def _compare(data: bytes, pixels: np.ndarray) -> None:
    with warnings.catch_warnings(action="ignore"):
        try:
            plain = _on_white(_upright(Image.open(io.BytesIO(data))))
        except Exception as error:
            raise AssertionError("Pillow does not read what was accepted") from error
    assert np.array_equal(pixels, plain), "Pillow reads other pixels"


def _on_white(image: Image.Image) -> np.ndarray:
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    rgba, white = image.convert("RGBA"), Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(white)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 -- a broken orientation is none
        return image


# --- changes ----------------------------------------------------------------------------------------------------------

Part = tuple[bytes, bytes, bytes]
"""What stands before a part's content, the content, and what stands behind."""


def mutate(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return the picture with some of its parts changed, dropped, repeated, moved or taken from another, or some bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data, others)[:LONGEST]
    split, join = _grammar(data)
    parts = split(data)
    if len(parts) < 2:
        return mutate_bytes(rng, data, others)[:LONGEST]
    for _ in range(rng.choice((1, 1, 2, 4))):
        parts = _change(rng, parts, others)
    return join(parts)[:LONGEST]


def _change(rng: Random, parts: list[Part], others: Sequence[bytes]) -> list[Part]:
    changed, at = list(parts), rng.randrange(len(parts))
    before, content, after = changed[at]
    match rng.randrange(10):
        case 0 if len(parts) > 2:
            del changed[at]
        case 1:
            changed.insert(rng.randrange(len(parts) + 1), changed[at])
        case 2:
            changed[at:at] = [changed[at]] * rng.choice((2, 20, 100))
        case 3:
            other = rng.randrange(len(parts))
            changed[at], changed[other] = changed[other], changed[at]
        case 4:
            taken = rng.choice(others)
            found = _grammar(taken)[0](taken) or parts
            changed.insert(at, rng.choice(found))
        case 5:
            changed[at] = (before, content[: rng.randint(0, len(content))], after)
        case 6 if len(content) >= 4:
            changed[at] = (before, _number(rng, content), after)
        case _:
            changed[at] = (before, rng.choice(BYTES)(rng, content), after)
    return changed


def _number(rng: Random, content: bytes) -> bytes:
    """Overwrite a number near the start of a part, where its sizes and counts stand."""
    size, code = rng.choice(((1, "B"), (2, "H"), (4, "I")))
    at = rng.randrange(0, min(len(content) - size, 40) + 1)
    order = rng.choice("<>")
    (value,) = struct.unpack_from(order + code, content, at)
    new = rng.choice((value + 1, value - 1, value * 2, value ^ 1 << rng.randrange(8 * size), rng.choice(EDGES)))
    return content[:at] + struct.pack(order + code, new % (1 << 8 * size)) + content[at + size :]


def _grammar(data: bytes) -> tuple[Callable[[bytes], list[Part]], Callable[[list[Part]], bytes]]:
    """Return what takes a file of this format into parts, and what puts parts together so that their frame is right."""
    if data.startswith(SIGNATURE):
        return _chunks, _join_chunks
    if data.startswith(b"\xff\xd8"):
        return _segments, _join
    if data.startswith(b"RIFF"):
        return _riff, _join_riff
    if data[4:8] == b"ftyp":
        return _boxes, _join_boxes
    return _slices, _join


def _join(parts: list[Part]) -> bytes:
    return b"".join(b"".join(part) for part in parts)


def _chunks(data: bytes) -> list[Part]:
    """Return a PNG's chunks, those of pixels unpacked."""
    parts, at = [], 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + 8 + length]
        if kind == b"IDAT":
            try:
                parts.append((b"zDAT", zlib.decompress(content), b""))
            except zlib.error:
                parts.append((kind, content, b""))
        else:
            parts.append((kind, content, b""))
        at += length + 12
    return parts


def _join_chunks(parts: list[Part]) -> bytes:
    return SIGNATURE + b"".join(
        chunk(b"IDAT", zlib.compress(content, 1)) if kind == b"zDAT" else chunk(kind[:4].ljust(4, b"\0"), content)
        for kind, content, _ in parts
    )


def _segments(data: bytes) -> list[Part]:
    """Return a JPEG's segments; what is coded is the end of its scan's header."""
    parts: list[Part] = [(data[:2], b"", b"")]
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in {0xD9, 0xFF, 0}:
        (length,) = struct.unpack_from(">H", data, at + 2)
        end = at + 2 + length
        if data[at + 1] == 0xDA:
            while end < len(data) - 1 and not (
                data[end] == 0xFF and data[end + 1] not in {0, 0xFF, *range(0xD0, 0xD8)}
            ):
                end += 1
        parts.append((data[at : at + 4], data[at + 4 : end], b""))
        at = end
    return [*parts, (data[at:], b"", b"")]


def _riff(data: bytes) -> list[Part]:
    parts: list[Part] = []
    at = 12
    while at + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, at + 4)
        parts.append((data[at : at + 4], data[at + 8 : at + 8 + length], b""))
        at += 8 + length + length % 2
    return parts


def _join_riff(parts: list[Part]) -> bytes:
    body = b"".join(
        kind[:4].ljust(4, b"\0") + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
        for kind, content, _ in parts
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


#: Boxes that hold boxes, and how many bytes stand before these.
_HOLDERS = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0}


def _boxes(data: bytes) -> list[Part]:
    """Return the boxes of an AVIF as a flat list: each with its kind and depth, what it holds behind it."""
    return list(_flat(data, 0))


def _flat(data: bytes, depth: int) -> Iterator[Part]:
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + max(length, 8)]
        own = _HOLDERS.get(kind, len(content))
        yield kind, content[:own], bytes([depth])
        yield from _flat(content[own:], depth + 1) if kind in _HOLDERS else ()
        at += max(length, 8)


def _join_boxes(parts: list[Part]) -> bytes:
    """Put boxes together again, each with its length; offsets into the file stay as they were."""
    stack: list[tuple[int, bytes, bytes]] = []
    done = b""

    def close(depth: int) -> None:
        nonlocal done
        while stack and stack[-1][0] >= depth:
            _, kind, content = stack.pop()
            whole = struct.pack(">I4s", len(content) + 8, kind[:4].ljust(4, b"\0")) + content
            if stack:
                above = stack.pop()
                stack.append((above[0], above[1], above[2] + whole))
            else:
                done += whole

    for kind, content, marked in parts:
        depth = marked[0] if marked else 0
        close(depth)
        stack.append((depth, kind, content))
    close(0)
    return done


def _slices(data: bytes) -> list[Part]:
    """Return a file of another format in pieces: of a header's size, then of a directory's, then larger ones."""
    edges = [0, 6, 13, 14, 18, 26, 54, *range(66, min(len(data), 400), 12), *range(400, len(data), 200), len(data)]
    return [(b"", data[start:end], b"") for start, end in pairwise(edges) if start < len(data)]
