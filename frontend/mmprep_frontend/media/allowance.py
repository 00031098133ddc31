"""What the media of one request may have together: encoded bytes, and pixels of pictures.

Bytes count as soon as anybody knows of them: those that the request holds before anything is fetched, those of a fetch as
its host announces them and as they arrive, those of a file before it is read. Pixels count by the picture's header, before
a lane sees it. What goes beyond is refused at once, and with it the rest of the request's fetches.

It is told from the event loop and from the threads that read files and hash.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from mmprep.errors import DecodeError, TooLarge, UnsupportedMedia
from mmprep.picture_header import check_pixels, read_picture_header

#: Told how many bytes a medium has at least; raises where that is too much.
Hold: TypeAlias = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """The limits of a service.

    Attributes
    ----------
    medium_bytes: of one medium, ``--max-media-size``.
    request_bytes: of all media of a request, ``--max-request-media-size``.
    picture_pixels: of one picture, ``--max-image-pixels``.
    request_pixels: of all pictures of a request, ``--max-request-image-pixels``.
    """

    medium_bytes: int
    request_bytes: int
    picture_pixels: int
    request_pixels: int


class Allowance:
    """What one request has of its limits, and what its media have taken."""

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._bytes: dict[int, int] = {}
        self._total = 0
        self._pixels = 0

    def hold(self, number: int, param: str | None, nbytes: int) -> None:
        """Count so many bytes for medium ``number``, in place of what counted for it before.

        Raises
        ------
        mmprep.errors.TooLarge
            All media together have more than their limit; ``param`` names this one.
        """
        with self._lock:
            self._total += nbytes - self._bytes.get(number, 0)
            self._bytes[number] = nbytes
            if self._total > self._limits.request_bytes:
                raise TooLarge(
                    f"the media of this request have more than {self._limits.request_bytes:,} bytes together, this "
                    "service's limit (--max-request-media-size); send fewer or smaller ones",
                    param=param,
                )

    def take_pixels(self, data: bytes | memoryview, param: str | None) -> int:
        """Count the pixels that a medium's header announces and return them; 0 for what is no picture, or a broken one.

        Raises
        ------
        mmprep.errors.TooLarge
            The picture, or all of them together, have more than their limit; ``param`` names this one.
        """
        try:
            pixels = read_picture_header(data).pixels
        except (DecodeError, UnsupportedMedia):
            return 0  # a lane says what is wrong with it
        check_pixels(pixels, self._limits.picture_pixels, param=param)
        with self._lock:
            self._pixels += pixels
            if self._pixels > self._limits.request_pixels:
                raise TooLarge(
                    f"the pictures of this request have more than {self._limits.request_pixels:,} pixels together, this "
                    "service's limit (--max-request-image-pixels); send fewer or smaller ones",
                    param=param,
                )
        return pixels
