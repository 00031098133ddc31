"""What is read of a picture's header: right for every sample, an error of ours for any other bytes, in bounded steps."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.pictures import FOREIGN, HEIGHT, SIGNATURE, WIDTH, chunk, gif_of_a_frame, samples

from mmprep.errors import DecodeError, UnsupportedMedia
from mmprep.picture_header import MOST_STEPS, MOST_TAGS, PictureHeader, read_picture_header

SAMPLES = samples()
#: Samples of another size. The grid is cut out of a larger cell, which is what its decoder has to decode.
OTHERS = {("GIF", "a frame out of its screen"): (12, 12), ("AVIF", "grid"): (64, 64)}


def box(kind, content):
    return struct.pack(">I4s", 8 + len(content), kind) + content


def avif(*boxes, brand=b"avif"):
    return box(b"ftyp", brand + bytes(4)) + b"".join(boxes)


def with_extents(*sizes):
    extents = b"".join(box(b"ispe", bytes(4) + struct.pack(">II", *size)) for size in sizes)
    return box(b"meta", bytes(4) + box(b"iprp", box(b"ipco", extents)))


@pytest.mark.parametrize(("key", "data"), SAMPLES.items(), ids=map(" ".join, SAMPLES))
def test_format_and_size_are_read_of_every_sample(key, data):
    size = OTHERS.get(key, (WIDTH, HEIGHT))
    for given_as in (data, memoryview(data)):
        assert read_picture_header(given_as) == PictureHeader(key[0], *size)


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_picture_is_unsupported(name):
    with pytest.raises(UnsupportedMedia):
        read_picture_header(FOREIGN[name])


@pytest.mark.parametrize("data", SAMPLES.values(), ids=map(" ".join, SAMPLES))
def test_a_header_cut_off_anywhere_is_an_error_or_says_no_more(data):
    for kept in range(min(len(data), 400)):
        try:
            assert read_picture_header(data[:kept]).pixels <= read_picture_header(data).pixels
        except DecodeError:
            assert kept >= 2
        except UnsupportedMedia:
            assert kept < 32


@given(st.sampled_from(list(SAMPLES.values())), st.binary(max_size=60), st.integers(0, 200), st.integers(0, 200))
def test_any_bytes_are_a_header_or_one_of_two_errors(data, other, start, skipped):
    spliced = data[:start] + other + data[start + skipped :]
    try:
        header = read_picture_header(spliced)
    except (DecodeError, UnsupportedMedia):
        return
    assert header.width > 0 < header.height


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8" + b"\xff\xe0\0\2" * (MOST_STEPS + 1),
        b"GIF89a" + bytes(7) + b"\x21\xfe\1x\0" * (MOST_STEPS + 1),
        b"GIF89a" + bytes(7) + b"\x21\xfe" + b"\1x" * (MOST_STEPS + 1),
        b"GIF89a" + bytes(7) + bytes(MOST_STEPS + 1),
        avif(*[box(b"free", b"")] * (MOST_STEPS + 1)),
        avif(with_extents(*[(9, 9)] * MOST_STEPS)),
        avif(*[with_extents((9, 9))] * (MOST_STEPS // 3)),
        b"II\x2a\0" + struct.pack("<IH", 8, MOST_TAGS + 1) + bytes(12 * (MOST_TAGS + 1)),
    ],
    ids=["segments", "extensions", "blocks", "junk", "boxes", "extents", "nested boxes", "tags"],
)
def test_a_header_that_would_be_walked_for_long_is_refused(data):
    with pytest.raises(DecodeError, match="encoded anew"):
        read_picture_header(data)


@pytest.mark.parametrize("between", [b"\xff" * 70_000, bytes(70_000)])
def test_a_jpeg_with_much_between_its_segments_is_refused(between):
    data = SAMPLES["JPEG", "4:2:0"]
    assert data[20:22] == b"\xff\xdb", "the first segment ends elsewhere"
    assert read_picture_header(data[:20] + between[:9000] + data[20:]) == ("JPEG", WIDTH, HEIGHT)
    with pytest.raises(DecodeError, match="broken or truncated"):
        read_picture_header(data[:20] + between + data[20:])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 9, 8, 2, 0, 0, 0)), "no pixels"),
        (SIGNATURE + chunk(b"tEXt", bytes(13)), "does not begin with its header"),
        (b"BM" + bytes(12) + struct.pack("<III", 41, 9, 9), "unknown length"),
        (b"RIFF\x20\0\0\0WEBPALPH" + bytes(20), "no frame at its start"),
        (b"\xff\xd8\xff\xd9", "no size before its pixels"),
        (b"\xff\xd8\xff\xda\0\2", "no size before its pixels"),
        (b"GIF89a" + bytes(7) + b";", "no frame"),
        (b"II\x2a\0\xff\xff\xff\xff", "ends too early"),
        (b"II\x2b\0\x08\0\0\0" + b"\xff" * 8, "ends too early"),
        (b"II\x2a\0\x08\0\0\0\0\0", "no pixels"),
        (avif(), "no pixels"),
        (avif(struct.pack(">I4s", 4, b"meta")), "shorter than its own header"),
    ],
)
def test_a_broken_header_is_told_apart_from_no_picture(data, said):
    with pytest.raises(DecodeError, match=said):
        read_picture_header(data)


def test_of_several_sizes_the_largest_counts():
    assert read_picture_header(avif(with_extents((5, 6), (70, 80), (9, 9)))) == ("AVIF", 70, 80)
    track = bytes(76) + struct.pack(">II", 300 << 16, 200 << 16)
    moving = box(b"moov", box(b"trak", box(b"tkhd", track)))
    assert read_picture_header(avif(with_extents((5, 6)), moving, brand=b"avis")) == ("AVIF", 300, 200)
    assert read_picture_header(gif_of_a_frame((50, 5), (3, 4, 9, 8))) == ("GIF", 50, 12)


def test_boxes_of_every_length_are_walked_over():
    long = struct.pack(">I4sQ", 1, b"free", 20) + bytes(4)
    assert read_picture_header(avif(long, with_extents((5, 6)))) == ("AVIF", 5, 6)
    to_the_end = bytes(4) + with_extents((5, 6))[4:]
    assert read_picture_header(avif(to_the_end)) == ("AVIF", 5, 6)


def test_of_a_tag_that_is_there_twice_the_first_counts():
    entries = [(256, 40), (256, 4000), (257, 30)]
    listed = b"".join(struct.pack("<HHIHxx", tag, 3, 1, value) for tag, value in entries)
    data = b"II\x2a\0" + struct.pack("<IH", 8, len(entries)) + listed + bytes(4)
    assert read_picture_header(data) == ("TIFF", 40, 30)
