"""Qwen2-Audio: Whisper's features of the first 30 seconds, by a kernel that equals transformers' to the bit.

A recording becomes one channel at the model's rate (:mod:`mmprep_worker.audio.waveform`), then log-mel features, filled
up with silence (:mod:`mmprep_worker.audio.logmel`). The encoder halves the frames twice; one placeholder becomes one id
for each frame that is left and hears some of the recording. The reference is transformers' ``Qwen2AudioProcessor``; the
fields are those of vLLM (``qwen2_audio.py``). What comes after the 30 seconds is cut off, as both do.

Only configurations that this code honours exactly are taken; :func:`read_settings` says no to others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmprep.arguments import read_chosen
from mmprep.card import FieldForm, ItemOptions, ModelCard, Placeholder, unpack_io
from mmprep.errors import InvalidRequest
from mmprep.items import ItemMeta, Plan, Run, lay_out
from mmprep_worker.audio.bounds import too_short
from mmprep_worker.audio.logmel import LogMel, LogMelSettings
from mmprep_worker.audio.recording import Recording, open_recording
from mmprep_worker.audio.waveform import resampled_length, waveform
from mmprep_worker.images.tables import cast
from mmprep_worker.models.family import MediaLimits, Prepared
from mmprep_worker.models.injected import embeds

EXTRACTOR = "WhisperFeatureExtractor"
#: ``auto`` is the first.
DTYPES = ("float32", "bfloat16", "float16")

#: The reference's defaults; what a configuration leaves out is meant to be this.
_DEFAULTS: dict[str, Any] = {
    "feature_size": 80,
    "sampling_rate": 16_000,
    "hop_length": 160,
    "chunk_length": 30,
    "n_fft": 400,
}
#: What this code takes for granted.
_FIXED: dict[str, Any] = {
    "feature_extractor_type": EXTRACTOR,
    "padding_value": 0.0,
    "padding_side": "right",
    "dither": 0.0,
}


def read_settings(config: Mapping[str, Any]) -> LogMelSettings | None:
    """Return the settings that a feature extractor's configuration means, or ``None`` where this code can't honour it.

    Parameters
    ----------
    config:
        ``preprocessor_config.json``, or the ``feature_extractor`` section of ``processor_config.json``.
    """
    if any(config.get(name, value) != value for name, value in _FIXED.items()):
        return None
    numbers = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    if not all(isinstance(number, int) and 0 < number < 1 << 20 for number in numbers.values()):
        return None
    settings = LogMelSettings(
        bins=numbers["feature_size"],
        rate=numbers["sampling_rate"],
        window=numbers["n_fft"],
        hop=numbers["hop_length"],
        samples=numbers["chunk_length"] * numbers["sampling_rate"],
    )
    fits = settings.window % 2 == 0 and settings.samples % settings.hop == 0 and settings.window < settings.samples
    return settings if fits else None


def count_tokens(frames: int) -> int:
    """Return how many ids become of so many frames: a convolution and a pooling halve them (the reference's own sum)."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


class Qwen2AudioFamily:
    """The family, for one model directory.

    Parameters
    ----------
    settings:
        Of :func:`read_settings`.
    placeholder:
        The audio token, its id, and the text a template needs in place of a recording.
    fingerprint:
        Of the card.
    limits:
        Of one medium.
    """

    def __init__(
        self, settings: LogMelSettings, placeholder: Placeholder, *, fingerprint: bytes, limits: MediaLimits
    ) -> None:
        self.settings = settings
        self.card = ModelCard(
            family="qwen2_audio",
            fingerprint=fingerprint,
            placeholders=(placeholder,),
            dtypes={"audio": DTYPES},
            normalization={},
            fields={
                "audio": (
                    FieldForm("input_features", DTYPES, (settings.bins, settings.frames), "batched", False),
                    FieldForm("feature_attention_mask", ("int32",), (settings.frames,), "batched", False),
                    FieldForm("audio_num_tokens", ("int64",), (), "batched", True),
                )
            },
        )
        self.kernel = LogMel(settings)
        self._token_id = placeholder.token_id
        self._limits = limits
        #: Samples of the shortest recording that gives an id.
        self._least = next(frames for frames in range(1, 16) if count_tokens(frames)) * settings.hop - settings.hop + 1

    def plan(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Plan:
        """Return the plan of one recording: from its header where that is exact, else by decoding it."""
        recording = self._open(modality, medium, options)
        heard = self._announced(recording)
        return self._plan(len(self.waveform(recording)) if heard is None else heard)

    def check_injected(self, modality: str, plan: Plan, tensors: Mapping[str, NDArray[Any]]) -> None:  # noqa: ARG002, the seam
        """Check that mask, number of ids and expansion agree; see :meth:`Family.check_injected <.family.Family.check_injected>`."""
        mask = tensors["feature_attention_mask"]
        heard = int(np.count_nonzero(mask))
        if not ((mask[:heard] == 1).all() and (mask[heard:] == 0).all()):
            raise InvalidRequest(
                "the mask is 1 for the frames that are heard, then 0", param="fields.feature_attention_mask"
            )
        tokens = count_tokens(heard)
        if tokens < 1 or int(tensors["audio_num_tokens"]) != tokens:
            raise InvalidRequest(
                f"{heard} frames that are heard give {max(tokens, 0)} ids", param="fields.audio_num_tokens"
            )
        if embeds(plan) != tokens:
            raise InvalidRequest(
                f"{embeds(plan)} positions of the expansion take an embedding, and the mask gives {tokens}",
                param="expansion",
            )

    def open(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Prepared:
        """Read one recording's header, and decode it where the header does not tell how long it is.

        Raises
        ------
        mmprep.errors.InvalidRequest
            A modality, dtype or way of reading that is not on the card, or a recording that is too short.
        mmprep.errors.MediaError
            As :func:`mmprep_worker.audio.recording.open_recording` and
            :func:`mmprep_worker.audio.waveform.waveform`.
        """
        started = time.monotonic_ns()
        recording = self._open(modality, medium, options)
        if options.dtype not in DTYPES:
            raise InvalidRequest(f"mm_dtype {options.dtype!r} is not one of {', '.join(DTYPES)}", param="mm_dtype")
        heard, samples = self._announced(recording), None
        if heard is None:
            samples = self.waveform(recording)
            heard = len(samples)
        plan = self._plan(heard)
        settings = self.settings
        meta = ItemMeta(
            modality="audio",
            plan=plan,
            fields=lay_out(
                [
                    ("input_features", options.dtype, (settings.bins, settings.frames), "batched", False),
                    ("feature_attention_mask", "int32", (settings.frames,), "batched", False),
                    ("audio_num_tokens", "int64", (), "batched", True),
                ]
            ),
            cpu={"audio_num_tokens": np.array(plan.length, "<i8").tobytes()},
        )
        return PreparedRecording(self, recording, samples, heard, meta, decode_ns=time.monotonic_ns() - started)

    def waveform(self, recording: Recording) -> NDArray[np.float32]:
        """Decode what the model hears of a recording."""
        return waveform(recording, self.settings.rate, most=self.settings.samples)

    def _open(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Recording:
        if modality != "audio":
            raise InvalidRequest(f"this model takes recordings here, not {modality}")
        for name in unpack_io(options.io):
            raise InvalidRequest(f"recordings can't be read with {name[:64]!r}; leave it out", param="media_io_kwargs")
        read_chosen((), options.kwargs)
        return open_recording(medium, max_seconds=self._limits.audio_seconds)

    def _announced(self, recording: Recording) -> int | None:
        """Return the samples that the model will hear, where the header tells exactly."""
        if recording.frames is None:
            return None
        return min(resampled_length(recording.frames, recording.rate, self.settings.rate), self.settings.samples)

    def _plan(self, heard: int) -> Plan:
        tokens = count_tokens(self.settings.heard(heard))
        if tokens < 1:
            raise too_short(heard, self._least, self.settings.rate)
        return Plan((Run(self._token_id, tokens),))


class PreparedRecording:
    """One recording of the family, opened; decoded too where its header did not tell how long it is."""

    def __init__(
        self,
        family: Qwen2AudioFamily,
        recording: Recording,
        samples: NDArray[np.float32] | None,
        heard: int,
        meta: ItemMeta,
        *,
        decode_ns: int,
    ) -> None:
        self.meta = meta
        self.decode_ns = decode_ns
        self._family = family
        self._recording = recording
        self._samples = samples
        self._heard = heard

    def fill(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Decode and write the features; see :meth:`mmprep_worker.models.family.Prepared.fill`."""
        started = time.monotonic_ns()
        samples = self._family.waveform(self._recording) if self._samples is None else self._samples
        self.decode_ns += time.monotonic_ns() - started
        assert len(samples) == self._heard, "what is decoded is as long as its header says, or refused"
        features = self._family.kernel.features(samples)
        tensors["input_features"][...] = cast(features, self.meta.fields[0].dtype)
        tensors["feature_attention_mask"][:] = 0
        tensors["feature_attention_mask"][: self._family.settings.heard(self._heard)] = 1
        tensors["audio_num_tokens"][...] = self.meta.plan.length
