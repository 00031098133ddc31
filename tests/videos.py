"""Small videos for tests, made on the spot by FFmpeg's encoders, and what FFmpeg makes of them when all is decoded.

Import as ``from tests.videos import filmed``.
"""

import contextlib
import io
import os
import struct
from fractions import Fraction

import av
import numpy as np
from PIL import Image

os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder would write to standard error

#: Encoders that PyAV's wheels hold, with the container that each is tried in.
ENCODERS = {
    "mpeg4": "mp4",
    "libx264": "mp4",
    "libx265": "mp4",
    "libvpx": "webm",
    "libvpx-vp9": "webm",
    "libsvtav1": "mp4",
}
_QUIET = {"libx265": {"x265-params": "log-level=none"}}


@contextlib.contextmanager
def _own_priority():
    """Take back what the AV1 encoder does where it may: it puts the thread that calls it before all others of the machine,
    for good, and whatever that thread starts."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def scene(frames, width=96, height=64):
    """Return so many RGB pictures, each of which can be told from the others: a gradient that shifts, and a red block."""
    y, x = np.mgrid[:height, :width]
    pictures = []
    for i in range(frames):
        picture = np.stack([(2 * x + 8 * i) % 256, (3 * y + 5 * i) % 256, (x + y + 11 * i) % 256], 2).astype(np.uint8)
        left = 4 * i % max(1, width - 16)
        picture[height // 4 : height // 2, left : left + 16] = (255, 0, 0)
        pictures.append(picture)
    return pictures


def filmed(
    frames,
    *,
    encoder="libx264",
    container=None,
    rate=30,
    options=None,
    muxer=None,
    pixels="yuv420p",
    rotation=None,
    times=None,
):
    """Return ``frames`` as a video file.

    Parameters
    ----------
    frames:
        Pictures, or how many.
    container:
        FFmpeg's name; the encoder's usual one by default.
    rate:
        Frames a second.
    options, muxer:
        Options of the encoder, and of the container.
    rotation:
        Degrees by which players are told to turn the frames to the left.
    times:
        When each is shown, in milliseconds, in place of ``rate``.
    """
    pictures = scene(frames) if isinstance(frames, int) else frames
    into = io.BytesIO()
    with _own_priority(), av.open(into, "w", format=container or ENCODERS[encoder], options=muxer or {}) as file:
        stream = file.add_stream(encoder, rate=rate, options={**_QUIET.get(encoder, {}), **(options or {})})
        stream.height, stream.width = pictures[0].shape[:2]
        assert encoder != "libx265" or min(stream.height, stream.width) >= 64, "x265 crashes on smaller pictures"
        stream.pix_fmt = pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return into.getvalue()


def repeated(data, times):
    """Return a video that shows what ``data`` does, over and over; decoding can begin only at its first frame."""
    into = io.BytesIO()
    with av.open(into, "w", format="mp4") as file:
        out, shift = None, 0
        for number in range(times):
            with av.open(io.BytesIO(data)) as source:
                stream = source.streams.video[0]
                out = out or file.add_stream_from_template(stream)
                for packet in source.demux(stream):
                    if packet.size:
                        packet.stream = out
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.is_keyframe = packet.is_keyframe and number == 0
                        file.mux(packet)
                shift += stream.duration
    return into.getvalue()


def recorded(seconds=1, container="mp4", codec="aac"):
    """Return a file with sound and no video."""
    into = io.BytesIO()
    with av.open(into, "w", format=container) as file:
        stream = file.add_stream(codec, rate=48_000, layout="mono")
        samples = (np.sin(np.arange(48_000 * seconds) / 30) * 8000).astype(np.int16)
        for start in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="s16", layout="mono")
            frame.rate, frame.pts = 48_000, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return into.getvalue()


def animated(frames, kind="GIF", durations=100, **options):
    """Return ``frames`` (pictures, or how many) as an animated picture; durations in milliseconds."""
    images = [Image.fromarray(picture) for picture in (scene(frames) if isinstance(frames, int) else frames)]
    into = io.BytesIO()
    if kind == "WEBP":
        options = {"lossless": True, **options}
    images[0].save(into, kind, save_all=True, append_images=images[1:], duration=durations, **options)
    return into.getvalue()


def decoded(data):
    """Return all frames of a video as FFmpeg gives them, RGB, not turned: every packet is decoded, in order."""
    with av.open(io.BytesIO(data)) as file:
        frames = list(file.decode(video=0))
    return [frame.to_ndarray(format="rgb24", interpolation="BICUBIC") for frame in frames]


def boxes(data, start=0, end=None):
    """Return the boxes of an MP4 file, or of the content of one, as ``(kind, start, end)``."""
    found, at = [], start
    end = len(data) if end is None else end
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        found.append((kind, at, at + size))
        at += size
    return found


def header_first(data):
    """Return an MP4 file with its header before its frames, as for the web."""
    parts = {kind: bytearray(data[start:end]) for kind, start, end in boxes(data)}
    header, at = parts.pop(b"moov"), 0
    while (at := header.find(b"stco", at + 1)) > 0:
        count = struct.unpack_from(">I", header, at + 8)[0]
        for entry in range(at + 12, at + 12 + 4 * count, 4):
            struct.pack_into(">I", header, entry, struct.unpack_from(">I", header, entry)[0] + len(header))
    first = parts.pop(b"ftyp")
    return bytes(first + header + b"".join(parts.values()))


def edited(data, kind, offset, value, layout=">I"):
    """Return an MP4 file with a value in every box of one kind replaced; ``offset`` is behind the box's head."""
    changed, at = bytearray(data), 0
    while (at := changed.find(kind, at + 1)) > 0:
        struct.pack_into(layout, changed, at + 4 + offset, value)
    return bytes(changed)
