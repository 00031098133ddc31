"""Small files that mean to take much: each ends in an error of ours, in a process with little memory, which lives on."""

import io

import numpy as np
import pytest
from PIL import Image
from tests.bombs import (
    HUGE,
    avif_of,
    frames,
    jpeg_of,
    packed_zeros,
    png_of_zeros,
    same_tags,
    tiff_of,
    tiled,
    webp_canvas,
)
from tests.fuzz.child import Child
from tests.pictures import avif_grid, bmp, box, chunk, drawn, encoded, gif_of_a_frame, png, samples

from mmprep_worker.images.decode import open_picture

#: Of one picture: as the service's default.
MAX_PIXELS = 178_956_970
#: A twelfth of what a lane has: too little for the largest pictures that are allowed, enough for those of 12 megapixels.
MEMORY = 320 << 20
#: Within the limit of pixels, and beyond this memory.
SIDE = 13_000


def decode(data):
    """Decode in the child; return the outcome."""
    picture = open_picture(data, max_pixels=MAX_PIXELS)
    return f"accepted {picture.width} by {picture.height}, {picture.rgb()[0, 0].tolist()}"


@pytest.fixture(scope="module")
def child():
    running = Child("tests.integration.test_bombs:decode", MEMORY)
    assert running.run(samples()["PNG", "RGBA"]).startswith("accepted")
    yield running
    running.close()


BOMBS = {
    "PNG of zeros within the limit": (lambda: png_of_zeros(SIDE), "MemoryError"),
    "PNG of zeros beyond it": (lambda: png_of_zeros(20_000), "TooLarge: the picture has # pixels, above"),
    "PNG with a profile of zeros": (
        lambda: png_of_zeros(16, before=chunk(b"iCCP", b"a\0\0" + packed_zeros(200 << 20))),
        "DecodeError",
    ),
    "PNG with packed text": (
        lambda: png_of_zeros(16, before=chunk(b"zTXt", b"a\0\0" + packed_zeros(200 << 20))),
        "DecodeError",
    ),
    "PNG with much packed text": (
        lambda: png_of_zeros(16, before=chunk(b"zTXt", b"a\0\0" + packed_zeros(1 << 20)) * 900),
        "DecodeError",
    ),
    "PNG with packed text behind": (
        lambda: png(np.zeros((9, 9, 3)), 2, after=chunk(b"iTXt", b"a\0\1\0\0\0" + packed_zeros(200 << 20))),
        "DecodeError",
    ),
    "JPEG within the limit": (lambda: jpeg_of(SIDE), "MemoryError"),
    "JPEG beyond it": (lambda: jpeg_of(HUGE), "TooLarge"),
    "GIF with a huge screen": (lambda: gif_of_a_frame((HUGE, HUGE), (0, 0, 9, 9)), "TooLarge"),
    "GIF with a large screen": (lambda: gif_of_a_frame((30_000, 5000), (0, 0, 9, 9)), "MemoryError"),
    "GIF with a huge frame": (
        lambda: gif_of_a_frame((9, 9), (60_000, 60_000, 9, 9)),
        "TooLarge",
    ),
    "GIF with thousands of frames": (lambda: frames(3000), "accepted"),
    "WebP with a huge canvas": (lambda: webp_canvas(1 << 24), "TooLarge"),
    "WebP with a large canvas": (lambda: webp_canvas(SIDE), "MemoryError"),
    "AVIF with a huge extent": (lambda: avif_of((HUGE, HUGE)), "TooLarge"),
    "AVIF with a large extent": (lambda: avif_of((SIDE, SIDE)), ("MemoryError", "DecodeError")),
    "AVIF grid beyond the limit": (
        lambda: avif_grid(encoded(drawn(64, 64), "AVIF", subsampling="4:4:4"), 64, 250, 250, (16_000, 16_000)),
        "TooLarge",
    ),
    "AVIF grid within it": (
        lambda: avif_grid(encoded(drawn(64, 64), "AVIF", subsampling="4:4:4"), 64, 200, 200, (12_800, 12_800)),
        "DecodeError: the picture has more than # parts",
    ),
    "AVIF of boxes in boxes": (
        lambda: box(b"ftyp", b"avif", bytes(4)) + box(b"meta", bytes(4), *[box(b"iprp", box(b"ipco"))] * 100_000),
        "DecodeError: the picture has too many parts",
    ),
    "BMP beyond the limit": (lambda: bmp(24, b"", size=(HUGE, HUGE)), "TooLarge"),
    "BMP within it": (lambda: bmp(24, b"", size=(SIDE, SIDE)), "MemoryError"),
    "BMP with a negative height": (lambda: bmp(24, b"", size=(3, 0x7FFF_FFFF), top_down=True), "TooLarge"),
    "BMP with run lengths": (
        lambda: bmp(8, b"\0\0" * SIDE + b"\0\1", size=(SIDE, SIDE), compression=1, palette=bytes(64)),
        "TooLarge: the picture has # pixels, and a BMP with run lengths",
    ),
    "TIFF beyond the limit": (lambda: tiff_of(HUGE), "TooLarge"),
    "TIFF within it": (lambda: tiff_of(SIDE), "MemoryError"),
    "TIFF with a strip of zeros": (
        lambda: tiff_of(4000, rows=0xFFFF_FFFF),
        "DecodeError",
    ),
    "TIFF with a huge tile": (lambda: tiled(1 << 30), ("DecodeError", "MemoryError")),
    "TIFF with a large tile": (lambda: tiled(16_384), ("DecodeError", "MemoryError")),
    "TIFF with tags that share their data": (lambda: same_tags(4000, 4 << 20), "accepted"),
    "TIFF with too many tags": (lambda: same_tags(5000, 100), "DecodeError"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_in_an_error_of_ours_and_its_process_lives_on(child, name):
    make, expected = BOMBS[name]
    data = make()
    assert len(data) < 16 << 20, "it is no small file"
    outcome = child.run(data)
    assert outcome.startswith(expected), outcome
    assert child.run(samples()["PNG", "RGBA"]).startswith("accepted 43 by 29")
    assert child.starts == 1, "the process died"


def test_large_pictures_that_are_none_are_decoded_with_that_memory(child):
    into = io.BytesIO()
    Image.new("RGB", (4032, 3024), (1, 2, 3)).save(into, "PNG")
    assert child.run(into.getvalue()) == "accepted 4032 by 3024, [1, 2, 3]"


def test_of_thousands_of_frames_only_the_first_is_decoded(child):
    data = frames(3)
    second = data.index(b"\x21\xf9", data.index(b"\x21\xf9") + 8)
    assert child.run(data[:second] + b"\x2c" + b"\xff" * 1000) == child.run(data)
