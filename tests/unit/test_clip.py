"""Videos are opened by content, counted by their packets and decoded frame by frame, whatever their headers say."""

import io
import re
import struct
from contextlib import suppress
from functools import cache

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import limits
from PIL import Image
from tests.videos import ENCODERS, animated, decoded, filmed, header_first, recorded, scene

from mmprep.errors import DecodeError, MmprepError, TooLarge, UnsupportedMedia
from mmprep_worker.video.clip import open_clip
from mmprep_worker.video.segment import check_whole

LIMITS = limits()


def assert_frames(clip, wanted, expected):
    frames = list(clip.frames(wanted))
    assert len(frames) == len(wanted)
    for frame, index in zip(frames, wanted, strict=True):
        assert frame.flags.c_contiguous
        assert np.array_equal(frame, expected[index])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_codec_gives_the_frames_that_ffmpeg_gives(encoder):
    data = filmed(50, encoder=encoder)
    clip = open_clip(data, LIMITS)
    assert (clip.width, clip.height, clip.count, clip.rate) == (96, 64, 50, 30.0)
    whole = decoded(data)
    for wanted in ([0], [49], [0, 49], [3, 20, 21, 22, 48], range(50)):
        assert_frames(clip, list(wanted), whole)


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
def test_what_is_not_needed_is_not_decoded_and_changes_nothing(container):
    data = filmed(90, container=container, options={"g": "12", "bf": "3"})
    clip = open_clip(data, LIMITS)
    whole = decoded(data)
    for wanted in ([40], [0, 89], [11, 12, 13], [5, 30, 31, 32, 71]):
        assert_frames(clip, wanted, whole)


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("libx264", {"x264-params": "open-gop=1:keyint=10:min-keyint=10:bframes=3:scenecut=0"}),
        ("libx265", {"x265-params": "open-gop=1:keyint=10:bframes=3:log-level=none"}),
    ],
)
def test_open_groups_of_pictures_give_the_frames_that_ffmpeg_gives(encoder, options):
    data = filmed(60, encoder=encoder, options=options)
    whole = decoded(data)
    for wanted in ([9], [10], [11], [8, 19, 20, 21, 55]):
        assert_frames(open_clip(data, LIMITS), wanted, whole)


def test_frames_that_are_only_there_to_help_others_are_not_counted():
    data = filmed(
        60,
        encoder="libvpx",
        options={"auto-alt-ref": "1", "lag-in-frames": "25", "deadline": "good", "cpu-used": "0", "b": "60k"},
    )
    clip = open_clip(data, LIMITS)
    assert clip.count == 60
    assert_frames(clip, [0, 31, 59], decoded(data))


@pytest.mark.parametrize("pixels", ["yuv444p", "yuv422p", "yuv420p10le"])
def test_pixel_formats_give_what_ffmpeg_gives(pixels):
    data = filmed(6, pixels=pixels)
    assert_frames(open_clip(data, LIMITS), [0, 3, 5], decoded(data))


def test_odd_sizes_are_kept():
    data = filmed(scene(6, 97, 63), encoder="libvpx-vp9")
    clip = open_clip(data, LIMITS)
    assert (clip.width, clip.height) == (97, 63)
    assert_frames(clip, [0, 5], decoded(data))


@pytest.mark.parametrize(("degrees", "quarters"), [(90, 1), (180, 2), (-90, 3), (45, 0)])
def test_frames_are_turned_upright(degrees, quarters):
    data = filmed(4, rotation=degrees)
    clip = open_clip(data, LIMITS)
    assert (clip.width, clip.height) == ((96, 64) if quarters % 2 == 0 else (64, 96))
    assert_frames(clip, [0, 3], [np.rot90(frame, quarters) for frame in decoded(data)])


def test_frames_are_what_was_filmed():
    clip = open_clip(filmed(30, options={"qp": "1"}), LIMITS)
    for index, frame in zip((2, 17), clip.frames([2, 17]), strict=True):
        error = np.abs(frame.astype(int) - scene(30)[index])
        assert error[32:].mean() < 8  # colours have half the resolution
        assert np.abs(frame.astype(int) - scene(30)[(index + 1) % 30])[32:].mean() > 8


# --- counting and timing ----------------------------------------------------------------------------------------------

IRREGULAR = np.cumsum([0, 40, 33, 33, 100, 33, 20, 33, 500, 33, 33, 67, 33, 33, 33, 33, 40, 33]).tolist()


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_the_rate_of_irregular_frames_is_their_number_by_their_time(container):
    clip = open_clip(filmed(18, container=container, times=IRREGULAR), LIMITS)
    assert clip.count == 18
    assert clip.rate == pytest.approx(18 / 1.163, rel=0.01)


def test_a_rate_that_agrees_with_the_times_is_the_exact_one():
    clip = open_clip(filmed(50, container="matroska", rate=np.int64(24)), LIMITS)
    assert clip.rate == 24.0


def test_a_container_that_counts_no_frames_is_counted():
    assert open_clip(filmed(7, container="matroska"), LIMITS).count == 7


def test_a_video_may_have_one_frame():
    clip = open_clip(filmed(1), LIMITS)
    assert (clip.count, clip.rate) == (1, 30.0)
    assert len(list(clip.frames([0]))) == 1


# --- limits -----------------------------------------------------------------------------------------------------------


def test_limits_are_the_servers():
    data = filmed(60)
    with pytest.raises(TooLarge, match=r"6143 pixels a frame \(--max-image-pixels\)"):
        open_clip(data, limits(image_pixels=96 * 64 - 1))
    with pytest.raises(TooLarge, match="--max-video-duration"):
        open_clip(data, limits(video_seconds=1.9))
    assert open_clip(data, limits(96 * 64, video_seconds=2.0)).count == 60


def test_more_frames_a_second_than_any_video_has_are_too_many():
    with pytest.raises(TooLarge, match=r"more than 240 frames.*--max-video-duration"):
        open_clip(filmed(300, rate=1000), limits(video_seconds=1.0))


def test_a_later_frame_above_the_limit_is_refused():
    small, large = filmed(3, encoder="libvpx"), filmed(scene(3, 640, 480), encoder="libvpx")
    data = _in_one_file(small, large)
    clip = open_clip(data, LIMITS)
    with pytest.raises(DecodeError, match="change their size"):
        list(clip.frames(range(clip.count)))
    clip = open_clip(data, limits(image_pixels=96 * 64))
    with pytest.raises(TooLarge, match="--max-image-pixels"):
        list(clip.frames(range(clip.count)))


def _in_one_file(*videos):
    """Return a WebM file with the packets of several, under the first one's header."""
    into = io.BytesIO()
    with av.open(into, "w", format="webm") as file:
        out, start = None, 0
        for data in videos:
            with av.open(io.BytesIO(data)) as source:
                stream = source.streams.video[0]
                out = out or file.add_stream_from_template(stream)
                for packet in source.demux(stream):
                    if packet.size:
                        packet.stream = out
                        packet.pts = packet.dts = start
                        start += 33
                        file.mux(packet)
    return into.getvalue()


# --- kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_are_videos(kind):
    frames = scene(7, 50, 40)
    clip = open_clip(animated(frames, kind, [40, 60, 100, 50, 40, 40, 40]), LIMITS)
    assert (clip.width, clip.height, clip.count) == (50, 40, 7)
    assert clip.rate == pytest.approx(7 / 0.37)
    for index, frame in zip((0, 3, 6), clip.frames([0, 3, 6]), strict=True):
        difference = np.abs(frame.astype(int) - frames[index])
        assert difference.max() == 0 if kind != "GIF" else difference.mean() < 12  # of at most 256 colours


def test_what_is_transparent_in_an_animation_is_white():
    frames = [np.zeros((20, 30, 4), np.uint8) for _ in range(2)]
    frames[1][5:, 5:] = (10, 20, 30, 255)
    clip = open_clip(animated(frames, "WEBP"), LIMITS)
    first, second = clip.frames([0, 1])
    assert (first == 255).all()
    assert (second[:5] == 255).all()
    assert (second[5:, 5:] == (10, 20, 30)).all()


def test_delays_that_no_player_follows_count_as_a_tenth_of_a_second():
    assert open_clip(animated(5, "GIF", 0), LIMITS).rate == pytest.approx(10)


def test_an_animation_is_as_long_as_its_frames_are_shown():
    data = animated(5, "GIF", 500)
    with pytest.raises(TooLarge, match="--max-video-duration"):
        open_clip(data, limits(video_seconds=2.4))
    with pytest.raises(TooLarge, match="--max-image-pixels"):
        open_clip(data, limits(image_pixels=96 * 64 - 1))
    assert len(list(open_clip(data, limits(96 * 64, video_seconds=2.5)).frames(range(5)))) == 5


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize(
    ("place", "kind", "said"),
    [
        ((30, 30, 96, 64), DecodeError, "change their size"),
        ((500, 500, 96, 64), DecodeError, "change their size"),
        ((60_000, 60_000, 96, 64), TooLarge, "--max-image-pixels"),
    ],
)
def test_a_frame_of_a_gif_that_lies_beyond_its_screen_is_refused_before_it_takes_more_than_the_limit(
    number, place, kind, said
):
    data = animated(scene(3, 96, 64), "GIF")
    starts = [found.start() for found in re.finditer(re.escape(b"\x2c" + struct.pack("<HHHH", 0, 0, 96, 64)), data)]
    start = starts[number] + 1
    clip = open_clip(data[:start] + struct.pack("<HHHH", *place) + data[start + 8 :], limits(600 * 600))
    with pytest.raises(kind, match=said):
        list(clip.frames(range(clip.count)))


def _picture(kind):
    into = io.BytesIO()
    Image.new("RGB", (20, 20)).save(into, kind)
    return into.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_still_picture_is_no_video(kind):
    with pytest.raises(UnsupportedMedia, match="send it as image_url"):
        open_clip(_picture(kind), LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10.0,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"1\n00:00:00,000 --> 00:00:01,000\nHello\n",
        b"RIFF\x24\0\0\0AVI LIST",
        b"file:///etc/passwd",
    ],
)
def test_playlists_texts_and_other_kinds_are_not_read(data):
    with pytest.raises(UnsupportedMedia, match="send MP4"):
        open_clip(data, LIMITS)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_sound_alone_is_no_video(container):
    with pytest.raises(UnsupportedMedia, match="holds no video"):
        open_clip(recorded(container=container), LIMITS)


def test_codecs_that_are_not_on_the_list_are_refused_by_name():
    for encoder in ("mjpeg", "ffv1"):
        data = filmed(3, encoder=encoder, container="matroska", pixels="yuvj420p" if encoder == "mjpeg" else "yuv420p")
        with pytest.raises(UnsupportedMedia, match=f"encoded as {encoder}; send one of H.264, HEVC, VP8, VP9, AV1"):
            open_clip(data, LIMITS)


# --- broken -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("front", [True, False])
def test_a_file_that_is_cut_off_anywhere_is_an_error_or_shorter(encoder, front):
    data = filmed(20, encoder=encoder)
    data = header_first(data) if front and ENCODERS[encoder] == "mp4" else data
    whole = decoded(data)
    for length in range(0, len(data), max(1, len(data) // 60)):
        try:
            clip = open_clip(data[:length], LIMITS)
            assert 1 <= clip.count <= 20
            frames = list(clip.frames(range(clip.count)))
        except (DecodeError, UnsupportedMedia):
            continue
        assert len(frames) == clip.count
        assert np.array_equal(frames[0], whole[0])


@pytest.mark.parametrize("how", [{"encoder": "libvpx"}, {"container": "matroska"}], ids=["WebM", "Matroska"])
def test_a_webm_or_matroska_is_refused_where_it_announces_more_bytes_than_there_are(how):
    data = filmed(20, **how)
    for length in (len(data) - 1, len(data) // 2):
        with pytest.raises(DecodeError, match=f"{len(data):,} bytes, and {length:,} are there"):
            open_clip(data[:length], LIMITS)
    # In front of the segment, which tells the size, there may be filling; and behind it anything.
    segment = data.index(b"\x18\x53\x80\x67")
    filled = data[:segment] + b"\xec\x82" + b"\x18\x53" + data[segment:] + b"\0\0\0"
    assert open_clip(filled, LIMITS).count == 20
    with pytest.raises(DecodeError, match="announces"):
        open_clip(filled[:-4], LIMITS)


def test_a_webm_that_was_written_while_nobody_knew_its_length_is_read_as_far_as_it_goes():
    data = filmed(20, encoder="libvpx", muxer={"live": "1"})
    assert open_clip(data, LIMITS).count == 20
    assert 1 <= open_clip(data[: len(data) // 2], LIMITS).count < 20


@given(st.binary(max_size=60), st.integers(0, 60))
def test_whatever_elements_a_file_has_it_is_not_all_there_or_left_to_ffmpeg(elements, begun):
    with suppress(DecodeError):
        check_whole(memoryview(_webm()[:begun] + elements))


@cache
def _webm():
    return filmed(2, encoder="libvpx")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_files_are_errors_or_give_what_they_were_counted_to_have(data):
    encoder = data.draw(st.sampled_from(sorted(ENCODERS)))
    damaged = bytearray(_FILMED.setdefault(encoder, filmed(8, encoder=encoder)))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        clip = open_clip(bytes(damaged), LIMITS)
        frames = list(clip.frames(range(clip.count)))
    except (MmprepError, MemoryError):
        return
    assert len(frames) == clip.count
    assert {frame.shape for frame in frames} == {(clip.height, clip.width, 3)}


_FILMED = {}
