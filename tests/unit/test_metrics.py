"""Metrics: what one process counts, and what is true of several together."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep.metrics import BUCKETS, Metrics, ProcessReport, Snapshot, merge, without_gauges

NAMES = st.sampled_from(["a_total", "b_total"])
EVENTS = st.lists(
    st.tuples(st.sampled_from(["count", "gauge", "observe"]), NAMES, st.integers(0, 50), st.sampled_from(["x", "y"]))
)


def made(events):
    metrics = Metrics()
    for what, name, value, label in events:
        getattr(metrics, what)(f"{what}_{name}", value, label=label)
    return metrics.snapshot()


def by_series(snapshot):
    return {
        **{(name, labels): value for name, labels, value in snapshot.counters},
        **{(name, labels): value for name, labels, value in snapshot.gauges},
        **{(name, labels): (tuple(h.counts), h.sum) for name, labels, h in snapshot.histograms},
    }


def test_counters_add_up_by_labels_and_totals_and_gauges_are_set():
    metrics = Metrics()
    metrics.count("requests_total", path="a")
    metrics.count("requests_total", 2, path="a")
    metrics.count("requests_total", path="b")
    metrics.total("evictions_total", 5)
    metrics.total("evictions_total", 7)
    metrics.gauge("leases", 3)
    metrics.gauge("leases", 1)
    assert by_series(metrics.snapshot()) == {
        ("requests_total", (("path", "a"),)): 3,
        ("requests_total", (("path", "b"),)): 1,
        ("evictions_total", ()): 7,
        ("leases", ()): 1,
    }


@pytest.mark.parametrize("number", range(len(BUCKETS)))
def test_an_observation_is_in_the_first_bucket_that_is_not_below_it(number):
    metrics = Metrics()
    bound = BUCKETS[number]
    metrics.observe("seconds", bound)
    metrics.observe("seconds", bound * 1.000001)
    ((_, _, histogram),) = metrics.snapshot().histograms
    assert histogram.counts[number : number + 2] == [1, 1]
    assert sum(histogram.counts) == 2


def test_observations_beyond_the_last_bound_are_counted_too():
    metrics = Metrics()
    metrics.observe("seconds", 1e9)
    metrics.observe("seconds", -1.0)
    ((_, _, histogram),) = metrics.snapshot().histograms
    assert (histogram.counts[0], histogram.counts[-1], len(histogram.counts)) == (1, 1, len(BUCKETS) + 1)
    assert histogram.sum == 1e9 - 1


def test_the_bounds_rise():
    assert list(BUCKETS) == sorted(set(BUCKETS))


@given(st.lists(EVENTS, max_size=4))
def test_the_sum_of_several_processes_is_what_one_would_have_counted(processes):
    together = by_series(merge(made([e for e in events if e[0] != "gauge"]) for events in processes))
    assert together == by_series(made([event for events in processes for event in events if event[0] != "gauge"]))


def test_gauges_of_several_processes_are_added():
    metrics = Metrics()
    metrics.gauge("inflight", 2)
    assert by_series(merge([metrics.snapshot()] * 3)) == {("inflight", ()): 6}


@given(EVENTS)
def test_merging_changes_none_of_its_parts(events):
    part = made(events)
    before = msgspec.json.encode(part)
    merged = merge([part, part])
    for _, _, histogram in merged.histograms:
        histogram.counts[0] += 1
    assert msgspec.json.encode(part) == before


def test_a_snapshot_is_not_changed_by_what_is_counted_later():
    metrics = Metrics()
    metrics.observe("seconds", 1.0)
    snapshot = metrics.snapshot()
    metrics.observe("seconds", 1.0)
    assert sum(snapshot.histograms[0][2].counts) == 1


def test_nothing_merged_is_nothing():
    assert merge([]) == Snapshot([], [], [])


@given(EVENTS)
def test_of_a_process_that_is_gone_all_but_its_gauges_stays_true(events):
    snapshot = made(events)
    kept = without_gauges(snapshot)
    assert (kept.counters, kept.gauges, kept.histograms) == (snapshot.counters, [], snapshot.histograms)


@given(EVENTS)
def test_a_report_travels_as_json(events):
    report = ProcessReport(7, made(events), {"lanes": [1]})
    assert msgspec.json.decode(msgspec.json.encode(report), type=ProcessReport) == report
