"""The text form of the metrics: one table of what there is, and the way from plain numbers to Prometheus text.

Processes count in plain dicts, which the supervisor adds up. Only here do they become metrics, in a registry of their
own that is thrown away after each answer: nothing is counted in this library, so nothing is locked or kept twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypedDict

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

#: A metric's name and the values of its labels, in the order of the table.
Series = tuple[str, tuple[str, ...]]


class HistogramData(TypedDict):
    """One histogram.

    ``buckets``: upper bounds, rising, without infinity. ``counts``: how many fell into each, not cumulated, with one
    more at the end for what is above all. ``sum``: of all values.
    """

    buckets: list[float]
    counts: list[int]
    sum: float


class Numbers(TypedDict):
    """All numbers of a service, added up over its processes."""

    counters: Mapping[Series, float]
    gauges: Mapping[Series, float]
    histograms: Mapping[Series, HistogramData]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One row of the table; ``alias`` is a second name that boards made for an engine know."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    alias: str | None = None


METRICS: Final[Mapping[str, MetricSpec]] = {
    "mmprep_requests_total": MetricSpec("counter", "Requests that were answered.", ("path", "outcome")),
    "mmprep_request_seconds": MetricSpec("histogram", "Seconds from a request to its answer.", ("path",)),
    "mmprep_stage_seconds": MetricSpec(
        "histogram",
        "Seconds in one stage: fetch, cache_lookup, cache_read, cache_write, hash, template, tokenize, queue, decode, "
        "process, publish, expand, serialize.",
        ("stage",),
    ),
    "mmprep_mm_cache_queries_total": MetricSpec(
        "counter", "Items that were looked up, on every path.", ("modality",), "vllm:mm_cache_queries_total"
    ),
    "mmprep_mm_cache_hits_total": MetricSpec(
        "counter", "Items that were found, injected and joined ones too.", ("modality",), "vllm:mm_cache_hits_total"
    ),
    "mmprep_singleflight_joins_total": MetricSpec("counter", "Items that joined a computation under way."),
    "mmprep_fetches_total": MetricSpec("counter", "Downloads of media that have ended.", ("outcome",)),
    "mmprep_fetch_joins_total": MetricSpec("counter", "Media that waited for a download that was on its way."),
    "mmprep_media_bytes": MetricSpec("gauge", "Bytes of fetched and read media that requests hold."),
    "mmprep_media_cache_hits_total": MetricSpec("counter", "Fetches that the disk cache answered."),
    "mmprep_media_cache_misses_total": MetricSpec("counter", "Fetches that the disk cache did not answer."),
    "mmprep_media_cache_evictions_total": MetricSpec("counter", "Media dropped from the disk cache to make room."),
    "mmprep_media_cache_errors_total": MetricSpec(
        "counter", "Errors of the disk cache, each a miss: of the disk or the index, or damaged and partial files."
    ),
    "mmprep_ring_bytes": MetricSpec("gauge", "Bytes of the ring: free, ready, leased, filling.", ("state",)),
    "mmprep_ring_evictions_total": MetricSpec("counter", "Entries dropped from the ring to make room."),
    "mmprep_spill_bytes": MetricSpec("gauge", "Bytes of the segments beside the ring."),
    "mmprep_spills_total": MetricSpec(
        "counter", "Items that found no room in the ring and got a segment of their own."
    ),
    "mmprep_inline_total": MetricSpec("counter", "Items that found no shared memory and travelled inline."),
    "mmprep_leases": MetricSpec("gauge", "Leases that hold."),
    "mmprep_leases_revoked_total": MetricSpec("counter", "Leases taken back after their time."),
    "mmprep_leases_overdue": MetricSpec("gauge", "Leases past their time that cannot be taken back yet."),
    "mmprep_lanes": MetricSpec("gauge", "Lanes.", ("state",)),
    "mmprep_lane_restarts_total": MetricSpec("counter", "Lanes that were replaced."),
    "mmprep_queue_depth": MetricSpec(
        "gauge", "Jobs that wait in a queue; in media: media that wait for a lane.", ("queue",)
    ),
    "mmprep_queue_delivered": MetricSpec("gauge", "Jobs of a queue in the hands of backends.", ("queue",)),
    "mmprep_queue_bytes": MetricSpec("gauge", "Bytes of a queue's jobs, without their tensors.", ("queue",)),
    "mmprep_queue_held_bytes": MetricSpec("gauge", "Bytes of the ring that a queue's jobs hold.", ("queue",)),
    "mmprep_queue_backends": MetricSpec("gauge", "Backends that pull from a queue.", ("queue",)),
    "mmprep_queue_dead_letters": MetricSpec("gauge", "Jobs on a queue's list of dead letters.", ("queue",)),
    "mmprep_queue_jobs_total": MetricSpec(
        "counter", "Jobs of a queue: posted, refused, delivered, returned, acked, dead, expired.", ("queue", "event")
    ),
    "mmprep_queue_wait_seconds": MetricSpec("histogram", "Seconds from a post to its first delivery.", ("queue",)),
    "mmprep_inflight": MetricSpec("gauge", "Requests under way."),
    "mmprep_refused_total": MetricSpec(
        "counter", "Messages between processes that were refused, by the link that they came on.", ("link", "error")
    ),
    "mmprep_remote_backends": MetricSpec("gauge", "Backends on other hosts that are connected."),
    "mmprep_remote_sessions_total": MetricSpec(
        "counter", "Connections of backends on other hosts that have ended, by why.", ("end",)
    ),
    "mmprep_remote_pulls_total": MetricSpec(
        "counter", "Items that backends on other hosts received: complete, unfinished, stalled.", ("outcome",)
    ),
    "mmprep_remote_bytes_total": MetricSpec("counter", "Bytes of tensors that were sent to other hosts."),
    "mmprep_injections_total": MetricSpec("counter", "Items that were injected.", ("modality",)),
    "mmprep_resets_total": MetricSpec(
        "counter", "Resets of a cache: mm, of processed items, or media, the disk cache.", ("cache",)
    ),
    "mmprep_trace_spans_total": MetricSpec(
        "counter", "Spans of traced requests: exported, or dropped since the collector was slow or gone.", ("outcome",)
    ),
    "mmprep_quarantined": MetricSpec("gauge", "Media that are refused for a time because they broke a lane."),
}


def expose(numbers: Numbers) -> bytes:
    """Return ``numbers`` as Prometheus text, of :data:`CONTENT_TYPE`.

    Every metric of the table is named, also one without a series; a counter without labels is 0 before it has counted.

    Raises
    ------
    ValueError
        A series that is not in the table, is of another kind, or has another number of labels or counts.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(numbers))
    return generate_latest(registry)


class _Once(Collector):
    """Gives a registry the numbers of one moment."""

    def __init__(self, numbers: Numbers) -> None:
        self._families: list[Metric] = list(_families(numbers))

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._families


def _families(numbers: Numbers) -> Iterator[Metric]:
    by_name: dict[str, list[tuple[tuple[str, ...], float | HistogramData]]] = {name: [] for name in METRICS}
    for kind, series in (
        ("counter", numbers["counters"]),
        ("gauge", numbers["gauges"]),
        ("histogram", numbers["histograms"]),
    ):
        for (name, labels), value in series.items():
            spec = METRICS.get(name)
            if spec is None or spec.kind != kind or len(labels) != len(spec.labels):
                raise ValueError(f"no {kind} {name} with {len(labels)} labels is in the table of metrics")
            by_name[name].append((labels, value))
    for name, spec in METRICS.items():
        if spec.kind == "counter" and not spec.labels and not by_name[name]:
            by_name[name].append(((), 0.0))
        for exposed in (name, spec.alias) if spec.alias else (name,):
            yield _family(exposed, spec, by_name[name])


def _family(name: str, spec: MetricSpec, samples: list[tuple[tuple[str, ...], float | HistogramData]]) -> Metric:
    family: CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
    match spec.kind:
        case "counter":
            family = CounterMetricFamily(name, spec.help, labels=spec.labels)
        case "gauge":
            family = GaugeMetricFamily(name, spec.help, labels=spec.labels)
        case "histogram":
            family = HistogramMetricFamily(name, spec.help, labels=spec.labels)
    for labels, value in sorted(samples, key=lambda sample: sample[0]):
        if isinstance(family, HistogramMetricFamily):
            assert isinstance(value, dict)
            family.add_metric(labels, _cumulated(name, value), value["sum"])
        else:
            assert not isinstance(value, dict)
            family.add_metric(labels, value)
    return family


def _cumulated(name: str, data: HistogramData) -> list[tuple[str, float]]:
    if len(data["counts"]) != len(data["buckets"]) + 1:
        raise ValueError(f"{name} has {len(data['counts'])} counts for {len(data['buckets'])} buckets")
    bounds = [*(repr(float(bound)) for bound in data["buckets"]), "+Inf"]
    total = 0
    cumulated: list[tuple[str, float]] = []
    for bound, count in zip(bounds, data["counts"], strict=True):
        total += count
        cumulated.append((bound, total))
    return cumulated
