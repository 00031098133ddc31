"""Recordings that are almost right: changed in the terms of their formats, and what is promised of them.

What is run is the way of a lane: a plan, then the whole work, of a family whose window is short so that it takes
milliseconds. What is accepted is decoded once more by the libraries alone.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from random import Random
from typing import Any

import av
import av.error
import numpy as np
import soundfile
from tests.fuzz.fuzzing import outcome_of
from tests.fuzz.mutate import BYTES, EDGES, mutate_bytes
from tests.recordings import FORMATS, encoded, ogg_checksum, sound, with_ffmpeg

from mmprep.card import ItemOptions, Placeholder
from mmprep.errors import DecodeError, InvalidRequest, MmprepError
from mmprep.items import Plan, storage_dtype
from mmprep_worker.audio.kinds import Kind, sniff
from mmprep_worker.audio.logmel import LogMelSettings
from mmprep_worker.audio.recording import open_recording
from mmprep_worker.audio.waveform import waveform
from mmprep_worker.models.family import MediaLimits
from mmprep_worker.models.qwen2_audio import Qwen2AudioFamily, count_tokens

#: In bytes, so that what was found fits on a command line.
LONGEST = 24_000
MAX_SECONDS = 60.0
_RATE = 8_000
_OPTIONS = ItemOptions("float32")


@cache
def corpus() -> list[bytes]:
    """Return a short recording of each format, with one channel and with two, and videos with sound."""
    found = []
    for name, how in FORMATS.items():
        for channels in (1, 2):
            rate = (how.rates or (_RATE,))[0]
            found.append(encoded(name, sound(rate, 0.3, channels), rate))
    voice = sound(48_000, 0.2)
    found.append(with_ffmpeg(voice, 48_000, "mp4", "aac", video="mpeg4"))
    found.append(with_ffmpeg(voice, 48_000, "webm", "libopus", sample_format="flt", video="libvpx"))
    return [data for data in found if len(data) <= LONGEST]


# --- what is promised -------------------------------------------------------------------------------------------------


@cache
def _family() -> Qwen2AudioFamily:
    settings = LogMelSettings(bins=16, rate=16_000, window=400, hop=160, samples=16_000)
    limits = MediaLimits(1, 1, 1.0, MAX_SECONDS)
    return Qwen2AudioFamily(settings, Placeholder("audio", "<|AUDIO|>", 7, ""), fingerprint=b"", limits=limits)


def decode(data: bytes) -> str:
    """Plan and process as a lane does, compare both, and with what the libraries make of the bytes; return the outcome."""
    with _quiet():
        planned = _attempt(lambda: _family().plan("audio", data, _OPTIONS))
        worked = _attempt(lambda: _processed(data))
        if isinstance(worked, MmprepError):
            assert isinstance(worked, DecodeError) or type(worked) is type(planned), f"planned as {planned!r}"
            if isinstance(worked, InvalidRequest):
                return outcome_of(worked)
            raise worked
        plan, tensors = worked
        assert plan == planned, f"planned as {planned!r}"
        frames = int(tensors["feature_attention_mask"].sum())
        assert count_tokens(frames) == plan.length == tensors["audio_num_tokens"]
        assert np.isfinite(tensors["input_features"]).all()
        kind = _compare(memoryview(data))
    return f"accepted {kind} {plan.length}"


def _attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except MmprepError as error:
        return error


def _processed(data: bytes) -> tuple[Plan, dict[str, np.ndarray]]:
    prepared = _family().open("audio", data, _OPTIONS)
    tensors = {spec.name: np.full(spec.shape, 77, storage_dtype(spec.dtype)) for spec in prepared.meta.fields}
    prepared.fill(tensors)
    return prepared.meta.plan, tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """Fail where anything is written to standard error, which is the service's log."""
    said = os.memfd_create("stderr")
    kept = os.dup(2)
    os.dup2(said, 2)
    try:
        yield
        assert os.fstat(said).st_size == 0, f"said: {os.pread(said, 200, 0)!r}"
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(said)


def _compare(data: memoryview) -> str:
    """Compare all that is decoded, at its own rate, with the libraries' own reading; return the kind."""
    kind, start = sniff(data)
    recording = open_recording(data, max_seconds=MAX_SECONDS)
    try:
        heard = waveform(recording, recording.rate)
    except MmprepError:
        return f"{kind} in part"  # what the model does not hear may be broken
    plain = _by_ffmpeg(kind, data[start:]) if recording.frames is None else _by_sndfile(data[start:])
    assert np.array_equal(heard, plain[: len(heard)]), "the libraries read other samples"
    assert recording.frames is None or len(heard) == len(plain) == recording.frames
    return str(kind)


def _by_sndfile(data: memoryview) -> np.ndarray:
    samples, _ = soundfile.read(io.BytesIO(_whole_pages(bytes(data))), dtype="float32", always_2d=True)
    return _average(samples)


def _whole_pages(data: bytes) -> bytes:
    """Return an Ogg up to its last page that is all there, and anything else as it is."""
    if not data.startswith(b"OggS"):
        return data
    last = data.rindex(b"OggS")
    head = data[last : last + 27]
    lacing = data[last + 27 : last + 27 + head[-1]] if len(head) == 27 else b""
    size = 27 + len(lacing) + sum(lacing)
    whole = len(head) == 27 and len(lacing) == head[-1] and last + size <= len(data)
    return data[: last + size] if whole else data[:last]


def _by_ffmpeg(kind: Kind, data: memoryview) -> np.ndarray:
    pieces = []
    demuxer = {Kind.MP4: "mov", Kind.WEBM: "matroska"}.get(kind, kind.lower())
    with av.open(io.BytesIO(data), format=demuxer, metadata_errors="ignore") as container:
        for packet in container.demux(container.streams.audio[0]):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in frames:
                array = frame.to_ndarray()
                channels = frame.layout.nb_channels
                samples = array.T if frame.format.is_planar else array.reshape(-1, channels)
                scale = np.iinfo(array.dtype).max + 1 if array.dtype.kind == "i" else 1
                pieces.append(_average(samples.astype(np.float32) / np.float32(scale)))
    return np.concatenate([*pieces, np.empty(0, np.float32)])


def _average(samples: np.ndarray) -> np.ndarray:
    return samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]


# --- changes ----------------------------------------------------------------------------------------------------------

Part = tuple[bytes, bytes]
"""What stands before a part's content, without its length and checksum, and the content."""


def mutate(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return the recording with some of its parts changed, dropped, repeated, moved or taken from another, or some bytes."""
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
    before, content = changed[at]
    match rng.randrange(9):
        case 0 if len(parts) > 2:
            del changed[at]
        case 1:
            changed[at:at] = [changed[at]] * rng.choice((1, 2, 20, 100))
        case 2:
            other = rng.randrange(len(parts))
            changed[at], changed[other] = changed[other], changed[at]
        case 3:
            taken = rng.choice(others)
            changed.insert(at, rng.choice(_grammar(taken)[0](taken) or parts))
        case 4:
            changed[at] = (before, content[: rng.randint(0, len(content))])
        case 5 | 6 if len(content) >= 4:
            changed[at] = (before, _number(rng, content))
        case _:
            changed[at] = (before, rng.choice(BYTES)(rng, content))
    return changed


def _number(rng: Random, content: bytes) -> bytes:
    """Overwrite a number near the start of a part, where its rates and counts stand."""
    size, code = rng.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
    size, code = (size, code) if len(content) >= size else (1, "B")
    at = rng.randrange(0, min(len(content) - size, 40) + 1)
    order = rng.choice("<>")
    (value,) = struct.unpack_from(order + code, content, at)
    new = rng.choice((value + 1, value - 1, value * 2, value ^ 1 << rng.randrange(8 * size), rng.choice(EDGES)))
    return content[:at] + struct.pack(order + code, new % (1 << 8 * size)) + content[at + size :]


def _grammar(data: bytes) -> tuple[Callable[[bytes], list[Part]], Callable[[list[Part]], bytes]]:
    """Return what takes a recording of this kind into parts, and what puts parts together so that their frame is right."""
    kind, _ = sniff(memoryview(data))
    if kind is Kind.WAV:
        head = data[:4]
        return lambda whole: _chunks(whole, "<I"), lambda parts: _join_chunks(parts, "<I", head, b"WAVE")
    if kind is Kind.AIFF:
        form = data[8:12]
        return lambda whole: _chunks(whole, ">I"), lambda parts: _join_chunks(parts, ">I", b"FORM", form)
    if kind is Kind.OGG:
        return _pages, _join_pages
    if kind is Kind.FLAC:
        return _blocks, _join_blocks
    if kind is Kind.MP4:
        return _boxes, _join_boxes
    return _slices, lambda parts: b"".join(before + content for before, content in parts)


def _chunks(data: bytes, order: str) -> list[Part]:
    parts, at = [], 12
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(order, data, at + 4)
        parts.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return parts


def _join_chunks(parts: list[Part], order: str, head: bytes, form: bytes) -> bytes:
    body = b"".join(
        kind[:4].ljust(4, b"\0") + struct.pack(order, len(content)) + content + bytes(len(content) % 2)
        for kind, content in parts
    )
    return head + struct.pack(order, len(body) + 4) + form + body


def _pages(data: bytes) -> list[Part]:
    """Return an Ogg's pages: what stands before the lacing, and the lacing with what it laces."""
    starts = [at for at in range(len(data)) if data.startswith(b"OggS", at)]
    return [(data[start : start + 26], data[start + 26 : end]) for start, end in pairwise([*starts, len(data)])]


def _join_pages(parts: list[Part]) -> bytes:
    return b"".join(ogg_checksum(before[:26].ljust(26, b"\0") + content) for before, content in parts)


def _blocks(data: bytes) -> list[Part]:
    """Return a FLAC's blocks of metadata, and its frames in one piece with the rest."""
    parts, at, last = [], 4, False
    while not last and at + 4 <= len(data):
        last = bool(data[at] & 0x80)
        length = int.from_bytes(data[at + 1 : at + 4], "big")
        parts.append((bytes([data[at] & 0x7F]), data[at + 4 : at + 4 + length]))
        at += 4 + length
    return [*parts, (b"frames", data[at:])]


def _join_blocks(parts: list[Part]) -> bytes:
    blocks = [(before[:1] or b"\1", content) for before, content in parts if before != b"frames"]
    joined = b"fLaC"
    for number, (kind, content) in enumerate(blocks):
        last = 0x80 if number == len(blocks) - 1 else 0
        joined += bytes([(kind[0] & 0x7F) | last]) + len(content).to_bytes(4, "big")[1:] + content
    return joined + b"".join(content for before, content in parts if before == b"frames")


#: Boxes that hold boxes.
_HOLDERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf", b"mvex", b"dinf"}


def _boxes(data: bytes) -> list[Part]:
    """Return the boxes of an MP4 as a flat list: depth and kind before, what each holds itself behind."""
    return list(_flat(data, 0))


def _flat(data: bytes, depth: int) -> Iterator[Part]:
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + max(length, 8)]
        yield bytes([depth]) + kind, b"" if kind in _HOLDERS else content
        if kind in _HOLDERS:
            yield from _flat(content, depth + 1)
        at += max(length, 8)


def _join_boxes(parts: list[Part]) -> bytes:
    """Put boxes together again, each with its length; offsets into the file stay as they were."""
    stack: list[list[Any]] = [[-1, b"", b""]]

    def close(depth: int) -> None:
        while stack[-1][0] >= depth:
            _, kind, content = stack.pop()
            stack[-1][2] += struct.pack(">I4s", len(content) + 8, kind[:4].ljust(4, b"\0")) + content

    for before, content in parts:
        depth = before[0] if len(before) == 5 else 0
        close(depth)
        stack.append([depth, before[-4:], content])
    close(0)
    return stack[0][2]


def _slices(data: bytes) -> list[Part]:
    """Return a recording of another kind in pieces: of a header's size, then larger ones."""
    edges = [0, 4, 10, *range(22, min(len(data), 400), 12), *range(400, len(data), 200), len(data)]
    return [(b"", data[start:end]) for start, end in pairwise(sorted(set(edges))) if start < len(data)]
