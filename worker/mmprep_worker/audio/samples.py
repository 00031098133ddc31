"""Short recordings, made on the spot: what a lane warms up with, one for each library and each way through it."""

from __future__ import annotations

import io

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

_SECONDS = 0.25


def recordings() -> list[bytes]:
    """Return a WAV at a rate that has to be resampled, an Ogg and an MP4, each of a quarter of a second."""
    return [_sndfile("WAV", "PCM_16", 44_100), _sndfile("OGG", "VORBIS", 16_000), _mp4(48_000)]


def _tone(rate: int) -> NDArray[np.float32]:
    """Return a tone of 440 Hz on the left and of 660 Hz on the right, float32 (samples, 2)."""
    times = np.arange(int(_SECONDS * rate))[:, None] / rate
    tone: NDArray[np.float32] = (0.5 * np.sin(2 * np.pi * times * np.array([440, 660]))).astype(np.float32)
    return tone


def _sndfile(container: str, coding: str, rate: int) -> bytes:
    into = io.BytesIO()
    soundfile.write(into, _tone(rate), rate, format=container, subtype=coding)
    return into.getvalue()


def _mp4(rate: int) -> bytes:
    into = io.BytesIO()
    with av.open(into, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(_tone(rate).T), format="fltp", layout="stereo")
        frame.sample_rate = rate
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return into.getvalue()
