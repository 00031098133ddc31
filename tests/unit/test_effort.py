"""A small file that would keep a decoder busy for long is refused before any decoder sees it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from tests.pictures import SIGNATURE, avif_grid, bmp, chunk, drawn, encoded, samples, tiff

from mmprep.errors import DecodeError, TooLarge, UnsupportedMedia
from mmprep.picture_header import read_picture_header
from mmprep_worker.images import effort
from mmprep_worker.images.decode import open_picture
from mmprep_worker.images.effort import check_effort, check_tiles

LIMIT = 178_956_970
SAMPLES = samples()


def opened(data):
    return open_picture(data, max_pixels=LIMIT)


# --- JPEG -------------------------------------------------------------------------------------------------------------


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def coded(bits):
    """Return bits as they stand in a scan: filled up with ones, and a zero byte behind each 0xff."""
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")


def many_scans(scans, size=64, behind=b""):
    """Return a grey progressive JPEG: one scan with the blocks' means, then ``scans - 1`` that say nothing of all blocks."""
    blocks = (size // 8) ** 2
    frame = segment(0xC2, struct.pack(">BHHB", 8, size, size, 1) + b"\1\x11\0")
    means, rest = (segment(0xC4, bytes([kind, 1, *bytes(15), symbol])) for kind, symbol in ((0x00, 0), (0x10, 0xE0)))
    first = segment(0xDA, b"\1\1\0\0\0\0") + coded("0" * blocks)
    another = segment(0xDA, b"\1\1\0\1\x3f\0") + coded("0" + "1" * 14)
    start = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + frame + means + rest
    return start + first + another * (scans - 1) + b"\xff\xd9" + behind


def test_a_jpeg_may_have_as_many_scans_as_encoders_write_and_no_more():
    assert opened(many_scans(effort.MOST_SCANS)).rgb().shape == (64, 64, 3)
    with pytest.raises(DecodeError, match="more than 64 scans"):
        opened(many_scans(effort.MOST_SCANS + 1))


def test_scans_behind_the_picture_or_in_metadata_are_none():
    noise = b"\xff\xda" * 1000
    assert opened(many_scans(3, behind=noise)).rgb().shape == (64, 64, 3)
    with_comment = encoded(drawn(), "JPEG", comment=noise)
    assert opened(with_comment).rgb().shape
    plain = SAMPLES["JPEG", "4:2:0"]
    assert np.array_equal(opened(plain + noise).rgb(), opened(plain).rgb())


def test_scans_of_a_sequential_jpeg_with_several_are_counted_too():
    data = many_scans(effort.MOST_SCANS + 1).replace(b"\xff\xc2", b"\xff\xc1")
    data = data.replace(
        struct.pack(">BHHB", 8, 64, 64, 1) + b"\1\x11\0", struct.pack(">BHHB", 8, 64, 64, 2) + b"\1\x11\0\2\x11\0"
    )
    data = data.replace(struct.pack(">HBHHB", 11, 8, 64, 64, 2), struct.pack(">HBHHB", 14, 8, 64, 64, 2))
    with pytest.raises(DecodeError, match="more than 64 scans"):
        opened(data)


@pytest.mark.parametrize("data", [data for (kind, _), data in SAMPLES.items() if kind == "JPEG"])
def test_no_sample_has_too_many_scans(data, monkeypatch):
    monkeypatch.setattr(effort, "MOST_SCANS", 18)
    check_effort(read_picture_header(data), data)
    if Image.open(io.BytesIO(data)).info.get("progressive"):
        monkeypatch.setattr(effort, "MOST_SCANS", 5)
        with pytest.raises(DecodeError, match="more than 5 scans"):
            check_effort(read_picture_header(data), data)


def test_segments_behind_the_size_of_a_jpeg_are_walked_within_bounds_too():
    data = SAMPLES["JPEG", "4:2:0"]
    at = data.index(b"\xff\xda")
    assert opened(data[:at] + b"\xff\xef\0\2" * 4000 + data[at:]).rgb().shape == (29, 43, 3)
    with pytest.raises(DecodeError, match="more than 5000 segments"):
        opened(data[:at] + b"\xff\xef\0\2" * 5000 + data[at:])
    with pytest.raises(DecodeError, match="no pixels behind its header"):
        opened(data[:at] + b"\xff" * 70_000 + data[at:])


# --- PNG --------------------------------------------------------------------------------------------------------------


def with_chunks(before=b"", between=b"", after=b""):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    return SIGNATURE + head + before + chunk(b"IDAT", zlib.compress(bytes(72))) + between + after + chunk(b"IEND", b"")


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(
    "one",
    [
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1000))),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1000))),
        chunk(b"tEXt", b"a\0b"),
        chunk(b"prVt", b""),
    ],
)
def test_a_png_may_have_many_chunks_beside_its_pixels_but_not_any_number(where, one):
    assert opened(with_chunks(**{where: one * 900})).rgb().shape == (8, 8, 3)
    with pytest.raises(DecodeError, match="too many chunks"):
        opened(with_chunks(**{where: one * 1000}))


def test_a_png_of_empty_chunks_of_pixels_is_refused():
    assert opened(with_chunks(between=chunk(b"IDAT", b"") * 10_000)).rgb().shape == (8, 8, 3)
    with pytest.raises(DecodeError, match="too many chunks"):
        opened(with_chunks(between=chunk(b"IDAT", b"") * 30_000))


def test_what_stands_behind_a_png_is_none_of_its_chunks():
    data = with_chunks()
    for behind in (bytes(1 << 20), chunk(b"tEXt", b"a\0b") * 2000, b"<html>" * 100_000):
        assert np.array_equal(opened(data + behind).rgb(), opened(data).rgb())


def test_text_and_profiles_of_a_png_that_unpack_to_much_are_refused():
    much = zlib.compress(bytes(3 << 20), 9)
    for kind, content in ((b"zTXt", b"a\0\0" + much), (b"iTXt", b"a\0\1\0\0\0" + much), (b"iCCP", b"a\0\0" + much)):
        with pytest.raises(DecodeError, match=r"too large|broken"):
            opened(with_chunks(before=chunk(kind, content)))
    each = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20), 9))
    with pytest.raises(DecodeError):
        opened(with_chunks(before=each * 70))


# --- TIFF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [6, 32771, 32809, 34676, 34677, 34661, 50001, 50002, 65000])
def test_a_tiff_with_a_rare_compression_is_unsupported(number):
    data = tiff(np.zeros((16, 16, 3), np.uint8), photometric=2, tags=[(259, "H", (number,))])
    with pytest.raises(UnsupportedMedia, match=f"compression {number} are not read"):
        opened(data)


def test_a_tiff_with_far_more_strips_than_rows_is_refused(monkeypatch):
    monkeypatch.setattr(effort, "MOST_STRIPS", 10)
    pixels = np.zeros((20, 16, 3), np.uint8)
    assert opened(tiff(pixels, photometric=2, rows=2)).rgb().shape == (20, 16, 3)
    with pytest.raises(DecodeError, match="more than 10 strips"):
        opened(tiff(pixels, photometric=2, rows=1))
    with pytest.raises(DecodeError, match="more than 10 strips"):
        opened(tiff(pixels, photometric=2, tile=(4, 4)))


@pytest.mark.parametrize("times", [6, 1000])
def test_a_tiff_whose_strips_cover_it_again_and_again_is_refused(times):
    data = tiff(np.zeros((16, 16, 3), np.uint8), photometric=2, rows=8, tags=[(273, "I", (16, 400) * times)])
    with pytest.raises(DecodeError, match="more than once"):
        opened(data)


def test_tiles_count_by_what_they_cover_and_as_a_pixel_at_least():
    check_tiles([(0, 0, 4, 4)] * 5, 16)
    with pytest.raises(DecodeError):
        check_tiles([(0, 0, 4, 4)] * 6, 16)
    with pytest.raises(DecodeError):
        check_tiles([(4, 4, 4, 4)] * 81, 16)


def test_a_tiff_whose_tags_all_name_the_same_data_takes_no_more_than_the_file():
    tags = [(number, "B", tuple(bytes(200))) for number in range(40_000, 40_100)]
    assert opened(tiff(np.zeros((16, 16, 3), np.uint8), photometric=2, tags=tags)).rgb().shape == (16, 16, 3)


# --- BMP --------------------------------------------------------------------------------------------------------------

PALETTE = bytes(range(64))


def test_a_large_bmp_with_run_lengths_is_refused_as_its_decoder_is_slow():
    side = 4097
    with pytest.raises(TooLarge, match="run lengths may have 16777216"):
        opened(bmp(8, b"\0\0" * side + b"\0\1", size=(side, side), compression=1, palette=PALETTE))
    assert opened(bmp(8, b"", size=(side, side), palette=PALETTE)).width == side


@pytest.mark.parametrize(
    "one", [b"\0\0", b"\0\2\0\0", b"\1\1"], ids=["ends of rows", "steps to nowhere", "runs of none"]
)
def test_a_bmp_with_more_run_lengths_than_pixels_is_refused(one):
    with pytest.raises(DecodeError, match="more run lengths than pixels"):
        opened(bmp(8, one * 10_000, size=(16, 16), compression=1, palette=PALETTE))


# --- AVIF -------------------------------------------------------------------------------------------------------------


def test_an_avif_of_more_cells_than_cameras_write_is_refused():
    cell = encoded(drawn(64, 64), "AVIF", subsampling="4:4:4", max_threads=1)
    single = opened(cell).rgb()
    pixels = opened(avif_grid(cell, 64, 6, 8, (512, 384))).rgb()
    assert np.array_equal(pixels, np.tile(single, (6, 8, 1)))
    assert opened(avif_grid(cell, 64, 31, 33, (2112, 1984))).width == 2112
    with pytest.raises(DecodeError, match="more than 1024 parts"):
        opened(avif_grid(cell, 64, 32, 32, (2048, 2048)))


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", SAMPLES.values(), ids=map(" ".join, SAMPLES))
def test_no_sample_asks_for_too_much(data):
    check_effort(read_picture_header(data), memoryview(data))
