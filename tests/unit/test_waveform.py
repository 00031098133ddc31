"""What models hear of a recording: the average of its channels, resampled as soxr does, no more than they take."""

import numpy as np
import pytest
import soxr
from tests.recordings import encoded, sound, with_sndfile

from mmprep.errors import DecodeError, TooLarge
from mmprep_worker.audio.recording import open_recording
from mmprep_worker.audio.waveform import resampled_length, waveform

RATE = 16_000


def heard(data, rate=RATE, most=None, max_seconds=3600.0):
    return waveform(open_recording(data, max_seconds=max_seconds), rate, most=most)


def as_librosa(mono, rate, to_rate=RATE):
    """Return what librosa.resample does by default: soxr in quality HQ, then cut or filled up to the rounded-up length."""
    resampled = soxr.resample(mono, rate, to_rate, "HQ")
    length = int(np.ceil(len(mono) * to_rate / rate))
    return np.pad(resampled, (0, max(0, length - len(resampled))))[:length]


@pytest.mark.parametrize("channels", range(1, 9))
def test_the_channels_are_averaged(channels):
    samples = sound(RATE, 0.5, channels)
    mono = heard(encoded("wav-float", samples, RATE))
    assert (mono.dtype, mono.shape) == (np.float32, (len(samples),))
    assert np.array_equal(mono, np.mean(samples.T, axis=0))
    assert np.abs(mono - samples.astype(np.float64).mean(1)).max() < 1e-7


@pytest.mark.parametrize("rate", [4_000, 8_000, 11_025, 12_345, 22_050, 44_100, 48_000, 96_000, 191_999])
def test_resampling_equals_soxr_on_the_whole_to_the_bit(rate):
    samples = sound(rate, 2.3, 2)
    mono = heard(encoded("wav-float", samples, rate))
    assert np.array_equal(mono, as_librosa(np.mean(samples.T, axis=0), rate))


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_a_tone_keeps_its_pitch_and_loudness(rate):
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)).astype(np.float32)[:, None]
    mono = heard(encoded("wav-float", tone, rate))
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert np.abs(mono - expected)[1000:-1000].max() < 1e-4


def test_what_the_rate_cannot_carry_is_filtered_out():
    high = (0.5 * np.sin(2 * np.pi * 15_000 * np.arange(48_000) / 48_000)).astype(np.float32)[:, None]
    assert np.abs(heard(encoded("wav-float", high, 48_000)))[500:-500].max() < 1e-4


@pytest.mark.parametrize("rate", [RATE, 11_025, 44_100, 96_000])
@pytest.mark.parametrize("most", [1, 16_000, 16_001, 40_000])
def test_the_first_samples_are_those_of_the_whole(rate, most):
    data = encoded("wav-float", sound(rate, 6.0, 2), rate)
    assert np.array_equal(heard(data, most=most), heard(data)[:most])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 10, 100, 1000])
@pytest.mark.parametrize("rate", [8_000, 11_025, RATE, 44_100])
def test_a_begun_sample_counts(rate, count):
    mono = heard(encoded("wav-float", sound(rate, 1.0)[:count], rate))
    assert len(mono) == resampled_length(count, rate, RATE) == -(-count * RATE // rate)


def test_decoding_ends_when_there_is_enough():
    samples = sound(RATE, 30.0)
    data = encoded("flac-16", samples, RATE)
    broken = data[: len(data) * 3 // 4]
    assert len(heard(broken, most=RATE)) == RATE
    with pytest.raises(DecodeError, match="truncated"):
        heard(broken)


def test_a_recording_that_goes_on_beyond_the_limit_is_refused_while_it_is_decoded():
    class Endless:
        rate, channels, frames, max_frames = RATE, 1, None, 10 * RATE

        def blocks(self):
            while True:
                yield np.zeros((1000, 1), np.float32)

    with pytest.raises(TooLarge, match="longer than 10 seconds"):
        waveform(Endless(), RATE)
    assert len(waveform(Endless(), 8_000, most=8_000)) == 8_000


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e31, -3e38])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_are_no_numbers_are_refused(wrong, channels):
    samples = sound(RATE, 1.0, channels)
    samples[777, 0] = wrong
    with pytest.raises(DecodeError, match="not all numbers"):
        heard(with_sndfile(samples, RATE, "WAV", "FLOAT"))
    samples[777] = [np.inf, -np.inf][:channels]
    with pytest.raises(DecodeError, match="not all numbers"):
        heard(with_sndfile(samples, RATE, "WAV", "DOUBLE"))


def test_samples_beyond_full_scale_are_numbers():
    samples = sound(RATE, 1.0) * 32_768
    assert np.array_equal(heard(encoded("wav-float", samples, RATE)), samples[:, 0])
