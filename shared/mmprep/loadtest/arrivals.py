"""When requests are due, in seconds from the start: the open loop's clock. Pure; the same seed gives the same times."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["constant", "poisson", "ramp"]


def constant(rate: float, seconds: float) -> Iterator[float]:
    """Yield times that lie equally far apart.

    Parameters
    ----------
    rate:
        Requests a second, above 0.
    seconds:
        For which they come; all times lie below.
    """
    number = 0
    while (due := number / rate) < seconds:
        yield due
        number += 1


def poisson(rate: float, seconds: float, random: Random) -> Iterator[float]:
    """Yield times of requests that know nothing of each other: gaps are exponential with a mean of ``1 / rate``."""
    due = random.expovariate(rate)
    while due < seconds:
        yield due
        due += random.expovariate(rate)


def ramp(first: float, last: float, seconds: float) -> Iterator[float]:
    """Yield times at a rate that goes evenly from ``first`` to ``last`` requests a second, neither of them negative.

    By time ``t`` there were ``first * t + (last - first) * t**2 / (2 * seconds)`` requests; the times are where that is a
    whole number.
    """
    bend = (last - first) / (2 * seconds)
    number = 0
    while number < (first + last) / 2 * seconds:
        # Of the two forms of the root the one that does not subtract what is nearly equal.
        due = 2 * number / (first + math.sqrt(max(0.0, first * first + 4 * bend * number))) if number else 0.0
        if due >= seconds:
            return
        yield due
        number += 1
