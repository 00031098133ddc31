"""Turns the schema library's complaints into errors of ours: the place as ``param``, types in JSON's words."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from mmprep.errors import InvalidRequest

T = TypeVar("T")

_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")
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


def explain(message: str) -> InvalidRequest:
    """Return the error for msgspec's ``message``: its path as ``param``, its type names in JSON's words."""
    place = _PLACE.search(message)
    path = "" if place is None else place["path"].partition("[...]")[0]
    text = message if place is None else message[: place.start()]
    if missing := _MISSING.match(text):
        path = f"{path}.{missing['name']}".lstrip(".")
        text = "it is required"
    elif text.startswith(("Invalid enum value", "Invalid value")):
        text = (
            f"{text[text.index(chr(39)) :] if chr(39) in text else 'the value'} is not one of the values allowed here"
        )
    else:
        text = re.sub(r"`([a-z |]+)`", lambda names: _in_words(names[1]), text)
        text = _PATTERN.sub(lambda found: f" {_PATTERNS.get(found['pattern'], found[0].strip())}", text)
        text = text[0].lower() + text[1:]
    return InvalidRequest(f"{path or 'The body'}: {text}.", param=path or None)


def _in_words(names: str) -> str:
    return " or ".join(_WORDS.get(name, name) for name in names.split(" | "))


def decode(decoder: msgspec.json.Decoder[T], body: bytes | memoryview) -> T:
    """Return what ``decoder`` makes of a JSON text.

    Raises
    ------
    InvalidRequest
        It is no JSON, or breaks the schema; ``param`` is the place.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None


def convert(value: Any, kind: type[T], param: str) -> T:
    """Return ``value``, plain data that stands at ``param``, as ``kind``; raises InvalidRequest with its place."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        explained = explain(str(error))
        inner = explained.param
        text = explained.message.partition(": ")[2]
        place = param if inner is None else f"{param}{inner}" if inner.startswith("[") else f"{param}.{inner}"
        raise InvalidRequest(f"{place}: {text}", param=place) from None
