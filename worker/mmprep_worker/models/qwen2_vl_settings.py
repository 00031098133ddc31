"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: what their processors' configurations mean, and the sizes that follow from it.

The references are transformers' ``Qwen2VLImageProcessorPil``, ``Qwen2VLVideoProcessor`` and ``Qwen3VLVideoProcessor``.
Only configurations that the families honour exactly are taken; the readers here say no to others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from mmprep.errors import InvalidRequest
from mmprep_worker.video.sampling import Sampler

PICTURE_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
#: Dtypes of pixels; ``auto`` is the first.
DTYPES = ("uint8", "float32", "bfloat16", "float16")
QWEN2_VIDEOS, QWEN3_VIDEOS = "Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor"

_BICUBIC = 3
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
#: The reference's defaults; what a configuration leaves out is meant to be this.
_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "resample": _BICUBIC,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
    "do_convert_rgb": True,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "do_center_crop": None,
    "do_pad": None,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
}
_QWEN2_VIDEO_DEFAULTS = {
    **_DEFAULTS,
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
    "max_video_tokens": 128_000,
}
_QWEN3_VIDEO_DEFAULTS = {
    **_DEFAULTS,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "patch_size": 16,
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "max_video_tokens": 768,
}
#: The names of the first release, which win over ``size``, as in the reference's constructor.
_FORMER_NAMES = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))


class Settings(msgspec.Struct, frozen=True):
    """How pictures, and frames of videos, are processed.

    Attributes
    ----------
    patch, merge, times: a patch's side in pixels, a group's side in patches, how many frames a patch spans in time.
    min_pixels, max_pixels: of the resized picture.
    scale, mean, std: normalising, ``(pixel * scale - mean) / std``.
    """

    patch: int
    merge: int
    times: int
    min_pixels: int
    max_pixels: int
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def factor(self) -> int:
        """The side of a group of patches in pixels, of which a resized side is a multiple."""
        return self.patch * self.merge

    @property
    def width(self) -> int:
        """The elements of one patch."""
        return 3 * self.times * self.patch**2


class VideoSettings(msgspec.Struct, frozen=True):
    """How videos are processed.

    Attributes
    ----------
    frame: how their frames are, with the pixels of one frame, or, of a ``whole``, of all of them together.
    whole: whether the pixels of all frames together are limited (Qwen3-VL), or of each (Qwen2-VL, Qwen2.5-VL).
    capped: whether frames are limited further (``cap_pixels_per_frame``), by ``tokens``.
    tokens: of the whole video (Qwen2-VL) or of a frame (Qwen3-VL), ``max_video_tokens``.
    sampler: how the processor takes frames where a request lets it.
    """

    frame: Settings
    whole: bool
    capped: bool
    tokens: int
    sampler: Sampler

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Return the height and width, in pixels, that frames are resized to, as the references' ``resize``.

        Raises
        ------
        InvalidRequest
            One side is more than 200 times the other, or there are fewer frames than the model takes.
        """
        pixels = self.frame.max_pixels
        if self.capped:
            pixels = self._capped(frames)
        settings = msgspec.structs.replace(self.frame, max_pixels=pixels)
        if self.whole:
            return _resize_whole(frames, height, width, settings)
        return smart_resize(height, width, settings, what="frame of the video")

    def _capped(self, frames: int) -> int:
        settings, area = self.frame, self.frame.factor**2
        least = int(settings.min_pixels * 1.05)
        if self.whole:
            return max(min(self.tokens * area, settings.max_pixels // frames), least) * frames
        total = int(self.tokens * area * 0.9)
        return max(min(settings.max_pixels, total * settings.times // frames), least)


def read_settings(config: Mapping[str, Any]) -> Settings | None:
    """Return the settings that an image processor's configuration means, or ``None`` where the family can't honour it.

    Parameters
    ----------
    config:
        ``preprocessor_config.json``, or the ``image_processor`` section of ``processor_config.json``.
    """
    if config.get("image_processor_type", PICTURE_PROCESSORS[0]) not in PICTURE_PROCESSORS:
        return None
    return _read(config, _DEFAULTS, former_names=True)


def read_video_settings(config: Mapping[str, Any], processor: str) -> VideoSettings | None:
    """Return the settings that a video processor's configuration means, or ``None`` where the family can't honour it.

    Parameters
    ----------
    config:
        ``video_preprocessor_config.json``, the ``video_processor`` section of ``processor_config.json``, or, where there
        is neither, what :func:`read_settings` reads.
    processor:
        The model's: :data:`QWEN2_VIDEOS` or :data:`QWEN3_VIDEOS`.
    """
    whole = processor == QWEN3_VIDEOS
    # As AutoVideoProcessor: the name of an image processor stands for that of its video processor, where there is one.
    inferred = str(config.get("image_processor_type", "")).replace("ImageProcessor", "VideoProcessor")
    named = config.get("video_processor_type") or (inferred if inferred == QWEN2_VIDEOS else processor)
    # Qwen2-VL's engines choose frames before the processor sees them; it must not choose again.
    if named != processor or (config.get("do_sample_frames") and not whole):
        return None
    defaults = _QWEN3_VIDEO_DEFAULTS if whole else _QWEN2_VIDEO_DEFAULTS
    frame = _read(config, defaults, former_names=not whole)
    tokens = config.get("max_video_tokens", defaults["max_video_tokens"])
    if frame is None:
        return None
    usual = Sampler(times=frame.times)
    fewest, most = config.get("min_frames", usual.fewest), config.get("max_frames", usual.most)
    if any(type(number) is not int or number < 1 for number in (tokens, fewest, most)):
        return None
    sampler = Sampler(fewest, most, frame.times)
    return VideoSettings(frame, whole, bool(config.get("cap_pixels_per_frame")), tokens, sampler)


def _read(config: Mapping[str, Any], defaults: Mapping[str, Any], *, former_names: bool) -> Settings | None:
    merged = {name: config.get(name, default) for name, default in defaults.items()}
    wanted = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    if not all(merged[name] is True for name in wanted) or merged["do_center_crop"] or merged["do_pad"]:
        return None
    if merged["resample"] != _BICUBIC:
        return None
    size = merged["size"] or defaults["size"]
    size = dict(size) if isinstance(size, Mapping) else {}
    for old, new in _FORMER_NAMES:
        if former_names and config.get(old) is not None:
            size[new] = config[old]
        size.pop(old, None)
    if set(size) != set(defaults["size"]):
        return None
    plain = {
        "patch": merged["patch_size"],
        "merge": merged["merge_size"],
        "times": merged["temporal_patch_size"],
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
        "scale": merged["rescale_factor"],
        "mean": merged["image_mean"],
        "std": merged["image_std"],
    }
    try:
        settings = msgspec.convert(plain, Settings)
    except msgspec.ValidationError:
        return None
    natural = (settings.patch, settings.merge, settings.times, settings.min_pixels, settings.max_pixels)
    return settings if min(natural) > 0 and 0.0 not in settings.std else None


def embeds_width(config: Mapping[str, Any]) -> int | None:
    """Return the width of the embedding of one group of patches, ``None`` where the configuration does not tell.

    It is that of the text model; Qwen3-VL's vision model adds as much again for each level that it hands to deeper layers.

    Parameters
    ----------
    config:
        ``config.json``.
    """
    vision, text = config.get("vision_config") or {}, config.get("text_config") or config
    levels = vision.get("deepstack_visual_indexes")
    width = text.get("hidden_size") if levels is None else vision.get("out_hidden_size")
    return width * (1 + len(levels or ())) if isinstance(width, int) and width > 0 else None


def smart_resize(height: int, width: int, settings: Settings, *, what: str = "picture") -> tuple[int, int]:
    """Return the height and width, in pixels, that a picture is resized to, as the reference's function of that name.

    Parameters
    ----------
    what:
        For the message: what is resized.

    Raises
    ------
    InvalidRequest
        One side is more than 200 times the other, or the picture would have no room for a group of patches.
    """
    _check_shape(height, width, what)
    factor = settings.factor
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > settings.max_pixels:
        beta = math.sqrt((height * width) / settings.max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < settings.min_pixels:
        beta = math.sqrt(settings.min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    if not new_height or not new_width:
        raise InvalidRequest(f"the {what} of {width} by {height} pixels is too small for this model; enlarge it")
    return new_height, new_width


def _resize_whole(frames: int, height: int, width: int, settings: Settings) -> tuple[int, int]:
    """Do what ``smart_resize`` of transformers' Qwen3-VL does: the limits of pixels are for all frames together."""
    factor, times = settings.factor, settings.times
    if frames < times:
        raise InvalidRequest(f"the video has {frames} frame, and this model takes at least {times}; send a picture")
    what = "frame of the video"
    given = height, width
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_shape(height, width, what)
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    new_frames = round(frames / times) * times
    if new_frames * new_height * new_width > settings.max_pixels:
        beta = math.sqrt((frames * height * width) / settings.max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_frames * new_height * new_width < settings.min_pixels:
        beta = math.sqrt(settings.min_pixels / (frames * height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    if not new_height or not new_width:
        raise InvalidRequest(f"the {what} of {given[1]} by {given[0]} pixels is too small for this model; enlarge it")
    return new_height, new_width


def _check_shape(height: int, width: int, what: str) -> None:
    ratio = max(height, width) / min(height, width)
    if ratio > 200:
        raise InvalidRequest(
            f"the {what} is {width} by {height} pixels: one side is {ratio:.0f} times the other, and this model takes "
            "at most 200 times; crop it"
        )
