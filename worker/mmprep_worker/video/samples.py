"""Small videos, made on the spot, with which a lane warms up."""

from __future__ import annotations

import io

import av
import numpy as np
from PIL import Image

_FRAMES, _WIDTH, _HEIGHT = 5, 64, 48


def videos() -> list[bytes]:
    """Return one video that FFmpeg reads and one that Pillow reads."""
    ramp = np.add.outer(np.arange(_HEIGHT), np.arange(_WIDTH))[..., None] * np.array([1, 2, 3])
    pictures = [(ramp + 20 * number).astype(np.uint8) for number in range(_FRAMES)]
    return [_mp4(pictures), _gif(pictures)]


def _mp4(pictures: list[np.ndarray]) -> bytes:
    into = io.BytesIO()
    with av.open(into, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    return into.getvalue()


def _gif(pictures: list[np.ndarray]) -> bytes:
    into = io.BytesIO()
    images = [Image.fromarray(picture) for picture in pictures]
    images[0].save(into, "GIF", save_all=True, append_images=images[1:], duration=100)
    return into.getvalue()
