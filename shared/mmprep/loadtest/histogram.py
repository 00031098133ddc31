"""Latencies in buckets: as many as are needed, none wider than a hundredth of what it holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Self

#: Values are counted in microseconds. So many leading bits tell buckets apart, so a bucket is at most 1/128 wide.
_BITS: Final = 7
_MICRO: Final = 1e6


class Histogram:
    """How often which latency was seen.

    Attributes
    ----------
    count: of all values.
    total: their sum, in seconds.
    largest: the largest of them, in seconds, as it was; 0 where there is none.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.largest = 0.0
        self._buckets: dict[int, int] = {}

    def record(self, seconds: float) -> None:
        """Count one value, which is not negative."""
        self.count += 1
        self.total += seconds
        self.largest = max(self.largest, seconds)
        lowest = _lowest(int(seconds * _MICRO))
        self._buckets[lowest] = self._buckets.get(lowest, 0) + 1

    def add(self, other: Histogram) -> None:
        """Count everything that another histogram holds, too."""
        self.count += other.count
        self.total += other.total
        self.largest = max(self.largest, other.largest)
        for lowest, count in other._buckets.items():
            self._buckets[lowest] = self._buckets.get(lowest, 0) + count

    def percentile(self, percent: float) -> float:
        """Return a value in seconds that ``percent`` of all values do not exceed; 0 where there are none.

        It is the upper end of a bucket, or the largest value: at most 0.8 % more than it should be.
        """
        wanted = self.count * percent / 100
        seen = 0
        for lowest, count in sorted(self._buckets.items()):
            seen += count
            if seen >= wanted:
                return min(self.largest, (lowest + _width(lowest)) / _MICRO)
        return self.largest

    @property
    def mean(self) -> float:
        """The mean in seconds; 0 where there are no values."""
        return self.total / self.count if self.count else 0.0

    def rows(self) -> list[tuple[float, int]]:
        """Return for each bucket, in order, its lower end in seconds and how many values are in it."""
        return [(lowest / _MICRO, count) for lowest, count in sorted(self._buckets.items())]

    @classmethod
    def of(cls, rows: Iterable[tuple[float, int]], *, total: float, largest: float) -> Self:
        """Return the histogram whose :meth:`rows`, sum and largest value these are."""
        made = cls()
        made._buckets = {round(lowest * _MICRO): count for lowest, count in rows}
        made.count = sum(made._buckets.values())
        made.total, made.largest = total, largest
        return made


def _lowest(micros: int) -> int:
    """Return the lower end of the bucket that holds so many microseconds."""
    shift = max(0, micros.bit_length() - _BITS - 1)
    return micros >> shift << shift


def _width(lowest: int) -> int:
    """Return how wide the bucket is that begins there."""
    return 1 << max(0, lowest.bit_length() - _BITS - 1)
