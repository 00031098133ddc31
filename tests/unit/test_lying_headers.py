"""What a video's header claims decides about nothing: not about memory, not about the number of frames or their times."""

import io
import struct

import av
import numpy as np
import pytest
from model_fixtures import limits
from tests.videos import boxes, decoded, edited, filmed, header_first

from mmprep.errors import DecodeError, MmprepError, TooLarge, UnsupportedMedia
from mmprep_worker.video.boxes import MOST_SAMPLES, check_boxes
from mmprep_worker.video.clip import open_clip

LIMITS = limits()
HUGE = 0x7FFFFFFF
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


@pytest.fixture(scope="module")
def film():
    return filmed(20)


def box(kind, *content):
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def numbers(*values):
    return struct.pack(f">{len(values)}I", *values)


def assert_right(data, frames):
    clip = open_clip(data, LIMITS)
    assert (clip.width, clip.height, clip.count, clip.rate) == (96, 64, 20, 30.0)
    for frame, expected in zip(clip.frames([0, 9, 19]), (frames[0], frames[9], frames[19]), strict=True):
        assert np.array_equal(frame, expected)


@pytest.mark.parametrize(
    ("kind", "offset"),
    [
        (b"mvhd", 16),  # the film's duration
        (b"tkhd", 20),  # the track's duration
        (b"tkhd", 76),  # its width
        (b"tkhd", 80),  # its height
        (b"mdhd", 16),  # the media's duration
    ],
)
@pytest.mark.parametrize("value", [0, 1, HUGE])
def test_durations_and_sizes_of_a_header_change_nothing(film, kind, offset, value):
    data = edited(film, kind, offset, value)
    assert data != film
    assert_right(data, decoded(film))


def test_what_an_edit_list_hides_is_not_there(film):
    assert open_clip(edited(film, b"elst", 8, 300), LIMITS).count == 9  # of a third of a second
    with pytest.raises(DecodeError, match="no frames"):
        open_clip(edited(film, b"elst", 8, 0), LIMITS)


@pytest.mark.parametrize("size", [(0, 0), (1, 1), (65535, 65535)])
def test_the_size_of_the_frames_is_that_of_the_frames(film, size):
    data = edited(film, b"avc1", 24, size[0] << 16 | size[1])
    assert_right(data, decoded(film))


def test_times_decide_how_long_a_video_is(film):
    slower = edited(edited(film, b"stts", 12, 30720), b"elst", 8, HUGE)  # a frame lasts two seconds
    assert open_clip(slower, LIMITS).count == 20
    assert open_clip(slower, LIMITS).rate == pytest.approx(0.5, rel=0.1)
    with pytest.raises(TooLarge, match="--max-video-duration"):
        open_clip(slower, limits(video_seconds=30))
    with pytest.raises(TooLarge, match="--max-video-duration"):
        open_clip(edited(slower, b"stts", 12, HUGE), LIMITS)


def test_frames_without_a_time_of_their_own_are_one_frame():
    still = edited(filmed(20, options={"bf": "0"}), b"stts", 12, 0)
    clip = open_clip(still, LIMITS)
    assert len(list(clip.frames(range(clip.count)))) == clip.count


@pytest.mark.parametrize("kind", [b"stsz", b"stts", b"ctts", b"stco", b"stsc", b"stss"])
@pytest.mark.parametrize("value", [0x00FFFFFF, HUGE, 0xFFFFFFFF])
def test_tables_that_announce_more_than_they_hold_are_refused_before_memory_is_taken(film, kind, value):
    data = edited(film, kind, 8 if kind == b"stsz" else 4, value)
    with pytest.raises(DecodeError, match="broken"):
        open_clip(data, LIMITS)


def test_samples_of_one_size_that_are_not_there_are_refused(film):
    data = edited(edited(film, b"stsz", 4, 1), b"stsz", 8, 100_000_000)
    with pytest.raises(DecodeError, match="100000000 samples of 1 bytes each"):
        open_clip(data, LIMITS)


def test_a_fragmented_film_is_read_and_its_runs_are_bounded():
    data = filmed(20, options={"g": "5"}, muxer=FRAGMENTS)
    assert_right(data, decoded(data))
    with pytest.raises(DecodeError, match="boxes"):
        open_clip(edited(data, b"trun", 4, 1_000_000), LIMITS)
    bare = box(b"ftyp", b"isom", numbers(0)) + box(b"moof", box(b"traf", box(b"trun", numbers(0, MOST_SAMPLES + 1))))
    with pytest.raises(DecodeError, match=f"more than {MOST_SAMPLES} samples"):
        check_boxes(memoryview(bare))
    nested = box(b"moov", box(b"udta", box(b"trak", box(b"trun", numbers(0, MOST_SAMPLES + 1)))))
    with pytest.raises(DecodeError, match=f"more than {MOST_SAMPLES} samples"):
        check_boxes(memoryview(nested))


def test_a_film_without_samples_has_no_frames(film):
    empty = edited(edited(film, b"stsz", 8, 0), b"stts", 4, 0)
    with pytest.raises(DecodeError):
        open_clip(empty, LIMITS)
    with pytest.raises(MmprepError) as refused:
        open_clip(box(b"ftyp", b"isom", numbers(0)), LIMITS)
    assert type(refused.value) in {DecodeError, UnsupportedMedia}


def test_boxes_that_do_not_fit_into_each_other_are_broken(film):
    for kind in (b"trak", b"mdia", b"minf", b"stbl"):
        at = film.index(kind) - 4
        for size in (0xFFFFFFFF, 7, len(film)):
            data = film[:at] + struct.pack(">I", size) + film[at + 4 :]
            with pytest.raises(DecodeError):
                open_clip(data, LIMITS)


def test_a_compressed_header_is_not_read(film):
    start, end = next((start, end) for kind, start, end in boxes(film) if kind == b"moov")
    header = box(b"moov", box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", numbers(HUGE), b"x" * 100)))
    with pytest.raises(UnsupportedMedia, match="compressed"):
        open_clip(film[:start] + header + film[end:], LIMITS)


@pytest.mark.parametrize("kind", [b"url ", b"alis", b"urn "])
def test_data_in_other_files_are_not_followed(film, kind, tmp_path):
    (tmp_path / "secret.mp4").write_bytes(film)
    reference = box(kind, numbers(0), b"file://", str(tmp_path / "secret.mp4").encode(), b"\0")
    data = _with_references(film, box(b"dref", numbers(0, 1), reference))
    assert _first_frame(data) is None
    with pytest.raises(UnsupportedMedia, match="in other files"):
        open_clip(data, LIMITS)


def _with_references(film, references):
    """Return the film without its data, and with other references to where they are."""
    front = header_first(film)
    header = front[: front.index(b"mdat") - 4]
    old_at = header.index(b"dref") - 4
    old_end = old_at + struct.unpack_from(">I", header, old_at)[0]
    grown = len(references) - (old_end - old_at)
    changed = bytearray(header[:old_at] + references + header[old_end:])
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        at = changed.index(kind) - 4
        struct.pack_into(">I", changed, at, struct.unpack_from(">I", changed, at)[0] + grown)
    return bytes(changed)


def _first_frame(data):
    """Return what FFmpeg by itself, which is told nothing about limits, shows first."""
    try:
        with av.open(io.BytesIO(data)) as file:
            return next(file.decode(video=0), None)
    except av.FFmpegError:
        return None


def test_a_playlist_in_the_clothes_of_a_film_opens_nothing(film, tmp_path):
    (tmp_path / "secret.mp4").write_bytes(film)
    text = f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n".encode()
    for data in (box(b"ftyp", b"isom", numbers(0)) + text, b"\x1a\x45\xdf\xa3" + text, box(b"free") + text):
        with pytest.raises(DecodeError):
            open_clip(data, LIMITS)
