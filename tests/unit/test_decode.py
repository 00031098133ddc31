"""Pictures of every format and mode decode to what transformers sees; what is broken, foreign or too large is refused."""

import io
import os
import resource
import struct
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, PngImagePlugin
from tests.pictures import FOREIGN, chunk, deep, drawn, encoded, exif, gif_of_a_frame, png, samples, tiff
from transformers.image_transforms import convert_to_rgb

from mmprep.errors import DecodeError, TooLarge, UnsupportedMedia
from mmprep.picture_header import read_picture_header
from mmprep_worker.images import decode
from mmprep_worker.images.decode import open_picture

LIMIT = 100_000_000
RANDOM = np.random.default_rng(7)
SAMPLES = samples()
NAMES = [pytest.param(data, id=" ".join(key)) for key, data in SAMPLES.items()]


def upright(data):
    """Return Pillow's picture, decoded and turned."""
    with warnings.catch_warnings(action="ignore"):
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


def is_deep_grey(data):
    return Image.open(io.BytesIO(data)).mode.startswith("I;16")


def is_translucent(data):
    return not is_deep_grey(data) and np.asarray(upright(data).convert("RGBA"))[:, :, 3].min() < 255


#: With transparency of every kind: a channel, entries of a palette, one colour.
SEE_THROUGH = [pytest.param(data, id=" ".join(key)) for key, data in SAMPLES.items() if is_translucent(data)]


def reference(data):
    with warnings.catch_warnings(action="ignore"):
        return convert_to_rgb(upright(data), return_numpy=True)


def decoded(data, **options):
    picture = open_picture(data, max_pixels=LIMIT)
    pixels = picture.rgb(**options)
    assert pixels.shape == (picture.height, picture.width, 3)
    assert pixels.flags.c_contiguous
    return pixels


def empty_png(width, height):
    """Return a PNG that announces a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# --- what is right ----------------------------------------------------------------------------------------------------


def test_the_samples_are_of_every_format_and_of_many_kinds():
    counts = Counter(kind for kind, _ in SAMPLES)
    assert set(counts) == set(decode.FORMATS)
    assert min(counts.values()) >= 7
    assert counts["TIFF"] >= 30
    assert counts["PNG"] >= 30
    assert {param.id.split()[0] for param in SEE_THROUGH} >= {"PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"}
    modes = {Image.open(io.BytesIO(data)).mode for data in SAMPLES.values()}
    assert modes >= {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I", "F", "LAB"}


@pytest.mark.parametrize("data", NAMES)
def test_a_picture_is_what_transformers_sees_and_its_header_tells_its_size(data):
    picture, image = open_picture(data, max_pixels=LIMIT), upright(data)
    assert (picture.width, picture.height) == image.size
    assert read_picture_header(data).pixels >= image.width * image.height
    pixels = decoded(data)
    assert np.array_equal(decoded(memoryview(data)), pixels)
    if is_deep_grey(data):  # which Pillow clips to white
        assert len(np.unique(pixels)) > 100
    else:
        assert np.array_equal(pixels, reference(data))


@pytest.mark.parametrize("data", SEE_THROUGH)
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (12, 200, 99)])
def test_transparency_is_put_on_the_background(data, background):
    rgba = np.asarray(upright(data).convert("RGBA")).astype(np.int64)
    alpha = rgba[:, :, 3:]
    exact = (rgba[:, :, :3] * alpha + np.array(background) * (255 - alpha)) / 255
    pixels = decoded(data, background=background)
    assert np.abs(pixels - exact).max() <= 0.5, "it is not the nearest to the exact value"


@pytest.mark.parametrize("data", [SAMPLES["PNG", "RGBA"], SAMPLES["WEBP", "lossless RGBA"], SAMPLES["TIFF", "RGBA"]])
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (12, 200, 99)])
def test_rgba_on_a_background_is_what_vllm_makes_of_it(data, background):
    image = upright(data)
    pasted = Image.new("RGB", image.size, background)  # as its rgba_to_rgb, for its rgba_background_color
    pasted.paste(image, mask=image.split()[3])
    assert np.array_equal(decoded(data, background=background), np.asarray(pasted))


@pytest.mark.parametrize("opaque", [False, True])
def test_every_colour_at_every_transparency_equals_transformers(opaque):
    values = np.zeros((256, 256, 4), np.uint8)
    values[:, :, 0] = values[:, :, 1] = np.arange(256)
    values[:, :, 2] = 255 - values[:, :, 0]
    values[:, :, 3] = 255 if opaque else np.arange(256)[:, None]
    data = encoded(Image.fromarray(values), "PNG")
    assert np.array_equal(decoded(data), reference(data))


@pytest.mark.parametrize("data", SEE_THROUGH)
def test_transparency_can_be_dropped(data):
    with warnings.catch_warnings(action="ignore"):
        plain = np.asarray(upright(data).convert("RGB"))
    assert np.array_equal(decoded(data, background=None), plain)


@pytest.mark.parametrize("background", [None, (0, 9, 255)])
def test_a_background_changes_nothing_opaque(background):
    for key in (("JPEG", "4:2:0"), ("PNG", "RGB"), ("GIF", "palette"), ("BMP", "32 bits without alpha")):
        assert np.array_equal(decoded(SAMPLES[key], background=background), reference(SAMPLES[key]))


@pytest.mark.parametrize(
    ("key", "byte_order"),
    [
        (("PNG", "16-bit grey"), "<"),
        (("PNG", "interlaced 16-bit grey"), "<"),
        (("TIFF", "16-bit grey"), "<"),
        (("TIFF", "16-bit grey, big-endian"), ">"),
    ],
)
def test_deep_grey_keeps_its_high_byte(key, byte_order):
    assert byte_order == ("<" if key[0] == "PNG" else SAMPLES[key][:2].decode().replace("II", "<").replace("MM", ">"))
    values = deep(1) if key[0] == "PNG" else deep(3)[:, :, :1]
    assert np.array_equal(decoded(SAMPLES[key]), np.repeat((values >> 8).astype(np.uint8), 3, axis=2))


def test_the_transparent_value_of_deep_grey_is_compared_with_all_its_bits():
    values = np.full((3, 5, 1), 0x1234)
    values[1, 2] = 0x1235
    data = png(values, 0, bits=16, before=chunk(b"tRNS", b"\x12\x34"))
    expected = np.tile(np.array([9, 8, 7], np.uint8), (3, 5, 1))
    expected[1, 2] = 0x12
    assert np.array_equal(decoded(data, background=(9, 8, 7)), expected)
    assert np.array_equal(decoded(data, background=None), np.full((3, 5, 3), 0x12))


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (639, 481), (16, 8)])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_jpegs_have_pillows_pixels(size, grey, progressive, subsampling):
    image = drawn(*size).convert("L" if grey else "RGB")
    data = encoded(image, "JPEG", quality=83, progressive=progressive, subsampling=subsampling)
    assert np.array_equal(decoded(data), reference(data))
    assert np.array_equal(simplejpeg.decode_jpeg(data, "RGB"), reference(data))


def test_adobes_four_channels_are_converted_by_how_they_are_coded():
    plain, coded = decoded(SAMPLES["JPEG", "CMYK"]), decoded(SAMPLES["JPEG", "YCCK"])
    assert np.abs(plain.astype(int) - np.asarray(drawn())).mean() < 20
    assert not np.array_equal(plain, coded)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_an_orientation_turns_the_picture(kind):
    if kind not in decode.FORMATS:
        pytest.skip("this Pillow has no AVIF")
    pixels = [decoded(SAMPLES[kind, f"orientation {number}"]) for number in range(1, 9)]
    turned = [image.transpose(1, 0, 2) if number >= 4 else image for number, image in enumerate(pixels)]
    flips = [(1, 1), (1, -1), (-1, -1), (-1, 1), (1, 1), (-1, 1), (-1, -1), (1, -1)]
    for image, (down, across) in zip(turned, flips, strict=True):
        back = image[::down, ::across]
        assert np.abs(back.astype(int) - pixels[0]).max() == 0


@pytest.mark.parametrize("content", [b"Exif\0\0broken", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(0), exif(77)])
def test_a_broken_orientation_is_none(content):
    image = drawn(97, 61)
    assert np.array_equal(decoded(encoded(image, "JPEG", exif=content)), decoded(encoded(image, "JPEG")))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP", "AVIF"])
def test_of_several_frames_the_first_is_taken(kind):
    if kind not in decode.FORMATS:
        pytest.skip("this Pillow has no AVIF")
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(decoded(data).astype(int) - (255, 0, 0)).max() < 10


def test_of_an_animation_with_another_picture_in_front_that_one_is_taken():
    assert np.array_equal(decoded(SAMPLES["PNG", "animated, with another picture"]), np.asarray(drawn()))


def test_run_lengths_of_a_bmp_are_undone():
    palette = np.random.default_rng(3).integers(0, 256, (16, 4)).astype(np.uint8)[:, 2::-1]
    for key in ("run lengths of 8 bits", "run lengths of 4 bits"):
        pixels = decoded(SAMPLES["BMP", key])[::-1]
        for row in range(len(pixels)):
            assert np.array_equal(pixels[row, :10], np.tile(palette[row % 16], (10, 1)))
            assert np.array_equal(pixels[row, 10:13], palette[[1, 2, 3]])


def test_a_jpeg_is_read_whatever_stands_behind_it():
    data = SAMPLES["JPEG", "4:2:0"]
    for behind in (b"<html><script>alert(1)</script></html>", FOREIGN["ZIP"], b"\xff\xda" * 500, bytes(1000)):
        assert np.array_equal(decoded(data + behind), decoded(data))


def test_a_jpeg_with_html_in_its_comment_is_a_jpeg():
    data = encoded(drawn(), "JPEG", comment=b"*/=1;<html><script>alert(1)</script></html>")
    assert np.array_equal(decoded(data), decoded(encoded(drawn(), "JPEG")))


# --- what is not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_picture_of_ours_is_unsupported(name):
    with pytest.raises(UnsupportedMedia, match="send one of JPEG, PNG"):
        open_picture(FOREIGN[name], max_pixels=LIMIT)


def test_a_png_with_broken_pixels_is_refused_whatever_stands_behind_them():
    pixels = np.zeros((40, 40, 3), np.uint8)
    whole = png(pixels, 2, after=chunk(b"eXIf", exif(6)[6:]))
    at = whole.index(b"IDAT")
    length = int.from_bytes(whole[at - 4 : at], "big")
    for broken in (whole[: at + 4] + bytes(length) + whole[at + 4 + length :], whole.replace(b"IDAT", b"IDAt")):
        with pytest.raises(DecodeError):
            decoded(broken)
    rows = b"".join(b"\0" + bytes(120) for _ in range(20)) + b"\7" + bytes(120) * 20  # no filter has this number
    data = png(pixels, 2, after=chunk(b"eXIf", exif(6)[6:]))
    packed = data[: at - 4] + chunk(b"IDAT", zlib.compress(rows)) + data[at + 8 + length :]
    with pytest.raises(DecodeError):
        decoded(packed)


def test_heic_is_named():
    with pytest.raises(UnsupportedMedia, match="HEIC pictures are not read"):
        open_picture(FOREIGN["HEIC"], max_pixels=LIMIT)


def test_only_the_formats_that_are_read_can_be_reached(monkeypatch):
    asked = []
    opened = Image.open

    def noting(file, **options):
        asked.append(options["formats"])
        return opened(file, **options)

    monkeypatch.setattr(Image, "open", noting)
    for data in SAMPLES.values():
        open_picture(data, max_pixels=LIMIT)
    assert {formats for formats in asked if len(formats) == 1} == {(name,) for name in decode.FORMATS}


@pytest.mark.parametrize("data", NAMES)
def test_a_picture_cut_off_anywhere_is_refused_or_whole(data):
    whole = decoded(data)
    for kept in sorted({*range(1, 40, 3), *range(40, len(data), max(1, len(data) // 40)), len(data) - 1}):
        try:
            pixels = decoded(data[:kept])
        except DecodeError:
            continue
        except UnsupportedMedia:
            assert kept < 32, "its kind could be seen"
            continue
        assert pixels.shape == whole.shape
        assert kept > len(data) // 3, "almost nothing of it was there"


@pytest.mark.parametrize("kind", decode.FORMATS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_picture_cut_off_within_its_pixels_is_an_error(kind, kept):
    data = encoded(drawn(200, 150), kind)
    with pytest.raises(DecodeError, match="broken or truncated"):
        decoded(data[: int(len(data) * kept)])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_truncated_within_its_pixels_is_a_decode_error_at_any_place(progressive):
    data = encoded(drawn(200, 150), "JPEG", progressive=progressive)
    for kept in range(len(data) // 2, len(data) - 200, 97):
        picture = open_picture(data[:kept], max_pixels=LIMIT)
        with pytest.raises(DecodeError):
            picture.rgb()


def test_a_lying_header_is_refused_before_memory_is_taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TooLarge, match=r"400000000 pixels.*178956970.*--max-image-pixels"):
        open_picture(empty_png(20_000, 20_000), max_pixels=178_956_970)
    with pytest.raises(DecodeError):
        open_picture(empty_png(20_000, 20_000), max_pixels=500_000_000).rgb()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("kind", decode.FORMATS)
@pytest.mark.parametrize("limit", [5999, 2000])
def test_the_limit_of_pixels_holds_for_every_format(kind, limit):
    data = encoded(drawn(100, 60), kind)
    with pytest.raises(TooLarge, match=rf"6000 pixels.*{limit}.*--max-image-pixels"):
        open_picture(data, max_pixels=limit)
    assert open_picture(data, max_pixels=6000).rgb().shape == (60, 100, 3)


def test_a_gif_frame_larger_than_its_screen_is_within_the_limit():
    with pytest.raises(TooLarge, match="3600060000 pixels"):
        open_picture(
            gif_of_a_frame((10, 10), (0, 0, 1, 1)).replace(
                b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1), b"\x2c" + struct.pack("<HHHH", 1, 0, 60_000, 60_000)
            ),
            max_pixels=1_000_000,
        )


def test_metadata_of_a_picture_stays_out_of_messages():
    info = PngImagePlugin.PngInfo()
    info.add_text("secret", "xyz")
    data = encoded(drawn(64, 48), "PNG", pnginfo=info)
    with pytest.raises(DecodeError) as caught:
        decoded(data[:-600])
    assert "xyz" not in caught.value.message
    assert "0x" not in caught.value.message


def test_a_library_that_finds_no_memory_is_no_broken_picture(monkeypatch):
    for said in (
        "out of memory when reading image file",
        "decoder error -9",
        "Failed to decode frame 0: Out of memory",
    ):
        picture = open_picture(SAMPLES["PNG", "RGB"], max_pixels=LIMIT)

        def load(said=said):
            raise OSError(said)

        monkeypatch.setattr(picture._image, "load", load)
        with pytest.raises(MemoryError):
            picture.rgb()


def test_no_decoder_starts_a_program_or_reads_another_file(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a decoder reached out")

    for name in ("system", "popen", "posix_spawn", "fork"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    for data in SAMPLES.values():
        decoded(data)


def test_nothing_that_a_picture_holds_is_logged(caplog):
    caplog.set_level("DEBUG")
    data = encoded(drawn(20, 10), "TIFF", description="a secret of its sender")
    assert decoded(data).shape == (10, 20, 3)
    with pytest.raises((DecodeError, UnsupportedMedia)):
        decoded(tiff(np.zeros((10, 20, 3), np.uint8), photometric=2, tags=[(277, "H", (54_787,))]))
    assert caplog.records == []


def test_a_broken_tiff_writes_nothing_into_the_log(capfd):
    rows = 3000
    noise = np.random.default_rng(1).integers(0, 256, (1, 20_000, 1)).astype(np.uint8)
    tags = [
        (256, "I", (1000,)),
        (257, "I", (rows,)),
        (258, "H", (1,)),
        (259, "H", (4,)),
        (278, "I", (rows,)),
        (279, "I", (20_000,)),
    ]
    data = tiff(noise, photometric=0, rows=1, tags=tags)
    assert decoded(data).shape == (rows, 1000, 3)
    os.write(2, b"here again")
    assert capfd.readouterr() == ("", "here again")
