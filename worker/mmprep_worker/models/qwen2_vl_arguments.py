"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: what a request may choose about processing, and what its choice means.

``size`` holds the limits of pixels, as in the configuration: ``shortest_edge`` the least and ``longest_edge`` the most.
Pictures, and videos of the first two, know them by their former names too. Which frames of a video are taken is chosen by
``fps`` or ``num_frames``, as the processor's own ``sample_frames`` does; ``do_sample_frames`` says that it is to.

What a choice can make of a small medium is bounded by what the model's configuration makes of a large one.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from mmprep.arguments import Argument, Value, refused
from mmprep_worker.models.family import MediaLimits
from mmprep_worker.models.qwen2_vl_settings import Settings, VideoSettings
from mmprep_worker.video.sampling import USUAL_RATE, Choice

_SHORTEST, _LONGEST = "size.shortest_edge", "size.longest_edge"
_LOWEST_RATE, _HIGHEST_RATE = 0.001, 1000.0


def picture_arguments(settings: Settings, limits: MediaLimits) -> tuple[Argument, ...]:
    """Return the arguments of a picture, as transformers' ``Qwen2VLImageProcessorPil`` has them."""
    return _size(settings, limits.image_pixels, former_names=True)


def video_arguments(settings: VideoSettings, limits: MediaLimits) -> tuple[Argument, ...]:
    """Return the arguments of a video, as ``Qwen2VLVideoProcessor`` or ``Qwen3VLVideoProcessor`` has them."""
    pixels = limits.image_pixels * (limits.video_frames if settings.whole else 1)
    rate = USUAL_RATE if settings.whole else None
    return (
        *_size(settings.frame, pixels, former_names=not settings.whole),
        Argument("fps", "number", rate, _LOWEST_RATE, _HIGHEST_RATE),
        Argument("num_frames", "whole", None, settings.frame.times, max(settings.frame.times, limits.video_frames)),
        Argument("do_sample_frames", "flag", True, beside=("fps", "num_frames")),
    )


def _size(settings: Settings, pixels: int, *, former_names: bool) -> tuple[Argument, ...]:
    most = max(settings.min_pixels, settings.max_pixels)
    return (
        Argument(_SHORTEST, "whole", settings.min_pixels, 1, most, former=("min_pixels",) if former_names else ()),
        Argument(
            _LONGEST,
            "whole",
            settings.max_pixels,
            1,
            max(most, pixels),
            former=("max_pixels",) if former_names else (),
        ),
    )


def resized_by(settings: Settings, chosen: Mapping[str, Value]) -> Settings:
    """Return the settings with the limits of pixels that were chosen."""
    if _SHORTEST not in chosen and _LONGEST not in chosen:
        return settings
    return msgspec.structs.replace(
        settings,
        min_pixels=int(chosen.get(_SHORTEST, settings.min_pixels)),
        max_pixels=int(chosen.get(_LONGEST, settings.max_pixels)),
    )


def sampled_by(chosen: Mapping[str, Value], read: Choice) -> Choice | None:
    """Return which frames the processor is to take, ``None`` where that was not chosen.

    Parameters
    ----------
    chosen:
        By the arguments' names.
    read:
        What ``media_io_kwargs.video`` has chosen.

    Raises
    ------
    InvalidRequest
        The choice contradicts itself, or frames were chosen by ``media_io_kwargs`` already.
    """
    named = [name for name in ("fps", "num_frames") if name in chosen]
    if not named:
        return None
    if len(named) > 1:
        raise refused("num_frames", "and 'fps' exclude each other; send one of them")
    if chosen.get("do_sample_frames") is False:
        raise refused(
            "do_sample_frames", f"is false, and '{named[0]}' wants frames to be sampled; leave one of them out"
        )
    if read.chooses:
        raise refused(
            named[0], "chooses among all frames, and 'media_io_kwargs.video' has chosen some already; send one"
        )
    number, rate = chosen.get("num_frames"), chosen.get("fps")
    return Choice(None if number is None else int(number), None if rate is None else float(rate))
