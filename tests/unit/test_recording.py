"""Recordings are opened by content, decode to what was encoded, and are never more than their limits."""

import io
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
from tests.recordings import (
    FORMATS,
    LOSSLESS,
    encoded,
    ogg_checksum,
    sound,
    with_ffmpeg,
    with_granule,
    with_sndfile,
    without_length,
)

from mmprep.errors import DecodeError, TooLarge, UnsupportedMedia
from mmprep_worker.audio.bounds import MAX_CHANNELS, MAX_RATE, MIN_RATE
from mmprep_worker.audio.kinds import READ, Kind, sniff
from mmprep_worker.audio.recording import open_recording
from mmprep_worker.audio.waveform import waveform

HOUR = 3600.0


def rate_of(name, wanted=22_050):
    rates = FORMATS[name].rates
    return wanted if not rates or wanted in rates else rates[-1]


def decoded(data, max_seconds=HOUR):
    """Return what the recording decodes to, float32 (samples, channels)."""
    recording = open_recording(data, max_seconds=max_seconds)
    return np.concatenate([*recording.blocks(), np.empty((0, recording.channels), np.float32)])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", LOSSLESS)
def test_what_keeps_samples_decodes_to_those_that_were_encoded(name, channels):
    rate = rate_of(name)
    samples = sound(rate, 3.3, channels)
    back = decoded(encoded(name, samples, rate))
    assert (back.dtype, back.shape) == (np.float32, samples.shape)
    assert np.abs(back - samples).max() <= FORMATS[name].error


@pytest.mark.parametrize("name", sorted(set(FORMATS) - set(LOSSLESS)))
def test_what_loses_something_still_sounds_the_same(name):
    rate = rate_of(name)
    samples = sound(rate, 2.0)
    back = decoded(encoded(name, samples, rate))
    assert -0.1 * rate <= len(back) - len(samples) <= 0.15 * rate
    given, heard = samples[:, 0], back[: len(samples), 0]
    heard = np.pad(heard, (0, len(given) - len(heard)))
    spectra = np.fft.rfft(given, 2 * len(given)), np.fft.rfft(heard, 2 * len(given))
    alike = np.fft.irfft(spectra[0].conj() * spectra[1]).max() / np.linalg.norm(given) / np.linalg.norm(heard)
    assert alike > 0.95


@pytest.mark.parametrize("name", FORMATS)
def test_the_header_tells_the_length_exactly_or_not_at_all(name):
    rate = rate_of(name)
    recording = open_recording(encoded(name, sound(rate, 1.7, 2), rate), max_seconds=HOUR)
    assert (recording.rate, recording.channels, recording.frames is not None) == (rate, 2, FORMATS[name].exact)
    if recording.frames is not None:
        assert sum(map(len, recording.blocks())) == recording.frames


@pytest.mark.parametrize("name", ["wav-16", "flac-16", "ogg-vorbis", "ogg-opus", "wav-ima"])
def test_blocks_are_the_whole_cut_in_pieces(name):
    rate = rate_of(name)
    data = encoded(name, sound(rate, 12.0, 2), rate)
    blocks = list(open_recording(data, max_seconds=HOUR).blocks())
    assert len(blocks) > 3
    whole, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    assert np.array_equal(np.concatenate(blocks), whole)


@pytest.mark.parametrize("rate", [4_000, 8_000, 11_025, 12_345, 44_100, 96_000, 192_000])
def test_any_sane_rate_is_read(rate):
    samples = sound(rate, 0.2)
    recording = open_recording(encoded("wav-16", samples, rate), max_seconds=HOUR)
    assert (recording.rate, recording.frames) == (rate, len(samples))


@pytest.mark.parametrize("channels", range(1, MAX_CHANNELS + 1))
def test_up_to_eight_channels_are_read(channels):
    samples = sound(16_000, 0.2, channels)
    assert np.array_equal(decoded(encoded("wav-float", samples, 16_000)), samples)


# --- what is read -----------------------------------------------------------------------------------------------------

KINDS = {
    "wav-16": Kind.WAV,
    "rf64": Kind.WAV,
    "aiff-16": Kind.AIFF,
    "flac-16": Kind.FLAC,
    "ogg-opus": Kind.OGG,
    "mp3": Kind.MP3,
    "m4a-aac": Kind.MP4,
    "webm-opus": Kind.WEBM,
}


def id3(size):
    """Return an ID3v2 tag with so many bytes of nothing."""
    return b"ID3\x04\x00\x00" + bytes([size >> 21, size >> 14 & 0x7F, size >> 7 & 0x7F, size & 0x7F]) + bytes(size)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_known_by_its_first_bytes(name):
    data = encoded(name, sound(rate_of(name), 0.3), rate_of(name))
    assert sniff(memoryview(data)) == (KINDS[name], 0)
    assert sniff(memoryview(data[:4]))[0] in {None, KINDS[name]}


@pytest.mark.parametrize("name", ["flac-16", "mp3-bare", "wav-16"])
def test_tags_before_a_recording_are_passed_over(name):
    rate = rate_of(name)
    data = encoded(name, sound(rate, 0.5), rate)
    assert np.array_equal(decoded(id3(3000) + id3(20) + data), decoded(data))


WAV = encoded("wav-16", sound(16_000, 0.1), 16_000)
WAVEX = encoded("wav-extensible", sound(16_000, 0.1), 16_000)
OTHERS = {
    "nothing": b"",
    "one byte": b"R",
    "HTML": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "a playlist": b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1/a.ts\n",
    "a list of files": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "a session description": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 96\n",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "an AVI": b"RIFF\x24\x00\x00\x00AVI LIST" + bytes(100),
    "MIDI": b"MThd\x00\x00\x00\x06\x00\x01\x00\x01\x00\x60" + bytes(50),
    "AMR": b"#!AMR\n" + bytes(100),
    "AAC without a container": b"\xff\xf1\x50\x80\x02\x1f\xfc" + bytes(100),
    "zeros": bytes(1000),
    "W64": with_sndfile(sound(seconds=0.1), 16_000, "W64", "PCM_16"),
    "AU": with_sndfile(sound(seconds=0.1), 16_000, "AU", "PCM_16"),
    "CAF": with_sndfile(sound(seconds=0.1), 16_000, "CAF", "PCM_16"),
    "a WAV with GSM": with_sndfile(sound(8000, 0.5), 8_000, "WAV", "GSM610"),
    "a WAV with MP3": WAV[:20] + b"\x55\x00" + WAV[22:],
    "a WAV with MP3 behind an extension": WAVEX.replace(
        b"\x01\x00\x00\x00\x00\x00\x10", b"\x55\x00\x00\x00\x00\x00\x10"
    ),
    "a video without sound": with_ffmpeg(None, 0, "mp4", None, video="mpeg4"),
    "a WebM without sound": with_ffmpeg(None, 0, "webm", None, video="libvpx"),
    "an MP4 with AC-3": with_ffmpeg(sound(48_000, 0.5, 2), 48_000, "mp4", "ac3"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_recording_that_is_read_is_unsupported(what):
    with pytest.raises(UnsupportedMedia, match=f"send|{READ}"):
        open_recording(OTHERS[what], max_seconds=HOUR)


def test_the_sound_of_a_video_is_a_recording():
    samples = sound(48_000, 1.0, 2)
    for container, codec, sample_format, video in (
        ("mp4", "aac", "fltp", "mpeg4"),
        ("webm", "libopus", "flt", "libvpx"),
    ):
        data = with_ffmpeg(samples, 48_000, container, codec, sample_format=sample_format, video=video)
        assert abs(len(decoded(data)) - len(samples)) < 3000


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_recording_above_the_limit_of_seconds_is_refused(name):
    rate = rate_of(name, 16_000)
    data = encoded(name, sound(rate, 5.0), rate)
    with pytest.raises(TooLarge, match=r"longer than 4 seconds.*--max-audio-duration"):
        waveform(open_recording(data, max_seconds=4.0), 16_000)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"mp3", "mp3-id3", "mp3-bare"}))
def test_it_is_refused_before_it_is_decoded(name):
    rate = rate_of(name, 16_000)
    data = encoded(name, sound(rate, 5.0), rate)
    with pytest.raises(TooLarge, match="longer than 4 seconds"):
        open_recording(data, max_seconds=4.0)


def mp3_of_silence(seconds):
    """Return an MP3 of 8,000 bits and samples a second: one silent frame, again and again."""
    header = struct.pack(">I", 0xFFE31800 | 0xC0)  # MPEG 2.5, layer III, 8 kbit/s, 8000 Hz, mono
    return (header + bytes(68)) * int(seconds / 0.072)


def test_a_long_mp3_is_counted_without_decoding_it():
    data = mp3_of_silence(10 * HOUR)
    assert len(data) < 40 << 20
    with pytest.raises(TooLarge, match="longer than 3600 seconds"):
        open_recording(data, max_seconds=HOUR)
    assert open_recording(mp3_of_silence(1800), max_seconds=HOUR).rate == 8_000


def test_a_length_that_a_header_makes_up_is_too_long_or_broken_and_takes_no_memory():
    flac = encoded("flac-16", sound(8_000, 1.0), 8_000)
    wav = bytearray(encoded("wav-16", sound(16_000, 0.0), 16_000))
    wav[40:44] = struct.pack("<I", 16_000 * 2 * 36_000)
    tracemalloc.start()
    for data, error, words in (
        (without_length(flac, 8_000 * 36_000), TooLarge, "longer than 3600"),
        (without_length(flac, 2**36 - 1), TooLarge, "longer than 3600"),
        (bytes(wav), DecodeError, "truncated: its header promises 1152000000 bytes of samples, and 0 are there"),
    ):
        with pytest.raises(error, match=words):
            open_recording(data, max_seconds=HOUR)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["ogg-vorbis", "ogg-opus"])
def test_an_ogg_that_claims_to_end_after_ten_hours_gives_what_is_there_or_a_refusal(name):
    rate = rate_of(name, 8_000)
    data = encoded(name, sound(rate, 1.0), rate)
    told = []
    for granule in (rate * 36_000, 48_000 * 36_000, 2**63 - 1, 2**64 - 1, 0):
        try:
            told.append(len(decoded(with_granule(data, granule))))
        except REFUSALS as error:
            told.append(str(error))
    assert not [length for length in told if isinstance(length, int) and length > 1.1 * rate], told


def test_a_length_below_the_truth_is_believed():
    samples = sound(8_000, 4.0)
    data = without_length(encoded("flac-16", samples, 8_000), 8_000)
    assert np.abs(decoded(data) - samples[:8_000]).max() < 1e-4


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_wav_whose_length_was_not_known_when_it_began_is_read_to_its_end(size):
    samples = sound(16_000, 1.0)
    wav = bytearray(encoded("wav-float", samples, 16_000))
    at = wav.index(b"data")
    wav[at + 4 : at + 8] = struct.pack("<I", size)
    assert np.array_equal(decoded(bytes(wav)), samples)


@pytest.mark.parametrize("channels", [MAX_CHANNELS + 1, 64, 1024])
def test_more_channels_than_people_hear_are_refused(channels):
    data = encoded("wav-16", np.zeros((100, channels), np.float32), 16_000)
    with pytest.raises(TooLarge, match=f"{channels} channels, above the limit of {MAX_CHANNELS}"):
        open_recording(data, max_seconds=HOUR)


@pytest.mark.parametrize("rate", [1, MIN_RATE - 1, MAX_RATE + 1, 2**31 - 1])
def test_rates_that_nobody_records_at_are_refused(rate):
    wav = bytearray(encoded("wav-16", sound(16_000, 0.1), 16_000))
    wav[24:28] = struct.pack("<I", rate)
    with pytest.raises(UnsupportedMedia, match=f"{rate} samples a second; from {MIN_RATE} to {MAX_RATE}"):
        open_recording(bytes(wav), max_seconds=HOUR)


# --- broken -----------------------------------------------------------------------------------------------------------

#: What may be said of a recording that is broken or not all there.
REFUSALS = (DecodeError, UnsupportedMedia, TooLarge)


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_recording_is_refused_or_is_the_beginning_of_the_whole(name, capfd):
    rate = rate_of(name)
    samples = sound(rate, 1.5)
    data = encoded(name, samples, rate)
    refused = 0
    for cut in sorted({*range(0, 64, 3), *np.linspace(64, len(data) - 1, 50, dtype=int)}):
        try:
            back = decoded(data[:cut])
        except REFUSALS:
            refused += 1
            continue
        assert len(back) <= len(samples) + 0.15 * rate
        if FORMATS[name].error is not None and len(back):
            assert np.abs(back[: len(samples)] - samples[: len(back)]).max() <= FORMATS[name].error
    assert refused > 10
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["wav-16", "wav-ima", "rf64", "aiff-16", "flac-16", "m4a-aac", "m4a-fragments"])
def test_half_a_recording_is_refused_where_its_header_tells_its_length(name):
    rate = rate_of(name)
    data = encoded(name, sound(rate, 4.0), rate)
    with pytest.raises(DecodeError, match=r"truncated|broken"):
        waveform(open_recording(data[: len(data) // 2], max_seconds=HOUR), rate)


def test_what_is_no_part_of_an_mp3_is_passed_over():
    rate = 48_000
    data = encoded("mp3-bare", sound(rate, 2.0), rate)
    junk = np.random.default_rng(3).integers(0, 128, 4000, dtype=np.uint8).tobytes()
    whole = decoded(data)
    for other in (data + bytes(5000), data + b"TAG" + bytes(125), data + b"APETAGEX" + bytes(2000), data + junk):
        assert np.array_equal(decoded(other)[: len(whole)], whole)
    assert len(decoded(data + data)) == 2 * len(whole)


def test_a_recording_that_changes_its_rate_midway_is_refused():
    joined = b"".join(encoded("mp3-bare", sound(rate, 1.0), rate) for rate in (48_000, 44_100))
    with pytest.raises(DecodeError, match="changes its rate"):
        decoded(joined)


# --- work that the bytes are not worth -------------------------------------------------------------------------------


def behind(data, at, what):
    return data[:at] + what + data[at:]


def patched(data, at, *numbers):
    """Return ``data`` with big-endian numbers of 32 bits written at a place."""
    new = struct.pack(f">{len(numbers)}I", *numbers)
    return data[:at] + new + data[at + len(new) :]


def box(kind, body=b""):
    return struct.pack(">I4s", 8 + len(body), kind) + body


M4A = encoded("m4a-aac", sound(16_000, 0.5), 16_000)
FRAGMENTS = encoded("m4a-fragments", sound(16_000, 0.5), 16_000)
OGG = encoded("ogg-vorbis", sound(16_000, 0.5), 16_000)
FLAC = encoded("flac-16", sound(16_000, 0.5), 16_000)
COSTLY = {
    "chunks before the samples of a WAV": (behind(WAV, 36, b"junk\0\0\0\0" * 5_000), "far too many chunks"),
    "blocks of metadata of a FLAC": (behind(FLAC, 42, b"\x01\0\0\0" * 5_000), "far too many blocks"),
    "fifty million samples in an MP4": (patched(M4A, M4A.index(b"stsz") + 8, 1, 50_000_000), "more samples than"),
    "four billion samples in an MP4": (patched(M4A, M4A.index(b"stsz") + 8, 0, 2**32 - 1), "more samples than"),
    "fifty million samples in a fragment": (
        patched(FRAGMENTS, FRAGMENTS.index(b"trun") + 8, 50_000_000),
        "more samples",
    ),
    "boxes in an MP4": (M4A + box(b"free") * 100_000, "far too many boxes"),
    "boxes in boxes of an MP4": (M4A + box(b"moov", box(b"udta", box(b"name") * 100_000)), "far too many boxes"),
    "boxes that nobody knows": (M4A + box(b"moov", box(b"abcd", bytes(1 << 21))), "far too many boxes"),
    "a compressed header": (M4A + box(b"moov", box(b"cmov", box(b"dcom", b"zlib"))), "compressed"),
    "pages of an Ogg": (
        OGG + ogg_checksum(OGG[:5] + b"\0" + OGG[6:26] + b"\0" + OGG[27:27]) * 500_001,
        "too many pages",
    ),
    "beginnings of pages behind an Ogg": (OGG + b"OggS" * 50_000, "no page of the Ogg begins at byte"),
    "beginnings of pages within a page": (
        OGG + (ogg_checksum(OGG[:5] + b"\0" + OGG[6:26] + b"\xff" + b"\xff" * 255 + b"OggS" * 16_256 + b"O")) + OGG,
        "beginnings of pages within",
    ),
}


@pytest.mark.parametrize("what", COSTLY)
def test_what_would_cost_far_more_than_its_bytes_is_refused_before_a_library_sees_it(what, monkeypatch):
    def seen(*_, **__):
        raise AssertionError("a library sees it")

    monkeypatch.setattr("soundfile.SoundFile", seen)
    monkeypatch.setattr("av.open", seen)
    data, words = COSTLY[what]
    with pytest.raises(DecodeError, match=words):
        open_recording(data, max_seconds=HOUR)


def test_what_stands_behind_the_last_page_of_an_ogg_is_left_out():
    assert np.array_equal(decoded(OGG + b"TAG" + bytes(125)), decoded(OGG))
    assert np.array_equal(decoded(OGG + OGG[:26]), decoded(OGG))


def test_an_ogg_with_a_hole_is_refused():
    at = OGG.rindex(b"OggS") - 100
    with pytest.raises(DecodeError, match="no page of the Ogg begins at byte"):
        open_recording(OGG[:at] + OGG[at + 3 :], max_seconds=HOUR)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"wav-double", "aiff-little", "mp3-id3"}))
def test_changed_bytes_give_samples_or_a_refusal_and_nothing_on_standard_error(name, capfd):
    rate = rate_of(name)
    data = encoded(name, sound(rate, 0.4), rate)
    random, told = np.random.default_rng(9), []
    for _ in range(40):
        changed = bytearray(data)
        for at in random.integers(0, min(len(data), int(random.choice([80, 400, len(data)]))), random.integers(1, 6)):
            changed[at] = random.integers(256)
        try:
            decoded(bytes(changed), 60.0)
        except REFUSALS as error:
            told.append(str(error))
    assert not [words for words in told if "0x" in words or " object" in words]
    assert capfd.readouterr() == ("", "")
