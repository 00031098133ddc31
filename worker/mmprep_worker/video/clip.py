"""What the families see of a video, and how its kind is told by its first bytes, never by a name or a media type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmprep.errors import UnsupportedMedia
from mmprep_worker.models.family import MediaLimits
from mmprep_worker.video.animation import open_animation
from mmprep_worker.video.boxes import check_boxes
from mmprep_worker.video.film import MATROSKA, MP4, open_film
from mmprep_worker.video.segment import check_whole

#: Kinds of the first box of an MP4 or QuickTime file; all but the first are from before there was a mark.
FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"})
#: Brands of files of the same structure that hold pictures.
_PICTURE_BRANDS = frozenset(
    {b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"miaf", b"jxl "}
)
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_READ = "MP4, QuickTime, WebM, Matroska, GIF, or animated WebP or PNG"


class Clip(Protocol):
    """An opened video: its frames are counted and not decoded.

    Attributes
    ----------
    width, height: of each frame in pixels, upright.
    count: how many frames there are.
    rate: frames a second.
    """

    width: int
    height: int
    count: int
    rate: float

    def frames(self, wanted: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Decode some frames, one by one.

        Parameters
        ----------
        wanted:
            Their numbers, ascending, from 0 to less than ``count``; not empty.

        Yields
        ------
        uint8 ndarray (height, width, 3), C-contiguous
            As many as are wanted.

        Raises
        ------
        DecodeError
            The video is broken.
        TooLarge
            A frame is.
        """


def open_clip(data: bytes | memoryview, limits: MediaLimits) -> Clip:
    """Open a video of any kind.

    Parameters
    ----------
    data:
        The encoded bytes; the result keeps a reference.
    limits:
        Of one medium.

    Raises
    ------
    UnsupportedMedia
        Not a kind of video that is read.
    DecodeError
        Of a known kind, and broken.
    TooLarge
        Above one of the limits.
    """
    view = memoryview(data).cast("B")
    head = bytes(view[:16])
    if head[4:8] in FIRST_BOXES and not (head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS):
        check_boxes(view)
        return open_film(view, MP4, limits)
    if head[:4] == b"\x1a\x45\xdf\xa3":
        check_whole(view)
        return open_film(view, MATROSKA, limits)
    animation = open_animation(view, limits)
    if animation is not None:
        return animation
    if head.startswith(_PICTURES) or head[4:8] == b"ftyp" or head[8:12] == b"WEBP":
        raise UnsupportedMedia("this is a still picture and not a video; send it as image_url")
    raise UnsupportedMedia(f"not a video of a kind that is read; send {_READ}")
