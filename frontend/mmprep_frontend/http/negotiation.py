"""Which encoding a client wants its answers in, by its ``Accept`` header (RFC 9110, section 12.5.1).

MessagePack goes to those who name it: a wildcard means JSON, which every client of these paths has always got. Named, it
is taken unless JSON is preferred by a higher weight: who names both can read both, and MessagePack costs both sides less.
Whoever accepts neither gets JSON, as from engines, which do not look at the header; so does one whose header is no header.
"""

from __future__ import annotations

from typing import Final

from mmprep_frontend.render.encodings import JSON, MSGPACK, Encoding

#: What JSON may be called, the most telling first.
_JSON_RANGES: Final = (JSON.media_type, "application/*", "*/*")


def encoding_for(accept: str) -> Encoding:
    """Return the encoding for a client.

    Parameters
    ----------
    accept:
        Its header, several joined by commas; empty where it sends none.
    """
    if "msgpack" not in accept.lower():
        return JSON
    weights = dict(map(_weighed, accept.lower().split(",")))
    wanted = weights.get(MSGPACK.media_type, 0.0)
    json = next((weights[name] for name in _JSON_RANGES if name in weights), 0.0)
    return MSGPACK if wanted > 0 and wanted >= json else JSON


def _weighed(element: str) -> tuple[str, float]:
    """Return a range's name and its weight; one that is no number from 0 to 1 is 0."""
    name, *parameters = (part.strip() for part in element.split(";"))
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            return name, _weight(value.strip())
    return name, 1.0


def _weight(value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        return 0.0
    return weight if 0 <= weight <= 1 else 0.0
