"""Opening and decoding pictures: by content, never by name, and never more than the limit of pixels.

:func:`open_picture` reads headers only. :meth:`Picture.rgb` decodes to what transformers' processors see: EXIF
orientation applied, the first frame of an animation, transparency on a background colour, and the rest converted as
Pillow's ``convert("RGB")`` does, with one exception: 16-bit grey is scaled to 8 bits, where Pillow would clip it to white.

What a file claims is read by :mod:`mmprep.picture_header`, and what its structure would cost is judged by
:mod:`mmprep_worker.images.effort`, before Pillow sees it. JPEGs go through simplejpeg, whose pixels equal Pillow's; what
it refuses is decoded by Pillow, which alone decides whether a file is broken.

Not for several threads at once: Pillow's warnings and its limit of pixels are state of the process.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Final, TypeAlias

import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features

from mmprep.errors import DecodeError, MmprepError, UnsupportedMedia
from mmprep.picture_header import FORMATS as KNOWN
from mmprep.picture_header import PictureHeader, check_pixels, read_picture_header
from mmprep_worker.images.effort import check_effort, check_tiles, png_chunks

#: Raise it whenever the same file would give other pixels; it is part of every key.
DECODER_VERSION: Final = 2
#: Pillow's plug-ins that a sender may reach. Not EPS (starts Ghostscript), nor anything rare enough to be unfuzzed.
FORMATS = tuple(name for name in KNOWN if name != "AVIF" or features.check("avif"))

#: What transparency is put on: red, green and blue from 0 to 255, or nothing: the colours stay that lie beneath it.
Background: TypeAlias = tuple[int, int, int] | None
WHITE: Final = (255, 255, 255)

#: Pillow's names of the libraries whose versions may change pixels.
_LIBRARIES = ("libjpeg_turbo", "jpg", "webp", "avif", "libtiff", "littlecms2")
_STANDARD_ERROR = 2

# Pillow logs what senders write: every tag with its value at level debug, and some of what is wrong as an error.
logging.getLogger(PIL.__name__).setLevel(logging.CRITICAL)

#: Memory for a pixel, in bytes, without which libraries fail that do not say then what they lack.
_LEAST_BYTES = {"WEBP": 16, "AVIF": 8}
#: Rows that are converted at a time: bounds the memory beside Pillow's own buffer and the result.
_STRIP = 64
#: How libraries below Pillow say that they found no memory; -9 is Pillow's own number for it.
_NO_MEMORY = re.compile(r"out of memory|decoder error -9", re.IGNORECASE)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Steps down and across; orientations from 5 on are transposed first.
_FLIPS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}


def libraries() -> dict[str, str | None]:
    """Return the versions of the libraries that Pillow decodes with."""
    return {name: features.version(name) for name in _LIBRARIES}


class Picture:
    """An opened picture, not decoded yet.

    Attributes
    ----------
    width, height: in pixels, after EXIF orientation.
    mode: Pillow's name of the stored pixel format.
    format: Pillow's name of the file format.
    """

    def __init__(self, data: bytes | memoryview, image: Image.Image, orientation: int, max_pixels: int) -> None:
        self._data = data
        self._image: Image.Image | None = image
        self._orientation = orientation
        self._max_pixels = max_pixels
        self.mode = image.mode
        self.format = image.format or ""
        turned = orientation >= 5
        self.width, self.height = image.size[::-1] if turned else image.size

    def rgb(self, background: Background = WHITE) -> NDArray[np.uint8]:
        """Decode; may be called once.

        Parameters
        ----------
        background:
            What transparency is put on. White is what transformers does
            (``transformers.image_transforms.convert_to_rgb``).

        Returns
        -------
        uint8 ndarray (height, width, 3), C-contiguous

        Raises
        ------
        DecodeError
            The data is truncated or broken.
        MemoryError
            The decoder found too little memory.
        """
        pixels = self._jpeg()
        if pixels is None:
            with _limited(self._max_pixels):
                pixels = _strips(self._loaded(), background)
        self._image = None
        pixels = _upright(pixels, self._orientation)
        if pixels.shape[:2] != (self.height, self.width):
            raise DecodeError("the picture's pixels do not have the size that its header says; send it encoded anew")
        return pixels

    def _loaded(self) -> Image.Image:
        """Return the decoded image, as stored; the reference to it is given up."""
        image, self._image = self._image, None
        assert image is not None, "a picture is decoded once"
        with _silent() if image.format == "TIFF" else nullcontext():
            image.load()
        return image

    def _jpeg(self) -> NDArray[np.uint8] | None:
        """Return a JPEG's pixels by simplejpeg, ``None`` where this is none, or one for Pillow."""
        if self.format not in {"JPEG", "MPO"} or self.mode not in {"RGB", "L"}:
            return None
        try:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(self._data, "RGB", strict=True)
        except ValueError:
            return None
        return pixels


def open_picture(data: bytes | memoryview, *, max_pixels: int) -> Picture:
    """Read a picture's header.

    Parameters
    ----------
    data:
        The encoded bytes; the result keeps a reference.
    max_pixels:
        The most pixels that a picture may have, ``--max-image-pixels``.

    Raises
    ------
    UnsupportedMedia
        Empty, or none of :data:`FORMATS`.
    DecodeError
        One of them, with a broken header, or in far more parts than a picture of its size has.
    TooLarge
        More pixels than ``max_pixels``, or than a slow decoder may be given.
    MemoryError
        The decoder would find too little memory, as far as that is known before.
    """
    header = read_picture_header(data)
    if header.format not in FORMATS:
        raise UnsupportedMedia(f"this service reads no {header.format}; send one of {', '.join(FORMATS)}")
    check_pixels(header.pixels, max_pixels)
    check_effort(header, data)
    if header.format in _LEAST_BYTES:
        np.empty((header.pixels, _LEAST_BYTES[header.format]), np.uint8)  # raises MemoryError
    with _limited(max_pixels):
        image = Image.open(io.BytesIO(data), formats=(header.format,))
        _check_agreement(image, header)
        return Picture(data, image, _orientation(image, data), max_pixels)


def _check_agreement(image: ImageFile.ImageFile, header: PictureHeader) -> None:
    """Refuse a picture that is larger than what was read of it: a request would be weighed by less than it costs."""
    if image.width * image.height > header.pixels:
        raise DecodeError("the picture is broken: its header says two different sizes")
    if image.format == "TIFF":
        check_tiles((tile.extents or (0, 0, *image.size) for tile in image.tile), header.pixels)


@contextmanager
def _limited(max_pixels: int) -> Iterator[None]:
    """Run Pillow with its own limit of pixels set, its warnings silenced, and its errors turned into ours.

    The limit is a second one: :func:`open_picture` has judged the size before.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Image.DecompressionBombError as error:
            number = re.search(r"\((\d+) pixels\)", str(error))
            check_pixels(int(number[1]) if number else 2 * max_pixels + 1, max_pixels)
            raise
        except UnidentifiedImageError:
            raise DecodeError("the picture is broken or truncated: its header cannot be read") from None
        except (MmprepError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001, on broken data the plug-ins raise whatever they stumble over
            if _NO_MEMORY.search(str(error)):
                raise MemoryError from None
            raise DecodeError(f"the picture is broken or truncated: {_reason(error)}") from None


@contextmanager
def _silent() -> Iterator[None]:
    """Let nothing be written to standard error: libtiff writes a line for each row that it finds broken.

    That is the service's log. A picture of 200 kB filled it with 7 MB.
    """
    if sys.__stderr__ is None or sys.__stderr__.fileno() != _STANDARD_ERROR:  # it is closed, or something else by now
        yield
        return
    kept = os.dup(_STANDARD_ERROR)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, _STANDARD_ERROR)
        yield
    finally:
        os.dup2(kept, _STANDARD_ERROR)
        os.close(nowhere)
        os.close(kept)


def _reason(error: BaseException) -> str:
    """Return Pillow's words where they are plain text, without what could name an object or a place."""
    text = str(error)
    return text if re.fullmatch(r"[\w ,.:()'-]{4,120}", text) else "its data cannot be decoded"


def _orientation(image: Image.Image, data: bytes | memoryview) -> int:
    """Return the EXIF orientation still to be applied, 1 where there is none or it is broken."""
    if image.format == "TIFF":  # its plug-in applies the orientation, and announces the size after it
        return 1
    if image.format == "PNG" and _has_late_exif(data):
        image.load()  # which reads on behind the pixels; what it says of these must not be taken for a broken tag
    try:
        # The PNG plug-in's own method would decode every picture.
        exif = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
        value = exif.get(ExifTags.Base.Orientation, 1)
    except (MemoryError, Image.DecompressionBombError):
        raise
    except Exception:  # noqa: BLE001, as in _limited; a broken tag is none
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _has_late_exif(data: bytes | memoryview) -> bool:
    """Whether a PNG has chunks that may hold an orientation behind its pixels."""
    late = False
    for kind in png_chunks(data):
        late = late or kind == b"IDAT"
        if late and kind in {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}:
            return True
    return False


def _strips(image: Image.Image, background: Background) -> NDArray[np.uint8]:
    """Return a loaded image as RGB, converted in strips: never two whole copies beside Pillow's."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    convert = _converter(image, background)
    for top in range(0, height, _STRIP):
        strip = image.crop((0, top, width, min(top + _STRIP, height)))
        pixels[top : top + _STRIP] = convert(strip)
    return pixels


def _converter(image: Image.Image, background: Background) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """Return what makes RGB of a strip of the image, uint8 (height, width, 3 or 1)."""
    deep = image.mode.startswith("I;16")
    if background is None or not image.has_transparency_data:
        return _deep_grey if deep else _plain
    return partial(_deep_grey_on if deep else _plain_on, background=background)


def _plain(strip: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(strip.convert("RGB"))


def _plain_on(strip: Image.Image, background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return a strip with transparency on its background, each channel rounded to the nearest.

    transformers does the same in another way, ``alpha_composite``, with the same bits and in twice the time.
    """
    rgba = strip.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return np.asarray(rgba.convert("RGB"))
    below = Image.new("RGB", strip.size, background)
    below.paste(rgba, mask=alpha)
    return np.asarray(below)


def _deep_grey(strip: Image.Image) -> NDArray[np.uint8]:
    """Return 16-bit grey by its high byte, as Pillow itself takes of 16-bit colour."""
    return (np.asarray(strip).astype(np.uint16) >> 8).astype(np.uint8)[:, :, None]


def _deep_grey_on(strip: Image.Image, background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return 16-bit grey of which one value, with all its bits, is transparent."""
    transparent = np.asarray(strip).astype(np.uint16) == strip.info["transparency"]
    return np.where(transparent[:, :, None], np.array(background, np.uint8), _deep_grey(strip))


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return uint8 (h, w, 3) pixels with an EXIF orientation applied, C-contiguous."""
    if orientation not in _TURNS:
        return pixels
    whole = pixels.view("V3")[:, :, 0]  # moved as one element, a pixel costs a third
    if orientation >= 5:
        whole = whole.T
    down, across = _FLIPS[orientation]
    return np.ascontiguousarray(whole[::down, ::across]).view(np.uint8).reshape(*whole.shape, 3)
