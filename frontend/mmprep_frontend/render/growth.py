"""How large what a template asks for may become: estimates of jinja2's filters and of Python's methods, never too small.

Only those are here that can make much of little in one step. An estimate is in characters; elements of lists count as
one each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

#: Above every limit.
TOO_LARGE = 1 << 62
_LARGEST_PRECISION = 100
#: A width of five digits or more, or one that is an argument, in either language of formats.
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:\d{5}|\*)|\{[^{}]*(?:\d{5}|:[^{}]*\{)")

#: From the arguments behind the first, and the keywords, to the estimate.
Estimate: TypeAlias = Callable[[Any, Sequence[Any], Mapping[str, Any]], int]


def size(value: Any) -> int:
    """Return the characters of a text, and 1 for anything else that has none."""
    return len(value) + 1 if isinstance(value, str | bytes) else 1


def of_format(text: Any) -> int:
    """Return the estimate for a text that is a format: its own size, unless it names a great width."""
    if not isinstance(text, str | bytes):
        return 1
    wide = _WIDE.search(text if isinstance(text, str) else text.decode("latin-1"))
    return TOO_LARGE if wide else size(text)


def _numbers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    return [abs(value) for value in (*args, *kwargs.values()) if isinstance(value, int)]


def _width(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    return max(size(value), *_numbers(args, kwargs), 0)


def _lines(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    text = str(value)
    indent = max([4, *_numbers(args, kwargs), *map(size, (*args, *kwargs.values()))])
    return size(text) + (text.count("\n") + 1) * indent


def _tabs(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    tabs: int = value.count("\t" if isinstance(value, str) else b"\t")
    return size(value) + tabs * max([8, *_numbers(args, kwargs)])


def _every_character(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    given = [*args, *kwargs.values()]
    given += [entry for table in given if isinstance(table, Mapping) for entry in table.values()]
    return size(value) * max([1, *map(size, given)])


def _replaced(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    texts = [*args, *kwargs.values()]
    if isinstance(value, bytes):
        return size(value) * max([1, *map(size, texts)])
    text = str(value)
    old, new = (
        str(kwargs.get(name, args[index] if len(args) > index else "")) for index, name in enumerate(("old", "new"))
    )
    return size(text) + text.count(old) * len(new)


def _precise(_value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    given = [*args, *kwargs.values()]
    given += [text for pair in given if isinstance(pair, list | tuple) for text in pair]
    largest = max([0, *_numbers(args, kwargs), *map(size, given)])
    return TOO_LARGE if largest > _LARGEST_PRECISION else 1


def _sum(_value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    start = kwargs.get("start", args[1] if len(args) > 1 else 0)
    return 1 if isinstance(start, int | float) else TOO_LARGE


#: By the name of a method of texts, bytes or whole numbers.
METHODS: dict[str, Estimate] = {
    "center": _width,
    "ljust": _width,
    "rjust": _width,
    "zfill": _width,
    "to_bytes": _width,
    "expandtabs": _tabs,
    "replace": _replaced,
    "translate": _every_character,
}
#: By the name of a filter.
FILTERS: dict[str, Estimate] = {
    "center": _width,
    "batch": _width,
    "slice": _width,
    "indent": _lines,
    "wordwrap": _every_character,
    "replace": _replaced,
    "round": _precise,
    "tojson": _precise,
    "sum": _sum,
    "format": lambda value, _args, _kwargs: of_format(value),
}
