"""Videos in MP4 and Matroska containers, by FFmpeg through PyAV, out of memory alone.

What FFmpeg may do is narrowed before it sees a byte: one demuxer, chosen by content; the decoders of :data:`DECODERS`; no
other file or address, whatever the video says; one thread; frames of so many pixels. Of the streams only the first video
is demuxed.

A video is opened by reading all its packets, which :class:`.timeline.Timeline` turns into a number of frames and a rate,
and by decoding the first frame, which says how large the frames are and how they are turned: of the header nothing is
believed. Later only what the wanted frames need is decoded, from the last key packet before each.

WARNING: a frame is what one packet shows. Where the decoder gives none for a packet (it hides it, or begins later), the
next one that it gives stands for it, at the end the last. So the number of frames does not depend on decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from mmprep.errors import DecodeError, MmprepError, TooLarge, UnsupportedMedia
from mmprep_worker.memory_file import MemoryFile
from mmprep_worker.models.family import MediaLimits
from mmprep_worker.video.timeline import Schedule, Timeline

MP4 = "mov"
MATROSKA = "matroska"
#: FFmpeg's names of the decoders that a sender may reach: those of today's videos, all of them fuzzed for years. MPEG-4
#: Part 2 is what OpenCV's ``mp4v`` writes. Nothing that opens files, and no picture formats: pictures go to Pillow.
DECODERS = {"h264": "H.264", "hevc": "HEVC", "vp8": "VP8", "vp9": "VP9", "libdav1d": "AV1", "mpeg4": "MPEG-4"}

#: FFmpeg counts a frame's width in blocks of 64 pixels where it applies its own limit, and heights end at 65,536.
_ROUNDING = 64 * 65_536
#: Bytes that FFmpeg asks for at a time.
_PIECE = 256 * 1024
#: The part of the wanted frames that others may stand for.
_MISSING = 0.5


class Film:
    """An opened video; see :class:`mmprep_worker.video.clip.Clip`."""

    def __init__(
        self, data: memoryview, demuxer: str, schedule: Schedule, size: tuple[int, int], limits: MediaLimits
    ) -> None:
        self._data = data
        self._demuxer = demuxer
        self._schedule = schedule
        self._limits = limits
        self.width, self.height = size
        self.count = len(schedule.times)
        self.rate = schedule.rate

    def frames(self, wanted: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames of these numbers, which ascend; see :meth:`mmprep_worker.video.clip.Clip.frames`."""
        times = [self._schedule.times[index] for index in wanted]
        missing = 0
        with _reading(), _opened(self._data, self._demuxer, self._limits) as video:
            for time, frame in self._reached(video, times):
                missing += frame.pts != time
                if missing > _MISSING * len(times):
                    raise DecodeError("the video is broken: most of the frames that it announces cannot be decoded")
                yield self._pixels(frame)

    def _reached(self, video: _Video, times: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield each time with the first decoded frame that is shown then or later, at the end with the last."""
        waiting = deque(times)
        last: av.VideoFrame | None = None
        for frame in self._decoded(video, waiting):
            last = frame
            while waiting and frame.pts is not None and frame.pts >= waiting[0]:
                yield waiting.popleft(), frame
            if not waiting:
                return
        if last is None:
            raise DecodeError("the video is broken: no frame of it can be decoded")
        for time in waiting:
            yield time, last

    def _decoded(self, video: _Video, waiting: deque[int]) -> Iterator[av.VideoFrame]:
        """Yield frames as they are decoded; what is not needed for the times that wait is left out."""
        for number, packet in enumerate(video.packets()):
            start = self._schedule.start(waiting[0])
            if number < start.packet:
                continue
            for frame in video.decode(packet, start.time):
                yield frame
                if self._schedule.start(waiting[0]).packet > number:
                    video.forget()
                    break
        yield from video.decode(None, self._schedule.start(waiting[0]).time)

    def _pixels(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        if _upright_size(frame) != (self.width, self.height):
            raise DecodeError("the video's frames change their size; send one of a single size")
        # Bicubic is how OpenCV, with which vLLM reads, brings colours to full resolution where that needs more than
        # copying; with other flags odd sizes would come out otherwise.
        pixels: Any = frame.to_ndarray(format="rgb24", interpolation="BICUBIC", threads=1)
        return np.ascontiguousarray(np.rot90(pixels, _quarters(frame)))


def open_film(data: memoryview, demuxer: str, limits: MediaLimits) -> Film:
    """Read a video's packets and decode its first frame.

    Parameters
    ----------
    data:
        The file; the result keeps a reference.
    demuxer:
        :data:`MP4` or :data:`MATROSKA`.
    limits:
        Of one medium.

    Raises
    ------
    UnsupportedMedia
        There is no video in the file, or none that :data:`DECODERS` read.
    DecodeError
        The video is broken or has no frames.
    TooLarge
        Its frames are too large, or it is too long.
    """
    with _reading(), _opened(data, demuxer, limits) as video:
        timeline = Timeline(video.tick, limits.video_seconds)
        first: av.VideoFrame | None = None
        for packet in video.packets():
            timeline.note(
                video.time(packet), duration=packet.duration or 0, key=packet.is_keyframe, shown=video.shows(packet)
            )
            if first is None:
                first = next(video.decode(packet), None)
        first = first or next(video.decode(None), None)
        schedule = timeline.close(video.told_rates)
        if first is None:
            raise DecodeError("the video is broken: no frame of it can be decoded")
        return Film(data, demuxer, schedule, _upright_size(first), limits)


class _Video:
    """The video stream of an open container, and its decoder."""

    def __init__(self, container: Any, limits: MediaLimits) -> None:
        attached = av.stream.Disposition.attached_pic
        stream = next((s for s in container.streams.video if not s.disposition & attached), None)
        if stream is None:
            raise UnsupportedMedia("the file holds no video; send sound as audio and pictures as images")
        codec = stream.codec_context
        if codec is None or codec.name not in DECODERS:
            named = "of an unknown kind" if codec is None else f"encoded as {codec.name}"
            raise UnsupportedMedia(f"the video is {named}; send one of {', '.join(DECODERS.values())}")
        self._container = container
        self._stream = stream
        self._codec = codec
        self._most_pixels = limits.image_pixels
        self._check_size(codec.width, codec.height)
        codec.thread_count = 1
        codec.options = _decoder_options(limits)
        for other in container.streams:
            if other is not stream:
                other.discard = "all"
        if not stream.time_base:
            raise DecodeError("the video is broken: it has no unit of time")
        self.tick = stream.time_base
        #: Frames a second as the header tells, the one first that OpenCV reports, with which vLLM reads.
        self.told_rates = (stream.guessed_rate, stream.average_rate)

    def packets(self) -> Iterator[Any]:
        """Yield the packets in the order in which they are decoded; empty ones are left out, they would end decoding."""
        for packet in self._container.demux(self._stream):
            if packet.is_corrupt:
                raise DecodeError("the video is truncated")
            if packet.size:
                yield packet

    def time(self, packet: Any) -> int:
        """Return when the packet's frame is shown, in ticks."""
        time: int | None = packet.dts if packet.pts is None else packet.pts
        if time is None:
            raise DecodeError("the video is broken: a frame has no time")
        return time

    def shows(self, packet: Any) -> bool:
        """Whether a packet's frame is shown, as far as the packet says: others only help to decode, or were cut off."""
        if packet.is_discard:
            return False
        first = memoryview(packet)[0]
        if self._codec.name == "vp8":  # RFC 6386, 9.1
            return bool(first & 0x10)
        return True

    def decode(self, packet: Any, whole_from: int | None = None) -> Iterator[av.VideoFrame]:
        """Decode a packet, or with ``None`` what the decoder still holds; yield its frames, each of a bounded size.

        Parameters
        ----------
        whole_from:
            When the first frame is shown that needs nothing from before the beginning. Where the decoder makes up parts
            of a frame from then on, the video is broken; ``None``: from the beginning.
        """
        try:
            frames = self._codec.decode(packet)
        except MemoryError:
            raise
        except FFmpegError:
            self._check_size(self._codec.width, self._codec.height)
            if not self._codec.width:  # as FFmpeg leaves it where its own limit was passed
                self._refuse_size("no size, or one")
            raise
        for frame in frames:
            self._check_size(frame.width, frame.height)
            if frame.is_corrupt and (whole_from is None or frame.pts is None or frame.pts >= whole_from):
                raise DecodeError("the video is broken: parts of its frames are missing")
            yield frame

    def forget(self) -> None:
        """Let the decoder begin anew, with a key packet."""
        self._codec.flush_buffers()

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._most_pixels:
            self._refuse_size(f"frames of {width} by {height} pixels,")

    def _refuse_size(self, what: str) -> NoReturn:
        raise TooLarge(
            f"the video has {what} above the limit of {self._most_pixels} pixels a frame (--max-image-pixels); "
            "send a smaller one"
        )


@contextmanager
def _opened(data: memoryview, demuxer: str, limits: MediaLimits) -> Iterator[_Video]:
    options = {
        "protocol_whitelist": "none",
        "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm",
        "max_streams": "64",
        "codec_whitelist": ",".join(DECODERS),
        "enable_drefs": "0",
        "use_absolute_path": "0",
        "ignore_chapters": "1",
        **_decoder_options(limits),
    }
    container = av.open(
        MemoryFile(data),
        format=demuxer,
        options=options,
        metadata_errors="replace",
        buffer_size=_PIECE,
        io_open=_open_nothing,
    )
    with container:
        yield _Video(container, limits)


def _decoder_options(limits: MediaLimits) -> dict[str, str]:
    """Return options that also hold while FFmpeg looks into the streams by itself, on opening."""
    return {"threads": "1", "max_pixels": str(limits.image_pixels + _ROUNDING)}


def _open_nothing(url: str, flags: int, options: dict[str, str]) -> NoReturn:  # noqa: ARG001, PyAV's signature
    raise PermissionError("a video may not lead to another file")


@contextmanager
def _reading() -> Iterator[None]:
    """Turn FFmpeg's and PyAV's errors into ours."""
    try:
        yield
    except (MmprepError, MemoryError):
        raise
    except Exception:  # noqa: BLE001, on broken data PyAV raises what it stumbles over; FFmpeg's words say little
        raise DecodeError("the video is broken or truncated: it cannot be decoded") from None


def _quarters(frame: av.VideoFrame) -> int:
    """Return by how many quarters of a circle a frame is to be turned to the left; other angles are not followed."""
    quarters, rest = divmod(frame.rotation, 90)
    return 0 if rest else quarters % 4


def _upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    turned = _quarters(frame) % 2
    return (frame.height, frame.width) if turned else (frame.width, frame.height)
