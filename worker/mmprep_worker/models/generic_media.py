"""What the generic family gives to a model's own processor: decoded media, in the form in which it takes them.

Pictures are given as RGB, with transparency on the background colour: on white, transformers' processors would do the same.
Recordings are given as one channel at the rate of its feature extractor, whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from PIL import Image

from mmprep.arguments import Argument, Value
from mmprep_worker.images.decode import Background, Picture, open_picture
from mmprep_worker.models.family import MediaLimits
from mmprep_worker.models.generic_arguments import as_taken, check_resized, picture_arguments

#: Pictures that the start tries: what the plan says of their headers must be what processing them gives.
PROBES = ((64, 48), (333, 777), (640, 480))
_PROBE_SECONDS = 2


class Taken(Protocol):
    """One modality that a processor takes.

    Attributes
    ----------
    modality: ``image`` or ``audio``.
    token: the text that stands for a medium in the processor's prompts.
    mark: how the processor marks its positions (``create_mm_token_type_ids``).
    deciding: plain data that decides over tensors, for the fingerprint.
    arguments: what requests may choose about it.
    """

    modality: str
    token: str
    mark: int
    deciding: dict[str, Any]
    arguments: tuple[Argument, ...]

    def inputs(self, medium: bytes | memoryview, chosen: Mapping[str, Value]) -> tuple[dict[str, Any], str]:
        """Decode one medium.

        Parameters
        ----------
        chosen:
            By the names of :attr:`arguments`.

        Returns
        -------
        the arguments of the processor that name it, and words that describe it in an error

        Raises
        ------
        mmprep.errors.MediaError
            Broken, too large, or of a kind that is not read.
        """

    def probes(self) -> list[dict[str, Any]]:
        """Return arguments to try the processor with, before the first request."""


class Pictures:
    """Pictures for a processor that takes them."""

    modality = "image"
    mark = 1

    def __init__(self, processor: Any, limits: MediaLimits, background: Background) -> None:
        part = processor.image_processor
        self.token: str = processor.image_token
        self.deciding = {"image_processor": type(part).__name__, "config": part.to_dict()}
        self.arguments = picture_arguments(part)
        self._part = part
        self._background = background
        self._limits = limits

    def opened(self, medium: bytes | memoryview, kwargs: Mapping[str, Any] | None = None) -> Picture:
        """Read a picture's header; raises TooLarge also where the processor, with ``kwargs``, would enlarge it too much."""
        most = self._limits.image_pixels
        picture = open_picture(medium, max_pixels=most)
        check_resized(self._part, kwargs or {}, picture.width, picture.height, most=most)
        return picture

    def inputs(self, medium: bytes | memoryview, chosen: Mapping[str, Value]) -> tuple[dict[str, Any], str]:
        """Decode one picture; see :meth:`Taken.inputs`."""
        kwargs = as_taken(self._part, chosen)
        picture = self.opened(medium, kwargs)
        inputs: dict[str, Any] = {"images": [Image.fromarray(picture.rgb(self._background))]}
        if kwargs:
            inputs["images_kwargs"] = kwargs
        return inputs, f"a picture of {picture.width} by {picture.height} pixels"

    def probes(self) -> list[dict[str, Any]]:
        """Return pictures of the sizes :data:`PROBES`, in their order."""
        return [{"images": [Image.new("RGB", size, (120, 90, 60))]} for size in PROBES]


class Recordings:
    """Recordings for a processor that takes them."""

    modality = "audio"
    mark = 3
    arguments: tuple[Argument, ...] = ()

    def __init__(self, processor: Any, limits: MediaLimits) -> None:
        from mmprep_worker.audio.recording import decoders  # noqa: PLC0415, only models that take sound need its codecs

        part = processor.feature_extractor
        self.token: str = processor.audio_token
        self.deciding = {
            "feature_extractor": type(part).__name__,
            "config": part.to_dict(),
            "decoders": decoders(),
        }
        self._rate = int(part.sampling_rate)
        self._limits = limits

    def inputs(self, medium: bytes | memoryview, chosen: Mapping[str, Value]) -> tuple[dict[str, Any], str]:  # noqa: ARG002, there are none
        """Decode one recording; see :meth:`Taken.inputs`."""
        from mmprep_worker.audio.recording import open_recording  # noqa: PLC0415, as above
        from mmprep_worker.audio.waveform import waveform  # noqa: PLC0415, as above

        samples = waveform(open_recording(medium, max_seconds=self._limits.audio_seconds), self._rate)
        words = f"a recording of {len(samples)} samples at {self._rate} a second"
        return {"audio": [samples], "sampling_rate": self._rate}, words

    def probes(self) -> list[dict[str, Any]]:
        """Return a recording of silence."""
        import numpy as np  # noqa: PLC0415, as above

        return [{"audio": [np.zeros(_PROBE_SECONDS * self._rate, np.float32)], "sampling_rate": self._rate}]


def taken_by(processor: Any, limits: MediaLimits, background: Background) -> list[Taken]:
    """Return the modalities for which a processor has a token and the part that works on them."""
    found: list[Taken] = []
    if _has(processor, "image_token", "image_processor"):
        found.append(Pictures(processor, limits, background))
    if _has(processor, "audio_token", "feature_extractor"):
        found.append(Recordings(processor, limits))
    return found


def _has(processor: Any, token: str, part: str) -> bool:
    return isinstance(getattr(processor, token, None), str) and getattr(processor, part, None) is not None
