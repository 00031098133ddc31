"""Packets say when frames are shown, how fast, and where decoding may begin."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep.errors import DecodeError, TooLarge
from mmprep_worker.video.timeline import Timeline

TICK = Fraction(1, 1000)


def noted(packets, *, tick=TICK, longest=3600.0, told=()):
    timeline = Timeline(tick, longest)
    for time, key, shown, duration in packets:
        timeline.note(time, duration=duration, key=key, shown=shown)
    return timeline.close(told)


def even(frames, step=40):
    return [(step * n, n == 0, True, step) for n in range(frames)]


def test_a_told_rate_is_taken_where_the_times_agree():
    thirds = [(round(n * 1000 / 30), n == 0, True, 33) for n in range(50)]
    assert noted(thirds, told=[Fraction(30)]).rate == 30.0
    assert noted(thirds, told=[None, Fraction(30)]).rate == 30.0
    assert noted(thirds, told=[Fraction(60), Fraction(15)]).rate == pytest.approx(30, rel=0.01)
    assert noted(even(10), told=[Fraction(0), Fraction(-25)]).rate == 25.0


def test_one_frame_has_the_told_rate_or_the_usual_one():
    assert noted(even(1), told=[Fraction(25)]).rate == 25.0
    assert noted(even(1)).rate == 24.0
    assert noted(even(1), told=[Fraction(90_000)]).rate == 24.0


def test_the_last_frame_counts_as_long_as_it_is_shown():
    held = [*even(9), (360, False, True, 2000)]
    assert noted(held).rate == pytest.approx(10 / 2.36)
    unknown = [(time, key, shown, 0) for time, key, shown, _ in even(10)]
    assert noted(unknown).rate == 25.0
    with pytest.raises(TooLarge):
        noted([*even(9), (360, False, True, 10**9)])


def test_hidden_packets_are_no_frames_and_equal_times_are_one():
    schedule = noted([(0, True, True, 40), (40, False, False, 40), (40, False, True, 40), (40, False, True, 40)])
    assert list(schedule.times) == [0, 40]
    with pytest.raises(DecodeError, match="no frames"):
        noted([(0, True, False, 40)])
    with pytest.raises(DecodeError, match="no frames"):
        noted([])


def test_too_long_is_known_before_all_packets_are_noted():
    timeline = Timeline(TICK, 2.0)
    timeline.note(-500, duration=0, key=True, shown=True)
    timeline.note(1500, duration=0, key=False, shown=True)
    with pytest.raises(TooLarge, match=r"longer than the limit of 2 seconds \(--max-video-duration\)"):
        timeline.note(1501, duration=0, key=False, shown=True)


@st.composite
def _packets(draw):
    """Groups of pictures in the order of decoding: within a group, frames are shown in any order from the key on."""
    packets, start = [], 0
    for length in draw(st.lists(st.integers(1, 6), min_size=1, max_size=6)):
        times = [start, *draw(st.permutations([start + 40 * n for n in range(1, length)]))]
        packets += [(time, number == 0, draw(st.booleans()) or number == 0, 40) for number, time in enumerate(times)]
        start += 40 * length
    return packets


@given(_packets())
def test_decoding_begins_with_the_last_key_packet_before_a_frame(packets):
    schedule = noted(packets)
    assert list(schedule.times) == sorted({time for time, _, shown, _ in packets if shown})
    for time in schedule.times:
        start, shown = schedule.start(time)
        assert packets[start][:2] == (shown, True)
        assert shown <= time
        later_keys = [number for number, (at, key, _, _) in enumerate(packets) if key and at <= time]
        assert start == max(later_keys)
        assert any(at == time for at, _, _, _ in packets[start:])


def test_without_a_key_packet_decoding_begins_at_the_beginning():
    schedule = noted([(0, False, True, 40), (40, True, True, 40)])
    assert schedule.start(0) == (0, 0)
    assert schedule.start(40) == (1, 40)
