"""Counters, gauges and histograms of one process as plain data that can be sent and added up.

Each process counts for itself. The supervisor collects a :class:`Snapshot` from each and merges them, so that whichever
frontend is asked answers for the whole service. What a dead process had counted is kept by the supervisor.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any, TypeAlias

import msgspec

#: Upper bounds of the histograms' buckets, in seconds.
BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

Labels: TypeAlias = tuple[tuple[str, str], ...]
Series: TypeAlias = tuple[str, Labels]


class Histogram(msgspec.Struct):
    """Observations in buckets; ``counts`` has one more than :data:`BUCKETS`, the last without an upper bound."""

    counts: list[int]
    sum: float


class Snapshot(msgspec.Struct):
    """What one process, or all together, have counted."""

    counters: list[tuple[str, Labels, float]]
    gauges: list[tuple[str, Labels, float]]
    histograms: list[tuple[str, Labels, Histogram]]


class Metrics:
    """One process's metrics; used from one thread."""

    def __init__(self) -> None:
        self._counters: dict[Series, float] = {}
        self._gauges: dict[Series, float] = {}
        self._histograms: dict[Series, Histogram] = {}

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""
        series = (name, tuple(labels.items()))
        self._counters[series] = self._counters.get(series, 0) + value

    def total(self, name: str, value: float, **labels: str) -> None:
        """Set a counter that someone else counts."""
        self._counters[name, tuple(labels.items())] = value

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._gauges[name, tuple(labels.items())] = value

    def forget_gauge(self, name: str) -> None:
        """Drop a gauge with all its labels: what they were about may be gone."""
        for series in [series for series in self._gauges if series[0] == name]:
            del self._gauges[series]

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add an observation to a histogram."""
        series = (name, tuple(labels.items()))
        histogram = self._histograms.get(series)
        if histogram is None:
            histogram = self._histograms[series] = Histogram([0] * (len(BUCKETS) + 1), 0.0)
        histogram.counts[bisect_left(BUCKETS, seconds)] += 1
        histogram.sum += seconds

    def snapshot(self) -> Snapshot:
        """Return everything as plain data."""
        return Snapshot(
            [(name, labels, value) for (name, labels), value in self._counters.items()],
            [(name, labels, value) for (name, labels), value in self._gauges.items()],
            [
                (name, labels, Histogram(list(histogram.counts), histogram.sum))
                for (name, labels), histogram in self._histograms.items()
            ],
        )


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Return the sum of several processes' snapshots; equal series are added, gauges too."""
    counters: dict[Series, float] = {}
    gauges: dict[Series, float] = {}
    histograms: dict[Series, Histogram] = {}
    for snapshot in snapshots:
        for target, source in ((counters, snapshot.counters), (gauges, snapshot.gauges)):
            for name, labels, value in source:
                target[name, labels] = target.get((name, labels), 0) + value
        for name, labels, histogram in snapshot.histograms:
            found = histograms.setdefault((name, labels), Histogram([0] * len(histogram.counts), 0.0))
            found.counts = [a + b for a, b in zip(found.counts, histogram.counts, strict=True)]
            found.sum += histogram.sum
    return Snapshot(
        [(name, labels, value) for (name, labels), value in counters.items()],
        [(name, labels, value) for (name, labels), value in gauges.items()],
        [(name, labels, histogram) for (name, labels), histogram in histograms.items()],
    )


def without_gauges(snapshot: Snapshot) -> Snapshot:
    """Return what remains true of a process that is gone."""
    return Snapshot(snapshot.counters, [], snapshot.histograms)


class ProcessReport(msgspec.Struct):
    """What a process tells the supervisor: its metrics and its part of the service's status."""

    pid: int
    metrics: Snapshot
    status: dict[str, Any]
