"""Animated pictures (GIF, WebP, PNG) as videos, by Pillow.

How many frames there are and how long each is shown is read from the file's structure, without decoding. The frames are
composed by Pillow, one after the other up to the last that is wanted; what is transparent becomes white, as in FFmpeg.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmprep.errors import DecodeError, MmprepError, TooLarge
from mmprep_worker.models.family import MediaLimits

#: Shorter delays count as the usual one, as in browsers and FFmpeg: encoders write 0 for "as fast as you can".
_SHORTEST_MS, _USUAL_MS = 20, 100
_GIF_MARKS = (b"GIF87a", b"GIF89a")
_PNG_MARK = b"\x89PNG\r\n\x1a\n"


class _Outline(NamedTuple):
    """What an animation's structure says.

    Attributes
    ----------
    format: Pillow's name.
    width, height: of the canvas in pixels.
    delays: how long each frame is shown, in milliseconds, one by one as they are read.
    """

    format: str
    width: int
    height: int
    delays: Iterator[int]


#: Reads the structure of a file of one format.
_Reader: TypeAlias = Callable[[memoryview], _Outline]


class Animation:
    """An opened animation; see :class:`mmprep_worker.video.clip.Clip`."""

    def __init__(self, data: memoryview, outline: _Outline, delays: Sequence[int], limits: MediaLimits) -> None:
        self._data = data
        self._format = outline.format
        self._limits = limits
        self.width, self.height = outline.width, outline.height
        self.count = len(delays)
        self.rate = 1000 * len(delays) / sum(delays)

    def frames(self, wanted: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames of these numbers, which ascend; see :meth:`mmprep_worker.video.clip.Clip.frames`."""
        with _reading(self._limits):
            image = Image.open(io.BytesIO(self._data), formats=(self._format,))
            # A PNG may begin with a picture that is not of the animation, for those who can't show animations.
            first = int(bool(getattr(image, "default_image", False)))
            if getattr(image, "n_frames", 1) != self.count + first:
                raise DecodeError("the animation is broken: it does not hold the frames that it announces")
            for index in wanted:
                image.seek(index + first)
                if image.size != (self.width, self.height):  # a frame of a GIF may lie beyond its screen
                    raise DecodeError("the animation is broken: its frames change their size; encode it anew")
                yield _pixels(image)


def open_animation(data: memoryview, limits: MediaLimits) -> Animation | None:
    """Read the structure of an animated picture.

    Parameters
    ----------
    data:
        The file; the result keeps a reference.
    limits:
        Of one medium.

    Returns
    -------
    Animation or None
        ``None``: not a GIF, WebP or PNG, or a single picture.

    Raises
    ------
    DecodeError
        The structure is broken.
    TooLarge
        The canvas is too large, or the animation too long.
    """
    reader = _reader(bytes(data[:16]))
    if reader is None:
        return None
    with _reading(limits):
        outline = reader(data)
        pixels = outline.width * outline.height
        if pixels > limits.image_pixels:
            raise _too_large(f"of {pixels} pixels", limits)
        delays: list[int] = []
        duration = 0
        for delay in outline.delays:
            delays.append(_USUAL_MS if delay < _SHORTEST_MS else delay)
            duration += delays[-1]
            if duration > limits.video_seconds * 1000:
                raise TooLarge(
                    f"the animation is longer than the limit of {limits.video_seconds:g} seconds "
                    "(--max-video-duration); cut it"
                )
        return Animation(data, outline, delays, limits) if len(delays) > 1 else None


def _too_large(size: str, limits: MediaLimits) -> TooLarge:
    return TooLarge(
        f"the animation has frames {size}, above the limit of {limits.image_pixels} (--max-image-pixels); send a smaller one"
    )


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    if image.has_transparency_data:
        below = Image.new("RGBA", image.size, "white")
        return np.ascontiguousarray(Image.alpha_composite(below, image.convert("RGBA")).convert("RGB"))
    return np.ascontiguousarray(image.convert("RGB"))


@contextmanager
def _reading(limits: MediaLimits) -> Iterator[None]:
    """Run Pillow with its own limit of pixels set, its warnings silenced, and all errors turned into ours."""
    # Pillow warns above its limit, and refuses above twice that, before it takes the memory.
    Image.MAX_IMAGE_PIXELS = (limits.image_pixels + 1) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (MmprepError, MemoryError):
            raise
        except Image.DecompressionBombError:
            raise _too_large("of more pixels than its canvas", limits) from None
        except Exception:  # noqa: BLE001, on broken data the plug-ins raise whatever they stumble over
            raise DecodeError("the animation is broken or truncated: it cannot be decoded") from None


# --- structures -------------------------------------------------------------------------------------------------------


def _reader(head: bytes) -> _Reader | None:
    if head.startswith(_GIF_MARKS):
        return _gif
    if head.startswith(_PNG_MARK):
        return _png
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _webp
    return None


def _gif(data: memoryview) -> _Outline:
    """GIF89a specification, W3C."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    return _Outline("GIF", width, height, _gif_delays(data, 13 + _colours(flags)))


def _colours(flags: int) -> int:
    """Return the bytes of the colour table that ``flags`` announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _gif_delays(data: memoryview, at: int) -> Iterator[int]:
    delay = 0
    while at < len(data):
        kind = data[at]
        if kind == 0x2C:  # an image
            yield delay
            delay = 0
            at = _behind_blocks(data, at + 11 + _colours(data[at + 9]))
        elif kind == 0x21:  # an extension
            if data[at + 1] == 0xF9:
                delay = 10 * struct.unpack_from("<H", data, at + 4)[0]
            at = _behind_blocks(data, at + 2)
        else:
            return


def _behind_blocks(data: memoryview, at: int) -> int:
    """Return the place behind a list of blocks, each of which begins with its length and the last of which is empty."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


def _png(data: memoryview) -> _Outline:
    """PNG specification, third edition, W3C: ``fcTL`` chunks begin frames."""
    width, height = struct.unpack_from(">II", data, 16)
    return _Outline("PNG", width, height, _png_delays(data))


def _png_delays(data: memoryview) -> Iterator[int]:
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"fcTL":
            over, under = struct.unpack_from(">HH", data, at + 8 + 20)
            yield 1000 * over // (under or 100)
        at += 12 + length


def _webp(data: memoryview) -> _Outline:
    """WebP container specification, RFC 9649: an extended file has the canvas in ``VP8X`` and frames in ``ANMF``."""
    if bytes(data[12:16]) != b"VP8X":
        return _Outline("WEBP", 1, 1, iter(()))
    width, height = _three(data, 24) + 1, _three(data, 27) + 1
    return _Outline("WEBP", width, height, _webp_delays(data))


def _webp_delays(data: memoryview) -> Iterator[int]:
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind == b"ANMF":
            yield _three(data, at + 8 + 12)
        at += 8 + length + length % 2


def _three(data: memoryview, at: int) -> int:
    return int.from_bytes(data[at : at + 3], "little")
