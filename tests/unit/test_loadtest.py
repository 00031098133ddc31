"""Load tests: when requests are due, what they ask, how their times are counted, and what is shown of them."""

import asyncio
import io
import itertools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmprep.bench.pictures import Size
from mmprep.errors import InvalidRequest
from mmprep.loadtest import arrivals
from mmprep.loadtest.accounting import CpuTime, cache_counters, with_descendants
from mmprep.loadtest.clock import Clock
from mmprep.loadtest.histogram import Histogram
from mmprep.loadtest.page import page
from mmprep.loadtest.run import Run
from mmprep.loadtest.summary import compare, read_summary, summarise, table
from mmprep.loadtest.targets import TIMEOUT, Prepared
from mmprep.loadtest.workloads import WORKLOADS, Ask, Shape, Turn, trace

SMALL = Size(32, 32, 5.0)


# --- latencies --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 1e4), min_size=1), st.floats(0, 100))
def test_a_percentile_is_that_of_all_values_within_a_hundredth(values, percent):
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    exact = float(np.percentile(values, percent, method="inverted_cdf"))
    assert exact - 1e-6 <= histogram.percentile(percent) <= exact * 1.008 + 1e-6
    assert histogram.percentile(100) == max(values)
    assert math.isclose(histogram.mean, sum(values) / len(values), rel_tol=1e-9)


@given(st.lists(st.floats(0, 1e3)), st.lists(st.floats(0, 1e3)))
def test_histograms_add_up_and_survive_being_written(one, other):
    both, first, second = Histogram(), Histogram(), Histogram()
    for value in one:
        both.record(value)
        first.record(value)
    for value in other:
        both.record(value)
        second.record(value)
    first.add(second)
    again = Histogram.of(first.rows(), total=first.total, largest=first.largest)
    for histogram in (first, again):
        assert (histogram.count, histogram.rows()) == (both.count, both.rows())
        assert histogram.percentile(90) == both.percentile(90)


# --- arrivals ---------------------------------------------------------------------------------------------------------


def test_constant_arrivals_lie_equally_far_apart():
    assert list(arrivals.constant(4, 1.5)) == [0, 0.25, 0.5, 0.75, 1.0, 1.25]


def test_poisson_arrivals_are_exponential_and_the_same_for_the_same_seed():
    times = np.array(list(arrivals.poisson(200, 50, Random(1))))
    gaps = np.diff(times)
    assert abs(len(times) - 10_000) < 400
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05
    assert list(arrivals.poisson(200, 50, Random(1))) == times.tolist()


@given(st.floats(0, 50), st.floats(0.1, 50), st.floats(1, 20))
def test_a_ramp_goes_evenly_from_one_rate_to_the_other(first, last, seconds):
    times = list(arrivals.ramp(first, last, seconds))
    assert times == sorted(times)
    assert not times or (times[0] == 0 and times[-1] < seconds)
    for number, due in enumerate(times):
        assert math.isclose(first * due + (last - first) * due * due / (2 * seconds), number, abs_tol=1e-6)
    assert abs(len(times) - (first + last) / 2 * seconds) <= 1 + 1e-6


# --- workloads --------------------------------------------------------------------------------------------------------


def some(name, count, **shape):
    return list(itertools.islice(WORKLOADS[name](Shape(size=SMALL, **shape)), count))


@pytest.mark.parametrize("name", sorted(set(WORKLOADS) - {"mixed"}))
def test_a_seed_makes_the_same_requests_again_and_another_one_shares_no_picture(name):
    first, again, other = some(name, 40), some(name, 40), some(name, 40, seed=1)
    assert first == again
    assert first != other

    def pictures(asks):
        return {picture.data for ask in asks for turn in ask.turns for picture in turn.pictures}

    assert not pictures(first) & pictures(other)


def test_pictures_are_pictures_and_new_ones_are_new():
    asks = some("distinct", 30, pictures=2)
    data = [picture.data for ask in asks for picture in ask.turns[0].pictures]
    assert len(set(data)) == 60
    assert all(Image.open(io.BytesIO(one)).convert("RGB").size == (32, 32) for one in data)


def test_zipf_asks_for_pictures_by_their_law():
    counts = Counter(ask.turns[0].pictures[0].name for ask in some("zipf", 20_000, population=50, exponent=1.2))
    weights = np.arange(1, 51) ** -1.2
    expected = 20_000 * weights / weights.sum()
    for rank in (0, 1, 4, 20):
        assert abs(counts[f"0-32x32-{rank}"] - expected[rank]) < 5 * math.sqrt(expected[rank])


def test_each_turn_of_a_conversation_repeats_what_was_said_before():
    asks = some("multi-turn", 60, conversations=3, turns=4)
    by_first: dict[Turn, list[tuple[Turn, ...]]] = {}
    for ask in asks:
        by_first.setdefault(ask.turns[0], []).append(ask.turns)
    for said in by_first.values():
        assert [len(turns) for turns in said] == [1, 3, 5, 7][: len(said)]
        for shorter, longer in itertools.pairwise(said):
            assert longer[: len(shorter)] == shorter
        assert [turn.role for turn in said[-1]] == (["user", "assistant"] * 4)[: len(said[-1])]
        assert [len(turn.pictures) for turn in said[-1]] == [1] + [0] * (len(said[-1]) - 1)
    assert sum(len(said) == 4 for said in by_first.values()) >= 12
    # Never more than three at a time.
    assert len({ask.turns[0] for ask in asks[:10]}) == 3


def test_a_trace_is_replayed_at_its_times_with_the_same_picture_for_the_same_id(tmp_path):
    lines = [
        {"timestamp": 100.0, "prompt_length": 3, "media": [{"id": "a", "width": 64, "height": 48}]},
        {"timestamp": 101.5, "prompt_length": 5, "media": []},
        {"timestamp": 102.0, "media": [{"id": "a", "width": 64, "height": 48}, {"id": 7, "size": 100_000}]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second, third = trace(path, Shape(), speed=2.0)
    assert [ask.due for ask in (first, second, third)] == [0.0, 0.75, 1.0]
    assert [len(ask.turns[0].text.split()) for ask in (first, second)] == [3, 5]
    assert third.turns[0].pictures[0] == first.turns[0].pictures[0]
    assert Image.open(io.BytesIO(first.turns[0].pictures[0].data)).size == (64, 48)
    assert Image.open(io.BytesIO(third.turns[0].pictures[1].data)).size == (640, 480)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 of the trace: it is not JSON"),
        ("[1]", "line 2 of the trace: it is not a JSON object"),
        ("{}", "line 2 of the trace: timestamp"),
        ('{"timestamp": true}', "timestamp"),
        ('{"timestamp": NaN}', "timestamp"),
        ('{"timestamp": 0}', "must not go back"),
        ('{"timestamp": 2, "prompt_length": -1}', "prompt_length"),
        ('{"timestamp": 2, "media": {}}', "media must be a list"),
        ('{"timestamp": 2, "media": [{"size": 3}]}', "id"),
        ('{"timestamp": 2, "media": [{"id": "a"}]}', "size in bytes, or width and height"),
        ('{"timestamp": 2, "media": [{"id": "a", "width": 64}]}', "width and height"),
        ('{"timestamp": 2, "media": [{"id": "a", "width": 64, "height": 100000}]}', "width and height"),
    ],
)
def test_a_line_that_is_none_of_a_trace_is_told_by_its_number(tmp_path, line, words):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 1}\n' + line + "\n")
    with pytest.raises(InvalidRequest, match=words):
        list(trace(path, Shape()))


def test_a_trace_that_is_empty_or_not_there_is_told(tmp_path):
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        next(trace(tmp_path / "none", Shape()))
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidRequest, match="holds no requests"):
        next(trace(tmp_path / "empty", Shape()))


# --- keeping time -----------------------------------------------------------------------------------------------------


class Passing:
    """Time that passes when somebody waits for it, in an order of its own."""

    def __init__(self):
        self.seconds = 0.0
        self._calls = []
        self._numbers = itertools.count()

    def now(self):
        return self.seconds

    def call_at(self, when, callback):
        self._calls.append((when, next(self._numbers), callback))

    async def drive(self, task):
        while not task.done():
            for _ in range(5):
                await asyncio.sleep(0)
            if self._calls:
                self._calls.sort()
                when, _, callback = self._calls.pop(0)
                self.seconds = max(self.seconds, when)
                callback()
        return task.result()


class Answering:
    """A target that takes ``service`` seconds for a request, one at a time, and stands still from 1 s to 2 s."""

    def __init__(self, clock, service, *, stalls=True, outcome="ok"):
        self._clock, self._service, self._stalls, self._outcome = clock, service, stalls, outcome
        self._free = 0.0
        self.most = self.under_way = self.given_up = 0

    def prepare(self, ask):
        return Prepared(ask, 1)

    def start(self, _ask, ended):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        begin = max(self._clock.seconds, self._free)
        if self._stalls and 1 <= begin < 2:
            begin = 2.0
        self._free = begin + self._service

        def end():
            self.under_way -= 1
            ended(self._outcome)

        self._clock.call_at(self._free, end)
        return self.give_up

    def give_up(self):
        self.given_up += 1

    async def close(self):
        """Nothing to let go of."""


def ran(make, target_options=None, **options):
    clock = Passing()

    async def main():
        target = Answering(clock, 0.001, **(target_options or {}))
        asks = itertools.repeat(Ask((Turn("user", "hello"),)))
        run = Run(target, asks, **{"clock": clock, "timeout": 1e9, **options})
        return await clock.drive(asyncio.create_task(make(run))), target

    return asyncio.run(main())


@pytest.mark.parametrize("max_in_flight", [1, 1000])
def test_a_service_that_stands_still_is_seen_to_keep_everybody_waiting_who_was_due_then(max_in_flight):
    record, target = ran(lambda run: run.open_loop(arrivals.constant(100, 4)), max_in_flight=max_in_flight)
    assert record.latency.count == 400
    # A quarter of all were due in the second that was lost; they waited from nothing to a second.
    assert 0.4 < record.latency.percentile(87.5) < 0.6
    assert 0.9 < record.latency.largest < 1.1
    assert record.latency.percentile(70) < 0.02
    assert target.most <= max_in_flight
    if max_in_flight == 1:
        assert record.late > 0.9
        assert record.service.percentile(87.5) < 0.01, "which is what a closed loop would have seen"


def test_each_second_tells_what_was_due_and_what_was_answered_in_it():
    record, _ = ran(lambda run: run.open_loop(arrivals.constant(100, 4)))
    assert [second.due for second in record.seconds[:4]] == [100] * 4
    answered = [second.answered for second in record.seconds]
    assert answered[1] <= 1
    assert sum(answered) == 400
    assert answered[2] >= 190


def test_users_of_a_closed_loop_ask_again_after_their_answers_and_as_many_at_a_time_as_there_are():
    record, target = ran(lambda run: run.closed_loop(5, 10.0, think=0.1), {"stalls": False})
    assert target.most <= 5
    assert 5 * 10 / 0.11 <= record.latency.count <= 5 * 10 / 0.1 + 5


def test_a_request_that_failed_counts_as_what_it_failed_with_and_not_as_a_latency():
    record, _ = ran(lambda run: run.open_loop(arrivals.constant(10, 2)), {"outcome": "429 OverloadedError"})
    assert record.outcomes == {"429 OverloadedError": 20}
    assert record.latency.count == 0
    assert sum(second.failed for second in record.seconds) == 20


def test_a_request_that_has_no_answer_in_its_time_is_given_up_and_the_others_are_not():
    record, target = ran(lambda run: run.open_loop(arrivals.constant(10, 3)), timeout=0.5)
    assert record.outcomes == {"ok": 24, TIMEOUT: 6}
    assert target.given_up == 6
    assert record.latency.largest < 0.52


@pytest.mark.parametrize("lines", [1, 80])
def test_a_wrong_line_of_a_trace_ends_the_run_with_its_number(tmp_path, lines):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0}\n' * lines + "wrong\n")
    clock = Passing()

    async def main():
        run = Run(Answering(clock, 0.001), trace(path, Shape()), clock=clock)
        return await clock.drive(asyncio.create_task(run.replay(100.0)))

    with pytest.raises(InvalidRequest, match=f"line {lines + 1} of the trace"):
        asyncio.run(main())


def test_the_clock_calls_back_in_order_at_the_moment_and_never_before():
    async def main():
        called, last = [], asyncio.get_running_loop().create_future()
        with Clock() as clock:
            begin = clock.now()
            for after in (0.004, 0.001, 0.0, 0.0025):
                clock.call_at(begin + after, lambda after=after: called.append((after, clock.now() - begin)))
            clock.call_at(begin + 0.005, lambda: last.set_result(None))
            assert not called
            await last
        return called

    called = asyncio.run(main())
    assert [after for after, _ in called] == [0.0, 0.001, 0.0025, 0.004]
    assert all(now >= after for after, now in called)


def test_a_run_that_is_stopped_waits_for_what_is_under_way_and_sends_nothing_more():
    async def stopping(run):
        running = asyncio.create_task(run.open_loop(arrivals.constant(10, 1000)))
        while run.record.latency.count < 5:  # noqa: ASYNC110 -- the clock of the test is driven by turns of the loop
            await asyncio.sleep(0)
        run.stop()
        return await running

    record, _ = ran(stopping)
    assert record.outcomes.total() == sum(second.due for second in record.seconds) < 20


def test_a_replay_ends_with_its_trace_or_its_time(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps({"timestamp": number}) + "\n" for number in range(10)))
    for seconds, count in ((4.5, 5), (100.0, 10)):
        clock = Passing()

        async def main(clock=clock, seconds=seconds):
            run = Run(Answering(clock, 0.001), trace(path, Shape()), clock=clock)
            return await clock.drive(asyncio.create_task(run.replay(seconds)))

        assert asyncio.run(main()).latency.count == count


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_cpu_time_is_that_of_a_process_and_of_all_it_has_started():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); sum(range(2 * 10**7)); input()'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        cpu = CpuTime([process.pid])
        assert process.stdout.readline() == "1\n"
        assert len(with_descendants([process.pid])) == 2
        while cpu.look() < 0.2:
            assert process.poll() is None
        process.communicate("\n")
    assert cpu.look() >= 0.2, "what it had used before it ended"
    assert with_descendants([process.pid]) == set()


def test_the_caches_counters_are_found_by_our_names_and_by_those_of_others():
    ours = 'mmprep_mm_cache_queries_total{modality="image"} 5\nmmprep_mm_cache_queries_total{modality="video"} 2\n'
    ours += (
        'mmprep_mm_cache_hits_total{modality="image"} 3.0\nvllm:mm_cache_queries_total 7\nvllm:mm_cache_hits_total 3\n'
    )
    assert cache_counters(ours) == (7, 3)
    assert cache_counters('# HELP x\nvllm:mm_cache_queries{engine="0"} 9\nvllm:mm_cache_hits{engine="0"} 4\n') == (9, 4)
    assert cache_counters("up 1\n") is None


# --- what is shown ----------------------------------------------------------------------------------------------------


def summary(name, rate=100.0, **options):
    record, _ = ran(lambda run: run.open_loop(arrivals.constant(rate, 4)), options)
    settings = {"workload": "zipf", "target": "<http://here>"}
    return summarise(record, name=name, settings=settings, cache=(10.0, 4.0), cpu=2.0)


class Page(HTMLParser):
    """What a page holds, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.words = [], Counter(), []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag not in {"script", "link", "img", "iframe"}
        assert not {"src", "href", "onload"} & dict(attributes).keys()
        self.seen[tag] += 1
        self.open.append(tag)
        for value in dict(attributes).values():
            assert "nan" not in value
            assert "inf" not in value

    def handle_startendtag(self, tag, attributes):
        if tag != "meta":
            self.handle_starttag(tag, attributes)
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_is_whole_and_needs_nothing_from_elsewhere(count):
    runs = [summary("one & only"), summary("<other>", 50.0, outcome="429")][:count]
    text = page(runs)
    seen = Page(text.replace("<!DOCTYPE html>", ""))
    assert seen.seen["svg"] == 3
    assert seen.seen["polyline"] >= 4 * count
    assert "one & only" in seen.words
    assert "<http://here>" in seen.words
    assert re.findall(r"https?://", text) == ["http://"] * count  # the escaped setting


def test_a_run_without_an_answer_has_a_page_too():
    Page(page([summary("nothing", outcome="503")]).replace("<!DOCTYPE html>", ""))


def test_a_result_is_read_as_it_was_written_and_two_are_compared_as_ratios(tmp_path):
    import msgspec

    first, second = summary("first"), summary("second", 50.0)
    path = tmp_path / "first.json"
    path.write_bytes(msgspec.json.encode(first))
    assert read_summary(path) == first
    rows = {name: (one, other, ratio) for name, one, other, ratio in compare(first, second)}
    one, other, ratio = rows["answers a second"]
    assert (one, other) == (first.throughput, second.throughput)
    assert math.isclose(ratio, other / one)
    assert rows["hit rate"] == (0.4, 0.4, 1.0)
    assert rows["CPU of the service a request, ms"][:2] == (5.0, 10.0)
    shown = table(first)
    assert "400 due, 400 answered" in shown
    assert "40.0% hits" in shown


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 1}'])
def test_a_file_that_is_no_result_is_told(tmp_path, content):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"some\.json is not the result of a load test"):
        read_summary(path)
