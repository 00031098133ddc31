"""Generated pictures: smooth structures and noise, as JPEGs of the sizes in bytes that photographs have.

Decoding costs what the coded bits cost, so the noise is chosen for each size such that the file has the bytes of a
typical photograph of that size at quality 90. The same seed gives the same picture.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

_QUALITY = 90
#: The smooth structures are random colours on a grid of this many points across and down, interpolated.
_GRID = (16, 12)
_START_OF_IMAGE = b"\xff\xd8"
_COMMENT = b"\xff\xfe"


class Size(NamedTuple):
    """A picture's size in pixels, and the standard deviation of its noise in steps of 255."""

    width: int
    height: int
    noise: float

    @property
    def name(self) -> str:
        """As ``640x480``."""
        return f"{self.width}x{self.height}"


#: Their files have about 118 kB, 271 kB, 509 kB and 2.2 MB.
VGA = Size(640, 480, 8.5)
HD = Size(1280, 720, 5.68)
FULL_HD = Size(1920, 1080, 4.6)
TWELVE_MEGAPIXELS = Size(4032, 3024, 3.34)


def jpeg(size: Size, seed: int = 0) -> bytes:
    """Return one picture as an encoded JPEG."""
    random = np.random.default_rng([seed, size.width, size.height])
    colours = random.integers(30, 226, (_GRID[1], _GRID[0], 3), dtype=np.uint8)
    smooth = Image.fromarray(colours).resize((size.width, size.height), Image.Resampling.BICUBIC)
    noise = random.standard_normal((size.height, size.width, 1), dtype=np.float32)
    noise *= size.noise
    pixels = np.asarray(smooth) + noise
    encoded = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=_QUALITY)
    return encoded.getvalue()


def distinct(picture: bytes, number: int) -> bytes:
    """Return the same picture with other bytes: a comment segment that holds ``number``; decoding costs the same."""
    text = b"%020d" % number
    return b"".join((_START_OF_IMAGE, _COMMENT, (len(text) + 2).to_bytes(2, "big"), text, picture[2:]))
