"""Recordings that FFmpeg reads through PyAV: MP3, the sound of MP4 and WebM, and FLAC without a length in its header.

FFmpeg is held to one demuxer, a list of decoders, and the bytes in memory: it guesses no format, opens no other file or
address, and decodes no picture. MP3 is read here although libsndfile could: its decoder writes what it thinks of a file
to standard error, and gives up at the tags that many files end with.

No header tells exactly how many samples these decode to. What it announces is judged first, or, where it does not say,
the sum of the packets' durations, which is counted without decoding; then it is decoded, up to the same limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
import av.error
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from mmprep.errors import DecodeError, MmprepError, UnsupportedMedia
from mmprep_worker.audio.bounds import check_seconds, check_sound, reason
from mmprep_worker.audio.kinds import Kind
from mmprep_worker.audio.sndfile import BLOCK
from mmprep_worker.audio.structure import check_boxes
from mmprep_worker.memory_file import MemoryFile

_DEMUXERS = {Kind.MP3: "mp3", Kind.MP4: "mp4", Kind.WEBM: "matroska", Kind.FLAC: "flac"}
#: FFmpeg's own decoders, by its names.
CODECS = ("aac", "alac", "flac", "mp3float", "mp3", "opus", "vorbis")
#: For FFmpeg: decoders and demuxers that may be used, no protocol, and no more tracks than a film with its languages.
_OPTIONS = {
    "codec_whitelist": ",".join(CODECS),
    "format_whitelist": "mp3,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,flac",
    "protocol_whitelist": "",
    "max_streams": "64",
}
#: What whole numbers are divided by to get samples from -1 to 1.
_SCALES = {"int16": 1 << 15, "int32": 1 << 31}
#: Seconds, and the share of its length, that a recording may lack at its end; lengths are rounded, and count silence.
_LACK, _LACK_SHARE = 0.5, 0.1
#: The fewest bits that a second of MP3 takes: so short files need no counting.
_MP3_BITS = 8_000


class FfmpegRecording:
    """An opened recording; see :class:`mmprep_worker.audio.recording.Recording`."""

    def __init__(self, kind: Kind, container: InputContainer, max_seconds: float) -> None:
        stream = container.streams.audio[0]
        self.rate: int = stream.codec_context.sample_rate
        self.channels: int = stream.codec_context.channels
        self.frames: int | None = None
        self.max_frames = int(max_seconds * self.rate)
        self.announced = _announced(kind, container, stream)
        self._container = container
        self._stream = stream
        self._kind = kind

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Decode; see :meth:`mmprep_worker.audio.recording.Recording.blocks`."""
        waiting: list[NDArray[np.float32]] = []
        length = total = 0
        with self._container, _translated():
            self._stream.codec_context.thread_count = 1
            for frame in self._decoded():
                waiting.append(self._samples(frame))
                length += frame.samples
                total += frame.samples
                if length >= BLOCK:
                    yield np.concatenate(waiting)
                    waiting, length = [], 0
            self._check_end(total)
            if waiting:
                yield np.concatenate(waiting)

    def _decoded(self) -> Iterator[AudioFrame]:
        """Yield what the packets decode to. MP3 is made to be joined anywhere: what is no frame of it is passed over."""
        wrong = right = 0
        for packet in self._container.demux(self._stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                if self._kind is not Kind.MP3:
                    raise
                wrong += 1
                continue
            for frame in frames:
                assert isinstance(frame, AudioFrame)
                right += 1
                yield frame
        if wrong and not right:
            raise DecodeError("the recording is broken: none of its data can be decoded")

    def _samples(self, frame: AudioFrame) -> NDArray[np.float32]:
        """Return a frame as float32 (samples, channels)."""
        if (frame.sample_rate, frame.layout.nb_channels) != (self.rate, self.channels):
            raise DecodeError("the recording changes its rate or its channels midway; encode it anew")
        array: NDArray[Any] = frame.to_ndarray()
        samples = array.T if frame.format.is_planar else array.reshape(-1, self.channels)
        scale = _SCALES.get(array.dtype.name)
        return samples.astype(np.float32) if scale is None else samples.astype(np.float32) / np.float32(scale)

    def _check_end(self, total: int) -> None:
        if self.announced is not None and total / self.rate < self.announced * (1 - _LACK_SHARE) - _LACK:
            raise DecodeError(
                f"the recording is truncated: it ends after {total / self.rate:.1f} of {self.announced:.1f} seconds; "
                "send all of it"
            )


def open_ffmpeg(kind: Kind, data: memoryview, max_seconds: float) -> FfmpegRecording:
    """Read the header of a recording, and of its first track of sound.

    Parameters
    ----------
    kind:
        One of MP3, MP4, WebM and FLAC, from :func:`~mmprep_worker.audio.kinds.sniff`.
    data:
        The encoded bytes; the result keeps a reference.
    max_seconds:
        The longest recording, ``--max-audio-duration``.

    Raises
    ------
    UnsupportedMedia
        It holds no sound, or sound that is coded in a way that is not read, or has an odd rate.
    DecodeError
        Its header is broken.
    TooLarge
        Too many channels, or too long.
    """
    if kind is Kind.MP4:
        check_boxes(data)
    recording = FfmpegRecording(kind, _opened(kind, data), max_seconds)
    check_sound(recording.rate, recording.channels)
    if recording.announced is not None:
        check_seconds(recording.announced, max_seconds)
    elif kind is not Kind.MP3 or len(data) * 8 > max_seconds * _MP3_BITS:
        _check_packets(_opened(kind, data), max_seconds)
    return recording


def _opened(kind: Kind, data: memoryview) -> InputContainer:
    with _translated():
        container = av.open(
            MemoryFile(data),
            "r",
            format=_DEMUXERS[kind],
            options=dict(_OPTIONS),
            metadata_errors="ignore",
            buffer_size=BLOCK,
        )
        if not container.streams.audio:
            raise UnsupportedMedia(f"the {kind} holds no sound; send a recording")
        codec = container.streams.audio[0].codec_context
        if codec is None or codec.name not in CODECS:
            named = "unknown" if codec is None else codec.name
            raise UnsupportedMedia(
                f"the sound of the {kind} is coded in a way that is not read ({named}); send AAC, ALAC, Opus or MP3"
            )
        if not codec.sample_rate or not codec.channels:
            raise DecodeError(f"the {kind} does not tell the rate or the channels of its sound; encode it anew")
    return container


def _announced(kind: Kind, container: InputContainer, stream: AudioStream) -> float | None:
    """Return the seconds that a header announces. That of MP3 is a guess, and a file's may be that of its pictures."""
    if kind is Kind.MP3:
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


def _check_packets(container: InputContainer, max_seconds: float) -> None:
    """Add up the packets' durations, without decoding, until the sum is too long or they end."""
    with container, _translated():
        stream = container.streams.audio[0]
        base, total = float(stream.time_base or 0), 0
        for packet in container.demux(stream):
            total += max(0, packet.duration or 0)
            check_seconds(total * base, max_seconds)


@contextmanager
def _translated() -> Iterator[None]:
    """Turn FFmpeg's errors into ours."""
    try:
        yield
    except (MmprepError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001, on broken data PyAV raises whatever it stumbles over
        said = reason(error, getattr(error, "strerror", None))
        raise DecodeError(f"the recording is broken or truncated: {said}") from None
