"""Opening and decoding pictures: by content, never by name, and never more than the limit of pixels.

:func:`open_picture` reads headers only. :meth:`Picture.rgb` decodes to what transformers' processors see: EXIF
orientation applied, the first frame of an animation, converted as Pillow's ``convert("RGB")`` does, with one exception:
16-bit grey is scaled to 8 bits, where Pillow would clip it to white.

JPEGs go through simplejpeg, whose pixels equal Pillow's; what it refuses is decoded by Pillow, which alone decides
whether a file is broken.

Not for several threads at once: Pillow's warnings and its limit of pixels are state of the process.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError, features

from mmprep.errors import DecodeError, MmprepError, TooLarge, UnsupportedMedia

#: Pillow's plug-ins that a sender may reach. Not EPS (starts Ghostscript), nor anything rare enough to be unfuzzed.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))

#: Rows that are converted at a time: bounds the memory beside Pillow's own buffer and the result.
_STRIP = 64
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

    def rgb(self) -> NDArray[np.uint8]:
        """Decode; may be called once.

        Returns
        -------
        uint8 ndarray (height, width, 3), C-contiguous

        Raises
        ------
        DecodeError
            The data is truncated or broken.
        """
        pixels = self._jpeg()
        if pixels is None:
            with _limited(self._max_pixels):
                pixels = _strips(self._loaded())
        self._image = None
        pixels = _upright(pixels, self._orientation)
        if pixels.shape[:2] != (self.height, self.width):
            raise DecodeError("the picture's pixels do not have the size that its header says; send it encoded anew")
        return pixels

    def pil(self) -> Image.Image:
        """Decode like :meth:`rgb`, to a Pillow image of the stored mode; 16-bit grey becomes ``L``.

        Raises
        ------
        DecodeError
            The data is truncated or broken.
        """
        with _limited(self._max_pixels):
            image = self._loaded()
            if _is_deep_grey(image):
                image = Image.fromarray(_scaled(image))
            turn = _TURNS.get(self._orientation)
            return image if turn is None else image.transpose(turn)

    def _loaded(self) -> Image.Image:
        """Return the decoded image, as stored; the reference to it is given up."""
        image, self._image = self._image, None
        assert image is not None, "a picture is decoded once"
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
        One of them, with a broken header.
    TooLarge
        More pixels than ``max_pixels``.
    """
    if not len(data):
        raise UnsupportedMedia(f"the picture is empty; send one of {', '.join(FORMATS)}")
    with _limited(max_pixels):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.size[0] * image.size[1], max_pixels)
        if min(image.size) < 1:
            raise DecodeError("the picture has no pixels")
        return Picture(data, image, _orientation(image, data), max_pixels)


def _check_size(pixels: int, max_pixels: int) -> None:
    if pixels > max_pixels:
        raise TooLarge(
            f"the picture has {pixels} pixels, above the limit of {max_pixels} (--max-image-pixels); send a smaller one"
        )


@contextmanager
def _limited(max_pixels: int) -> Iterator[None]:
    """Run Pillow with its own limit of pixels set, its warnings silenced, and its errors turned into ours.

    The limit matters although :func:`open_picture` checks sizes itself: some plug-ins allocate while they open.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Image.DecompressionBombError as error:
            number = re.search(r"\((\d+) pixels\)", str(error))
            _check_size(int(number[1]) if number else 2 * max_pixels + 1, max_pixels)
            raise
        except UnidentifiedImageError:
            raise UnsupportedMedia(f"not a picture of a kind that is read; send one of {', '.join(FORMATS)}") from None
        except (MmprepError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001, on broken data the plug-ins raise whatever they stumble over
            raise DecodeError(f"the picture is broken or truncated: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """Return Pillow's words where they are plain text, without what could name an object or a place."""
    text = str(error)
    return text if re.fullmatch(r"[\w ,.:()'-]{4,120}", text) else "its data cannot be decoded"


def _orientation(image: Image.Image, data: bytes | memoryview) -> int:
    """Return the EXIF orientation still to be applied, 1 where there is none or it is broken."""
    if image.format == "TIFF":  # its plug-in applies the orientation, and announces the size after it
        return 1
    try:
        # The PNG plug-in's own method would decode the picture to look for chunks after the pixels.
        plain = image.format == "PNG" and not _has_late_exif(data)
        exif = Image.Image.getexif(image) if plain else image.getexif()
        value = exif.get(ExifTags.Base.Orientation, 1)
    except (MemoryError, Image.DecompressionBombError):
        raise
    except Exception:  # noqa: BLE001, as in _limited; a broken tag is none
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _has_late_exif(data: bytes | memoryview) -> bool:
    """Whether a PNG has chunks that may hold an orientation behind its pixels."""
    position, late = 8, False
    view = memoryview(data)
    while position + 8 <= len(view):
        length, kind = struct.unpack_from(">I4s", view, position)
        if kind == b"IDAT":
            late = True
        elif late and kind in {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}:
            return True
        position += length + 12
    return False


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _scaled(image: Image.Image) -> NDArray[np.uint8]:
    """Return 16-bit grey as uint8 (height, width): the high byte, as Pillow itself takes of 16-bit colour."""
    return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)


def _strips(image: Image.Image) -> NDArray[np.uint8]:
    """Return a loaded image as RGB, converted in strips: never two whole copies beside Pillow's."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    deep = _is_deep_grey(image)
    for top in range(0, height, _STRIP):
        strip = image.crop((0, top, width, min(top + _STRIP, height)))
        into = pixels[top : top + _STRIP]
        if deep:
            into[:] = _scaled(strip)[:, :, None]
        else:
            into[:] = np.asarray(strip.convert("RGB"))
    return pixels


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return uint8 (h, w, 3) pixels with an EXIF orientation applied, C-contiguous."""
    if orientation not in _TURNS:
        return pixels
    whole = pixels.view("V3")[:, :, 0]  # moved as one element, a pixel costs a third
    if orientation >= 5:
        whole = whole.T
    down, across = _FLIPS[orientation]
    return np.ascontiguousarray(whole[::down, ::across]).view(np.uint8).reshape(*whole.shape, 3)
