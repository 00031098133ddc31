"""From a recording to what models hear: one channel, at their rate, no longer than they take.

The channels are averaged, then resampled by soxr in its quality HQ. Both are what librosa does by default, and vLLM with
its soxr resampler (``vllm/multimodal/audio.py``; its own default, torchaudio, has a shorter filter). So is the length:
the seconds stay the same, and a begun sample counts.

Everything goes through in blocks, so that only what the model takes is held; decoding ends when it has enough.
"""

from __future__ import annotations

import numpy as np
import soxr
from numpy.typing import NDArray

from mmprep.errors import DecodeError
from mmprep_worker.audio.bounds import check_seconds
from mmprep_worker.audio.recording import Recording

#: Far above what any format means by full scale, and far below what a sum of squares cannot hold.
_LOUDEST = 1e30


def resampled_length(frames: int, rate: int, to_rate: int) -> int:
    """Return how many samples become of ``frames`` when they are resampled."""
    return -(-frames * to_rate // rate)


def waveform(recording: Recording, rate: int, *, most: int | None = None) -> NDArray[np.float32]:
    """Decode a recording to one channel.

    Parameters
    ----------
    recording:
        Opened, and not decoded before.
    rate:
        Samples a second of the result.
    most:
        Samples of the result after which the rest is left out; ``None``: all of them.

    Returns
    -------
    float32 ndarray (samples,)

    Raises
    ------
    DecodeError
        Broken or truncated, or its samples are no numbers.
    TooLarge
        Longer than its limit.
    """
    resampler = None if recording.rate == rate else soxr.ResampleStream(recording.rate, rate, 1, "float32", "HQ")
    parts: list[NDArray[np.float32]] = []
    decoded = ready = 0
    for block in recording.blocks():
        decoded += len(block)
        if decoded > recording.max_frames:
            check_seconds(decoded / recording.rate, recording.max_frames / recording.rate)
        part = _mono(block)
        parts.append(part if resampler is None else resampler.resample_chunk(part))
        ready += len(parts[-1])
        if most is not None and ready >= most:
            return np.concatenate(parts)[:most]
    if recording.frames is not None and decoded != recording.frames:
        raise DecodeError(
            f"the recording is truncated or broken: {decoded} of {recording.frames} samples could be decoded; send all "
            "of it"
        )
    if resampler is not None:
        parts.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    whole = np.zeros(resampled_length(decoded, recording.rate, rate), np.float32)
    joined = np.concatenate([*parts, np.empty(0, np.float32)])[: len(whole)]
    whole[: len(joined)] = joined
    return whole[:most]


def _mono(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the average of the channels of a block (samples, channels)."""
    with np.errstate(over="ignore", invalid="ignore"):
        mono: NDArray[np.float32] = np.ascontiguousarray(np.mean(block.T, axis=0))
    if len(mono) and not np.abs(mono).max() < _LOUDEST:
        raise DecodeError("the recording's samples are not all numbers (NaN or infinite); encode it anew")
    return mono
