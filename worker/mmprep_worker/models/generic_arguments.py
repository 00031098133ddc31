"""What a request may choose about pictures for a model's own processor: what its image processor is configured by.

Of the arguments that transformers' image processors take, these are known to be safe: switches that the processor has set,
the members that its ``size`` and ``crop_size`` have, and the filter. A side is at most 4,096, or the configured one where
that is larger, so a request cannot make much of little; what a narrow picture becomes is checked by its header.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mmprep.arguments import Argument, Value
from mmprep.errors import TooLarge

_FLAGS: Final = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad")
_SIZES: Final = ("size", "crop_size")
_MOST_SIDE: Final = 4096
#: Pillow's filters are numbered from 0.
_LAST_FILTER: Final = 5


def picture_arguments(part: Any) -> tuple[Argument, ...]:
    """Return the arguments of an image processor.

    Parameters
    ----------
    part:
        As transformers loads it.
    """
    taken = getattr(type(part), "valid_kwargs", None)
    names = frozenset(() if taken is None else taken.__annotations__)
    arguments = [
        Argument(name, "flag", getattr(part, name))
        for name in _FLAGS
        if name in names and isinstance(getattr(part, name, None), bool)
    ]
    for name in _SIZES:
        if name in names:
            arguments += [
                Argument(f"{name}.{member}", "whole", side, 1, max(_MOST_SIDE, side))
                for member, side in _size_of(part, name).items()
            ]
    filter_ = getattr(part, "resample", None)
    if "resample" in names and isinstance(filter_, int):
        arguments.append(Argument("resample", "whole", int(filter_), 0, _LAST_FILTER))
    return tuple(arguments)


def as_taken(part: Any, chosen: Mapping[str, Value]) -> dict[str, Any]:
    """Return what was chosen as the image processor takes it: mappings are whole, with its own members beside."""
    kwargs: dict[str, Any] = {}
    for path, value in chosen.items():
        name, _, member = path.partition(".")
        if member:
            kwargs.setdefault(name, _size_of(part, name))[member] = value
        else:
            kwargs[name] = value
    return kwargs


def check_resized(part: Any, kwargs: Mapping[str, Any], width: int, height: int, *, most: int) -> None:
    """Refuse a picture that would be enlarged beyond ``most`` pixels, before anything is allocated for it.

    That can only be where its shorter side alone is said, and the other follows.

    Raises
    ------
    TooLarge
        It would.
    """
    size = kwargs.get("size") or _size_of(part, "size")
    if set(size) != {"shortest_edge"} or not kwargs.get("do_resize", getattr(part, "do_resize", False)):
        return
    side = size["shortest_edge"]
    pixels = side * side * max(width, height) // min(width, height)
    if pixels > most:
        raise TooLarge(
            f"the picture of {width} by {height} pixels would be resized to {pixels:,} pixels, more than the {most:,} that "
            "are allowed (--max-image-pixels); crop it"
        )


def _size_of(part: Any, name: str) -> dict[str, int]:
    size = getattr(part, name, None)
    plain = {} if size is None else dict(size)
    return {str(member): int(side) for member, side in plain.items() if isinstance(side, int) and side > 0}
