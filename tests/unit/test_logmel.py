"""Log-mel features equal those of transformers' WhisperFeatureExtractor to the bit."""

import numpy as np
import pytest
from tests.recordings import sound
from transformers import WhisperFeatureExtractor

from mmprep_worker.audio.logmel import LogMel, LogMelSettings, mel_filters

SAMPLES = 480_000
SETTINGS = {bins: LogMelSettings(bins, 16_000, 400, 160, SAMPLES) for bins in (80, 128)}


def reference(samples, bins=128, **options):
    extract = WhisperFeatureExtractor(feature_size=bins, **options)
    returned = extract(
        [samples],
        sampling_rate=extract.sampling_rate,
        return_attention_mask=True,
        padding="max_length",
        return_tensors="np",
    )
    return returned["input_features"][0], int(returned["attention_mask"].sum())


@pytest.mark.parametrize("bins", SETTINGS)
def test_filters_equal_the_references(bins):
    assert np.array_equal(mel_filters(SETTINGS[bins]), WhisperFeatureExtractor(feature_size=bins).mel_filters)


@pytest.mark.parametrize(
    "count",
    [0, 1, 159, 160, 161, 199, 200, 201, 360, 16_000, 77_777, 479_600, 479_799, 479_801, 479_999, 480_000, 500_000],
)
def test_features_and_their_number_equal_the_references(count):
    samples = sound(16_000, 32.0)[:count, 0]
    features, frames = reference(samples)
    ours = LogMel(SETTINGS[128]).features(samples)
    assert (ours.dtype, ours.shape) == (np.float32, (128, 3000))
    assert np.array_equal(ours, features)
    assert SETTINGS[128].heard(count) == frames


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 32_768.0, 1e29])
def test_features_equal_the_references_however_loud_it_is(scale):
    samples = sound(16_000, 2.0)[:, 0] * np.float32(scale)
    ours = LogMel(SETTINGS[80]).features(samples)
    assert np.isfinite(ours).all()
    assert np.array_equal(ours, reference(samples, 80)[0])


def test_other_windows_rates_and_lengths_equal_the_references():
    samples = sound(24_000, 7.0)[:, 0]
    settings = LogMelSettings(64, 24_000, 512, 240, 24_000 * 5)
    features, frames = reference(samples, 64, sampling_rate=24_000, n_fft=512, hop_length=240, chunk_length=5)
    assert np.array_equal(LogMel(settings).features(samples), features)
    assert (settings.heard(len(samples)), settings.frames) == (frames, 500)
