"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: whether an item that was processed elsewhere hangs together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from mmprep.errors import InvalidRequest
from mmprep.items import Plan
from mmprep_worker.models.injected import embeds

_LARGEST_SIDE = 1 << 20


def check_picture(plan: Plan, tensors: Mapping[str, NDArray[Any]], merge: int) -> None:
    """Refuse a picture whose grid, rows and expansion contradict each other; raises InvalidRequest."""
    grid = _check_grid(plan, tensors["pixel_values"], tensors["image_grid_thw"], "image_grid_thw", merge)
    if grid[0] != 1:
        raise InvalidRequest(f"a picture's grid is 1 in time, not {grid[0]}", param="fields.image_grid_thw")


def check_video(plan: Plan, tensors: Mapping[str, NDArray[Any]], merge: int) -> None:
    """Refuse a video whose grid, rows, times and expansion contradict each other; raises InvalidRequest."""
    grid = _check_grid(plan, tensors["pixel_values_videos"], tensors["video_grid_thw"], "video_grid_thw", merge)
    seconds, times = tensors.get("second_per_grid_ts"), tensors.get("timestamps")
    if seconds is not None and not seconds > 0:
        raise InvalidRequest("a pair of frames spans more than 0 seconds", param="fields.second_per_grid_ts")
    if times is None:
        return
    if len(times) != grid[0]:
        raise InvalidRequest(f"there are {len(times)} times for {grid[0]} pairs of frames", param="fields.timestamps")
    if (times < 0).any() or (times[1:] < times[:-1]).any():
        raise InvalidRequest("the times of a video start from 0 and never go back", param="fields.timestamps")


def _check_grid(plan: Plan, rows: NDArray[Any], given: NDArray[Any], name: str, merge: int) -> tuple[int, ...]:
    grid = tuple(int(side) for side in given)
    param = f"fields.{name}"
    if not all(0 < side <= _LARGEST_SIDE for side in grid):
        raise InvalidRequest(f"each side of the grid is from 1 to {_LARGEST_SIDE:,}", param=param)
    if grid[1] % merge or grid[2] % merge:
        raise InvalidRequest(f"height and width of the grid are multiples of {merge}", param=param)
    if math.prod(grid) != len(rows):
        raise InvalidRequest(
            f"the grid {list(grid)} is of {math.prod(grid)} patches, and there are {len(rows)}", param=param
        )
    tokens = math.prod(grid) // merge**2
    if embeds(plan) != tokens:
        raise InvalidRequest(
            f"{embeds(plan)} positions of the expansion take an embedding, and the grid {list(grid)} gives {tokens}",
            param="expansion",
        )
    return grid
