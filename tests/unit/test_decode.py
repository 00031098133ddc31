"""Decoding equals Pillow's ``convert("RGB")`` upright, and refuses what is broken, foreign or too large."""

import io
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, PngImagePlugin

from mmprep.errors import DecodeError, TooLarge, UnsupportedMedia
from mmprep_worker.images import decode
from mmprep_worker.images.decode import open_picture

LIMIT = 100_000_000
RANDOM = np.random.default_rng(7)


def drawn(width, height):
    """A smooth picture with some noise, as photographs are."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], axis=2)
    return Image.fromarray(np.clip(smooth + RANDOM.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8))


def encoded(image, kind, **options):
    into = io.BytesIO()
    image.save(into, kind, **options)
    return into.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def reference(data):
    with warnings.catch_warnings(action="ignore"):
        return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def decoded(data):
    picture = open_picture(data, max_pixels=LIMIT)
    pixels = picture.rgb()
    assert pixels.shape == (picture.height, picture.width, 3)
    assert pixels.flags.c_contiguous
    return pixels


def png(width, height, body=b""):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_format_is_known_by_its_content(kind):
    if kind not in decode.FORMATS:
        pytest.skip("this Pillow has no AVIF")
    data = encoded(drawn(97, 61), kind)
    picture = open_picture(data, max_pixels=LIMIT)
    assert (picture.width, picture.height, picture.format) == (97, 61, kind)
    assert np.array_equal(decoded(data), reference(data))
    assert np.array_equal(decoded(memoryview(data)), reference(data))


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (639, 481), (16, 8)])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_jpegs_have_pillows_pixels(size, grey, progressive, subsampling):
    image = drawn(*size).convert("L" if grey else "RGB")
    data = encoded(image, "JPEG", quality=83, progressive=progressive, subsampling=subsampling)
    assert np.array_equal(decoded(data), reference(data))
    assert np.array_equal(simplejpeg.decode_jpeg(data, "RGB"), reference(data))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1"])
def test_modes_are_converted_as_pillow_does(mode):
    data = encoded(drawn(70, 130).convert("RGBA").convert(mode), "PNG")
    assert open_picture(data, max_pixels=LIMIT).mode == mode
    assert np.array_equal(decoded(data), reference(data))


def test_cmyk_and_rgb_jpegs_are_converted_as_pillow_does():
    for data in (encoded(drawn(70, 130).convert("CMYK"), "JPEG"), encoded(drawn(70, 130), "JPEG", keep_rgb=True)):
        assert np.array_equal(decoded(data), reference(data))


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_palettes_with_transparency_are_converted_as_pillow_does(transparency):
    data = encoded(drawn(70, 130).convert("P"), "PNG", transparency=transparency)
    assert np.array_equal(decoded(data), reference(data))


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_deep_grey_keeps_its_high_byte(kind, mode):
    values = RANDOM.integers(0, 65536, (130, 70)).astype(">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (70, 130), values.tobytes())
    got = decoded(encoded(image, kind))
    assert np.array_equal(got, np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2))
    as_pil = open_picture(encoded(image, kind), max_pixels=LIMIT).pil()
    assert as_pil.mode == "L"
    assert np.array_equal(np.asarray(as_pil), got[:, :, 0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientations_are_applied_and_known_from_the_header(kind, orientation):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(drawn(97, 61), kind, exif=exif(orientation), **options)
    picture = open_picture(data, max_pixels=LIMIT)
    assert (picture.width, picture.height) == ((97, 61) if orientation < 5 else (61, 97))
    assert np.array_equal(picture.rgb(), reference(data))
    upright = open_picture(data, max_pixels=LIMIT).pil()
    assert np.array_equal(np.asarray(upright.convert("RGB")), reference(data))


def test_an_orientation_behind_the_pixels_of_a_png_is_applied():
    plain = encoded(drawn(97, 61), "PNG")
    content = exif(6)[6:]
    late = struct.pack(">I", len(content)) + b"eXIf" + content + struct.pack(">I", zlib.crc32(b"eXIf" + content))
    data = plain[:-12] + late + plain[-12:]
    assert open_picture(data, max_pixels=LIMIT).width == 61
    assert np.array_equal(decoded(data), reference(data))


@pytest.mark.parametrize("content", [b"Exif\0\0broken", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(0), exif(77)])
def test_a_broken_orientation_is_none(content):
    image = drawn(97, 61)
    assert np.array_equal(decoded(encoded(image, "JPEG", exif=content)), decoded(encoded(image, "JPEG")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind):
    frames = [drawn(60, 40) for _ in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.array_equal(decoded(data), reference(data))


def test_a_gif_with_transparency_is_converted_as_pillow_does():
    data = encoded(drawn(60, 40).convert("P"), "GIF", transparency=5)
    assert np.array_equal(decoded(data), reference(data))


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"<svg></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS" + bytes(40)]
)
def test_what_is_no_picture_of_ours_is_unsupported(data):
    with pytest.raises(UnsupportedMedia, match="send one of JPEG, PNG"):
        open_picture(data, max_pixels=LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_truncated_picture_is_an_error(kind, kept):
    if kind not in decode.FORMATS:
        pytest.skip("this Pillow has no AVIF")
    data = encoded(drawn(200, 150), kind)
    with pytest.raises((DecodeError, UnsupportedMedia)):
        decoded(data[: int(len(data) * kept)])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_truncated_within_its_pixels_is_a_decode_error_at_any_place(progressive):
    data = encoded(drawn(200, 150), "JPEG", progressive=progressive)
    for kept in range(len(data) // 2, len(data) - 200, 97):
        picture = open_picture(data[:kept], max_pixels=LIMIT)
        with pytest.raises(DecodeError):
            picture.rgb()


def test_broken_bytes_never_end_in_another_error():
    for kind in decode.FORMATS:
        data = bytearray(encoded(drawn(64, 48), kind))
        for _ in range(60):
            broken = bytearray(data)
            for place in RANDOM.integers(0, len(data), 4):
                broken[place] = RANDOM.integers(0, 256)
            try:
                open_picture(bytes(broken), max_pixels=1_000_000).rgb()
            except (DecodeError, UnsupportedMedia, TooLarge):
                continue


def test_a_lying_header_is_refused_before_memory_is_taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TooLarge, match=r"400000000 pixels.*178956970.*--max-image-pixels"):
        open_picture(png(20_000, 20_000), max_pixels=178_956_970)
    with pytest.raises(DecodeError):
        open_picture(png(20_000, 20_000), max_pixels=500_000_000).rgb()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("limit", [5999, 2000])
def test_the_limit_of_pixels_holds_for_every_format(kind, limit):
    data = encoded(drawn(100, 60), kind)
    with pytest.raises(TooLarge, match=rf"6000 pixels.*{limit}.*--max-image-pixels"):
        open_picture(data, max_pixels=limit)
    assert open_picture(data, max_pixels=6000).rgb().shape == (60, 100, 3)


def test_a_gif_frame_larger_than_its_screen_is_within_the_limit():
    screen = b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0, 0, 0)
    control = b"\x21\xf9\x04" + struct.pack("<BHBB", 0b1000, 0, 0, 0)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0x80) + bytes(6) + b"\x02\x02\x44\x01\x00\x3b"
    with pytest.raises((TooLarge, DecodeError)):
        open_picture(screen + control + frame, max_pixels=1_000_000).rgb()


def test_metadata_of_a_picture_stays_out_of_messages():
    info = PngImagePlugin.PngInfo()
    info.add_text("secret", "xyz")
    data = encoded(drawn(64, 48), "PNG", pnginfo=info)
    with pytest.raises(DecodeError) as caught:
        decoded(data[:-600])
    assert "xyz" not in caught.value.message
    assert "0x" not in caught.value.message
