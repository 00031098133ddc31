"""Sizes and durations as people write them: ``512MiB``, ``1.5GiB``, ``30s``, ``24h``.

Rules: a number without a unit means bytes or seconds. ``KiB`` is 1024, ``kB`` is 1000, and ``K`` alone is refused
because half of the tools that people know read it the one way and half the other. Upper and lower case are the same,
a space between number and unit is allowed, negative and unbounded values are not.
"""

from __future__ import annotations

import re
from fractions import Fraction

from mmprep.errors import StartupError

_SIZE_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _SIZE_UNITS[f"{_letter}ib"] = 1024**_power
    _SIZE_UNITS[f"{_letter}b"] = 1000**_power

_DURATION_UNITS = {
    "": Fraction(1),
    "us": Fraction(1, 1_000_000),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}

_QUANTITY = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,9})?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)

#: The largest size a file or a mapping can have on Linux.
_LARGEST_SIZE = 2**63 - 1


def parse_size(text: str | int, option: str) -> int:
    """Return the bytes that ``text`` means.

    Parameters
    ----------
    text:
        ``512MiB``, ``2 GB``, ``1.5GiB``, ``4096``; an int is bytes.
    option:
        What the value was given to, as ``--cache-size``; named by the error.

    Raises
    ------
    mmprep.errors.StartupError
        Not a size, negative, or too large to be one.
    """
    number, unit = _split(text, option, "a size", "512MiB, 1GiB or a number of bytes")
    if unit not in _SIZE_UNITS:
        raise StartupError(
            f"{option}: {text!r} has no unit of size that is known; use B, KiB, MiB, GiB, TiB or kB, MB, GB, TB"
        )
    size = int(number * _SIZE_UNITS[unit])
    if size > _LARGEST_SIZE:
        raise StartupError(f"{option}: {text!r} is larger than anything a machine can hold")
    return size


def parse_duration(text: str | float, option: str) -> float:
    """Return the seconds that ``text`` means.

    Parameters
    ----------
    text:
        ``30s``, ``500ms``, ``5min``, ``24h``, ``7d``, ``1.5``; a number is seconds.
    option:
        What the value was given to, as ``--lease-seconds``; named by the error.

    Raises
    ------
    mmprep.errors.StartupError
        Not a duration, or negative.
    """
    number, unit = _split(text, option, "a duration", "500ms, 30s, 24h or a number of seconds")
    if unit not in _DURATION_UNITS:
        raise StartupError(f"{option}: {text!r} has no unit of time that is known; use us, ms, s, min, h or d")
    return float(number * _DURATION_UNITS[unit])


def _split(text: str | float, option: str, kind: str, examples: str) -> tuple[Fraction, str]:
    if isinstance(text, float):
        text = f"{text:.9f}"  # never an exponent
    match = None if isinstance(text, bool) else _QUANTITY.fullmatch(str(text).strip())
    if match is None:
        raise StartupError(f"{option}: {str(text)[:80]!r} is not {kind}; write {examples}")
    return Fraction(match[1]), match[2].lower()


def format_size(size: int) -> str:
    """Return ``size`` bytes for people, in binary units with at most one decimal: ``1.5 GiB``, ``512 MiB``, ``0 B``."""
    scaled = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(scaled) < 1024:
            return f"{_short(scaled)} {unit}"
        scaled /= 1024
    return f"{_short(scaled)} TiB"


def format_duration(seconds: float) -> str:
    """Return ``seconds`` for people, in the largest unit below it: ``0.3 ms``, ``500 ms``, ``30 s``, ``5 min``, ``24 h``."""
    if seconds == 0:
        return "0 s"
    magnitude = abs(seconds)
    if magnitude < 1:
        return f"{_short(seconds * 1000)} ms"
    for unit, length, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if magnitude < limit:
            return f"{_short(seconds / length)} {unit}"
    return f"{_short(seconds / 86400)} d"


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
