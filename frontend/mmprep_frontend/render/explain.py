"""Turns the schema library's complaints into errors of ours: the place as ``param``, types in JSON's words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from mmprep.errors import InvalidRequest

#: Stands in a path for the keys of an object.
KEYS = "key"
_PLACE = re.compile(r" - at (?P<key>`key` in )?`\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]+)`$")
_PATTERN = re.compile(r" matching regex '(?P<pattern>.*)'$")
#: What the patterns of the schemas mean; the library shows them as Python writes them, with doubled backslashes.
_PATTERNS = {
    r"^[A-Za-z0-9_.-]{1,64}\\Z": "of 1 to 64 letters, digits, '_', '.' and '-'",
    r"^[0-9a-f]{32}\\Z": "of 32 hex digits in lower case",
}
_WORDS = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def explain(message: str, allowed: Callable[[str], Sequence[Any]] = lambda _: ()) -> InvalidRequest:
    """Return the error for msgspec's ``message``: its path as ``param``, its type names in JSON's words.

    Parameters
    ----------
    allowed: returns the values that the schema lists at a path.
    """
    place = _PLACE.search(message)
    whole = "" if place is None else place["path"]
    path = whole.partition("[...]")[0]
    text = message if place is None else message[: place.start()]
    if missing := _MISSING.match(text):
        whole = f"{whole}.{missing['name']}".lstrip(".")
        path = f"{path}.{missing['name']}".lstrip(".")
        text = "it is required" + _listed(allowed(whole))
    elif text.startswith(("Invalid enum value", "Invalid value")):
        told = text[text.index("'") :] if "'" in text else "the value"
        keys = "" if place is None or place["key"] is None else f"[{KEYS}]"
        text = f"{told} is not allowed here" + _listed(allowed(whole + keys))
    else:
        text = re.sub(r"`([a-z |]+)`", lambda names: _in_words(names[1]), text)
        text = _PATTERN.sub(lambda found: f" {_PATTERNS.get(found['pattern'], found[0].strip())}", text)
        text = text[0].lower() + text[1:]
    return InvalidRequest(f"{path or 'The body'}: {text}.", param=path or None)


def _listed(values: Sequence[Any]) -> str:
    if not values:
        return ""
    *others, last = (f"'{value}'" for value in values)
    return f"; send {', '.join(others)} or {last}" if others else f"; send {last}"


def _in_words(names: str) -> str:
    return " or ".join(_WORDS.get(name, name) for name in names.split(" | "))
