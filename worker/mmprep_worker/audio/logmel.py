"""Log-mel features as Whisper's, by a kernel that needs neither torch nor transformers.

The reference is transformers' ``WhisperFeatureExtractor`` without torch; the features equal its to the bit, since the
same operations are done on the same values in the same order. Where it takes one frame of samples at a time in Python,
all frames that hear anything are transformed at once here, and the silence behind them is not transformed at all.

The mel scale is that of Slaney's Auditory Toolbox (1998): linear below 1000 Hz, logarithmic above, each filter divided
by its width.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

#: Part of the fingerprint: another number where this code gives other features.
KERNEL_VERSION = 1

#: The highest frequency that filters reach, in Hz, whatever the rate.
_HIGHEST = 8000.0
_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0
_LEAST = 1e-10


class LogMelSettings(msgspec.Struct, frozen=True):
    """How features are made of samples.

    Attributes
    ----------
    bins: mel bands, the features' first dimension.
    rate: samples a second.
    window: samples that one frame hears, Whisper's ``n_fft``.
    hop: samples from one frame to the next.
    samples: that are heard of a recording; what is shorter is filled up with silence.
    """

    bins: int
    rate: int
    window: int
    hop: int
    samples: int

    @property
    def frames(self) -> int:
        """Frames of every recording, the features' second dimension."""
        return self.samples // self.hop

    def heard(self, samples: int) -> int:
        """Return how many frames begin within the first ``samples`` of a recording."""
        return -(-min(samples, self.samples) // self.hop)


class LogMel:
    """The kernel, for one kind of features."""

    def __init__(self, settings: LogMelSettings) -> None:
        self._settings = settings
        self._filters = mel_filters(settings)
        self._hann = np.hanning(settings.window + 1)[:-1]

    def features(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the features of a recording.

        Parameters
        ----------
        samples:
            float32 (n,), from -1 to 1. What is beyond the settings' ``samples`` is not heard.

        Returns
        -------
        float32 ndarray (bins, frames)
        """
        settings = self._settings
        padded = np.zeros(settings.samples, np.float32)
        heard = samples[: settings.samples]
        padded[: len(heard)] = heard
        logs = np.log10(np.maximum(_LEAST, np.dot(self._filters.T, self._power(padded, len(heard)).T)))
        # The last frame is centred on the end, and left out.
        features: NDArray[np.float32] = logs.astype(np.float32)[:, :-1]
        features = np.maximum(features, features.max() - 8.0)
        return (features + 4.0) / 4.0

    def _power(self, padded: NDArray[np.float32], heard: int) -> NDArray[np.float64]:
        """Return the power spectrum of every frame, (frames + 1, window / 2 + 1); only the first ``heard`` are not silent."""
        settings = self._settings
        half = settings.window // 2
        centred = np.pad(padded, half, mode="reflect").astype(np.float64)
        frames = np.lib.stride_tricks.sliding_window_view(centred, settings.window)[:: settings.hop]
        # The end is reflected: where it is heard, so are all frames.
        whole = heard + half > settings.samples - half
        count = len(frames) if whole else min(len(frames), (heard + half) // settings.hop + 1)
        power = np.zeros((len(frames), half + 1))
        spectrum = np.fft.rfft(frames[:count] * self._hann).astype(np.complex64)
        power[:count] = np.abs(spectrum, dtype=np.float64) ** 2.0
        return power


def mel_filters(settings: LogMelSettings) -> NDArray[np.float64]:
    """Return what each frequency of a spectrum counts in each band, float64 (window / 2 + 1, bins)."""
    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(_HIGHEST), settings.bins + 2))
    frequencies = np.linspace(0, settings.rate // 2, settings.window // 2 + 1)
    widths = np.diff(edges)
    slopes = edges[None, :] - frequencies[:, None]
    falling = slopes[:, 2:] / widths[1:]
    rising = -slopes[:, :-2] / widths[:-1]
    triangles: NDArray[np.float64] = np.maximum(np.zeros(1), np.minimum(rising, falling))
    return triangles * (2.0 / (edges[2:] - edges[:-2]))[None, :]


def _hz_to_mel(frequency: float) -> float:
    """Return a frequency from the break on as mel."""
    return float(_BREAK_MEL + np.log(frequency / _BREAK_HZ) * (27.0 / np.log(6.4)))


def _mel_to_hz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    step = np.log(6.4) / 27.0
    return np.where(mels >= _BREAK_MEL, _BREAK_HZ * np.exp(step * (mels - _BREAK_MEL)), 200.0 * mels / 3.0)
