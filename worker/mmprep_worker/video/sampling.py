"""Which frames of a video are taken: the rules that vLLM follows for a model family by default, and the processors' own.

Frames are chosen by number, as if they were evenly spaced in time. ``num_frames`` and ``fps`` come from a request's
``media_io_kwargs.video``, or, for the processors' rules, from its ``mm_processor_kwargs``; ``--max-video-frames`` bounds
what any rule takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from mmprep.arguments import refused
from mmprep.card import IoValue
from mmprep.errors import InvalidRequest

#: What vLLM's ``VideoMediaIO`` takes where nothing is asked for.
_USUAL_FRAMES = 32
#: vLLM's ``Qwen3VLVideoBackend``, which are the defaults of transformers' ``Qwen3VLVideoProcessor``.
USUAL_RATE, _HIGHEST_RATE, _FEWEST, _MOST = 2.0, 30.0, 4, 768

_ANY = -1


class Choice(NamedTuple):
    """What a request asks for; ``None`` where it does not.

    Attributes
    ----------
    num_frames: how many frames, or -1: no bound by number.
    fps: frames a second of the video.
    """

    num_frames: int | None = None
    fps: float | None = None

    @property
    def chooses(self) -> bool:
        """Whether fewer than all frames are asked for."""
        return self.fps is not None or self.num_frames not in (None, _ANY)


class Sampler(NamedTuple):
    """A processor's own way of taking frames, of its configuration.

    Attributes
    ----------
    fewest, most: frames that ``fps`` gives, ``min_frames`` and ``max_frames``.
    times: frames that a patch spans, ``temporal_patch_size``.
    """

    fewest: int = _FEWEST
    most: int = _MOST
    times: int = 2


#: Takes the frames that there are, their rate, what was asked for, and the most; returns ascending indices.
Rule: TypeAlias = Callable[[int, float, Choice, int], list[int]]


def read_choice(io: Mapping[str, IoValue], *, most: int) -> Choice:
    """Return what a request's ``media_io_kwargs.video`` asks for.

    Parameters
    ----------
    io:
        As :func:`mmprep.card.unpack_io` gives it.
    most:
        Frames that may be asked for, ``--max-video-frames``.

    Raises
    ------
    InvalidRequest
        An unknown name, a wrong type or a value out of range; ``param`` names it.
    """
    unknown = next((name for name in io if name not in Choice._fields), None)
    if unknown is not None:
        raise InvalidRequest(
            f"'{unknown}' is not known here; videos are read by num_frames and fps.",
            param=f"media_io_kwargs.video.{unknown}",
        )
    return Choice(_number_of_frames(io.get("num_frames"), most), _frame_rate(io.get("fps")))


def _number_of_frames(value: IoValue, most: int) -> int | None:
    if value is None or (type(value) is int and (value == _ANY or 1 <= value <= most)):
        return value
    raise InvalidRequest(
        f"num_frames must be a whole number from 1 to {most} (--max-video-frames), or -1 for all that there are.",
        param="media_io_kwargs.video.num_frames",
    )


def _frame_rate(value: IoValue) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise InvalidRequest("fps must be a number above 0.", param="media_io_kwargs.video.fps")


def spread(count: int, rate: float, choice: Choice, most: int) -> list[int]:
    """Return indices spread evenly from the first frame to the last, rounded down; 32 where nothing is asked for.

    With ``fps`` as well, the fewer of both. This is vLLM's ``VideoBackend``, which serves Qwen2-VL and Qwen2.5-VL.
    """
    asked = _USUAL_FRAMES if choice.num_frames is None else choice.num_frames
    taken = count if asked == _ANY else min(asked, count)
    if choice.fps is not None:
        taken = math.floor(min(taken, count / rate * choice.fps))
    taken = min(max(1, taken), most)
    if taken == count:  # where a rounding error of the division below would skip one
        return list(range(count))
    return [int(index) for index in np.linspace(0, count - 1, taken, dtype=int)]


def paced(count: int, rate: float, choice: Choice, most: int) -> list[int]:
    """Return indices at ``fps`` frames a second, rounded to the nearest; 2 where nothing is asked for.

    At least 4 and at most 768, if there are as many. With ``num_frames`` alone it is these, with both the fewer. This is
    vLLM's ``Qwen3VLVideoBackend``, which knows no ``num_frames``; that one is transformers' ``Qwen3VLVideoProcessor``.
    """
    asked = choice.num_frames
    taken = bound = count if asked is None or asked == _ANY else min(asked, count)
    if asked is None or choice.fps is not None:
        fps = min(USUAL_RATE if choice.fps is None else choice.fps, _HIGHEST_RATE)
        taken = min(max(int(count / rate * fps), _FEWEST), _MOST, bound)
    taken = min(max(1, taken), most)
    return [int(index) for index in np.linspace(0, count - 1, taken).round()]


def in_pairs(count: int, rate: float, choice: Choice, most: int, sampler: Sampler) -> list[int]:
    """Return indices as transformers' ``Qwen2VLVideoProcessor.sample_frames``: a multiple of ``times``, evenly spread.

    Raises
    ------
    InvalidRequest
        Nothing can be taken so: the reference raises as well, or takes no frame.
    """
    times = sampler.times
    if choice.num_frames is not None:
        taken = round(choice.num_frames / times) * times
        _check_enough(taken, count)
    else:
        assert choice.fps is not None
        whole = math.floor(min(sampler.most, count) / times) * times
        taken = math.floor(min(max(count / rate * choice.fps, sampler.fewest), whole, count) / times) * times
    taken = min(taken, most // times * times)
    if not taken:
        raise refused(
            "fps" if choice.num_frames is None else "num_frames",
            f"takes {times} frames at least, and the video has {count}, of which at most {most} are taken",
        )
    step = count / taken
    # torch.arange gives float32, which is then cut.
    indices = (np.arange(math.ceil(count / step)) * step).astype(np.float32).astype(int)
    return [int(index) for index in indices if index < count]


def evenly(count: int, rate: float, choice: Choice, most: int, sampler: Sampler) -> list[int]:
    """Return indices as transformers' ``Qwen3VLVideoProcessor.sample_frames``, from the first frame to the last.

    Raises
    ------
    InvalidRequest
        More are asked for than there are; the reference would take some of them again.
    """
    taken = choice.num_frames
    if taken is None:
        assert choice.fps is not None
        taken = min(max(int(count / rate * choice.fps), sampler.fewest), sampler.most, count)
    _check_enough(taken, count)
    return [int(index) for index in np.linspace(0, count - 1, min(taken, most)).round()]


def _check_enough(taken: int, count: int) -> None:
    if taken > count:
        raise refused("num_frames", f"asks for {taken} frames, and the video has {count}; ask for fewer")
