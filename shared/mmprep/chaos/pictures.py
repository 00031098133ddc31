"""Pictures whose tensors are known without the service: each is a pattern that its number alone determines.

Every pixel depends on the number, so a page of another picture, or of none, differs in nearly all of its bytes. Sides are
multiples of 28 and the pixels are within Qwen2-VL's limits, so that nothing is resized and uint8 patches are the pattern
in another order.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: Pixels on the side of a patch, and patches on the side of a group: one token stands for a group.
_PATCH = 14
_MERGE = 2
_GROUP = _PATCH * _MERGE
_TIMES = 2

#: Numbers below this are the pictures that are asked for again and again; the others are asked for once.
REUSED = 96
#: One in so many others is a large one.
_LARGE_ONE_IN = 16
#: Groups down and across of a large one: 1,003,520 pixels, the most that is not shrunk, and 6.02 MB of patches.
_LARGE = (32, 40)
_SMALLEST, _BIGGEST = 3, 13


class Picture(NamedTuple):
    """One picture of the family.

    Attributes
    ----------
    number: not negative; determines everything.
    down, across: groups of patches; a picture's tokens are their product.
    """

    number: int
    down: int
    across: int

    @property
    def tokens(self) -> int:
        """How many ids stand for the picture in a prompt."""
        return self.down * self.across


def picture(number: int) -> Picture:
    """Return the picture of that number."""
    if number >= REUSED and number % _LARGE_ONE_IN == 0:
        return Picture(number, *_LARGE)
    down, across = np.random.default_rng(number).integers(_SMALLEST, _BIGGEST + 1, 2)
    return Picture(number, int(down), int(across))


def pixels(which: Picture) -> NDArray[Any]:
    """Return its pixels, shape (height, width, 3)."""
    random = np.random.default_rng([which.number, 1])
    rows = random.integers(0, 256, (which.down * _GROUP, 1, 3), np.uint8)
    columns = random.integers(0, 256, (1, which.across * _GROUP, 3), np.uint8)
    crossed: NDArray[Any] = rows ^ columns
    return crossed


def png(which: Picture) -> bytes:
    """Return its encoded bytes."""
    encoded = io.BytesIO()
    Image.fromarray(pixels(which)).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def broken_png(which: Picture) -> bytes:
    """Return the first half of its bytes: a header, and pixels that end too early."""
    encoded = png(which)
    return encoded[: len(encoded) // 2]


@functools.lru_cache(maxsize=24)
def patches(which: Picture) -> NDArray[Any]:
    """Return what Qwen2-VL's ``pixel_values`` hold as uint8, shape (patches, 1176).

    Groups of patches lie row by row, patches in a group too; a patch is channel, time, row, column, and the time axis
    repeats the picture (transformers' ``Qwen2VLImageProcessor._preprocess``).
    """
    split = pixels(which).reshape(which.down, _MERGE, _PATCH, which.across, _MERGE, _PATCH, 3)
    ordered = split.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    repeated = np.repeat(ordered, _TIMES, axis=5)
    return repeated.reshape(which.tokens * _MERGE**2, 3 * _TIMES * _PATCH**2)


def wrong_bytes(which: Picture, fields: Mapping[str, NDArray[Any]]) -> int:
    """Return how many bytes of an item's tensors are not those of the picture; a wrong shape or dtype counts whole."""
    expected: dict[str, NDArray[Any]] = {
        "pixel_values": patches(which),
        "image_grid_thw": np.array([1, which.down * _MERGE, which.across * _MERGE], np.int64),
    }
    wrong = sum(array.nbytes for name, array in fields.items() if name not in expected)
    for name, array in expected.items():
        found = fields.get(name)
        if found is None or found.dtype != array.dtype or found.shape != array.shape:
            wrong += array.nbytes
        elif not np.array_equal(found, array):
            # Counted in a copy: what is looked at may be changing.
            wrong += max(1, int(np.count_nonzero(np.array(found).view(np.uint8) != array.view(np.uint8))))
    return wrong
