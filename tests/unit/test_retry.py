"""When a fetch that failed is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep_frontend.media.retry import RetryPolicy, read_retry_after

CHANCES = st.floats(0, 1, exclude_max=True)


@given(st.integers(1, 50), CHANCES, st.floats(0, 100), st.none() | st.floats(0, 1e9))
def test_a_pause_is_bounded_ends_before_the_deadline_and_is_no_shorter_than_the_host_asks(
    failed: int, chance: float, left: float, retry_after: float | None
) -> None:
    policy = RetryPolicy(tries=20)
    pause = policy.pause(failed, left=left, chance=chance, retry_after=retry_after)
    asked = retry_after or 0.0
    if pause is None:
        assert failed >= 20 or left <= asked + policy.longest
    else:
        assert failed < 20
        assert asked <= pause <= asked + policy.longest
        assert pause < left


def test_ceilings_double_up_to_the_longest_and_the_jitter_is_full() -> None:
    policy = RetryPolicy(tries=9, first=0.25, longest=1.0)
    for failed, ceiling in ((1, 0.25), (2, 0.5), (3, 1.0), (4, 1.0), (8, 1.0)):
        for chance in (0.0, 0.5, 0.875):
            assert policy.pause(failed, left=10, chance=chance) == chance * ceiling


def test_there_are_as_many_tries_as_the_policy_says() -> None:
    assert [RetryPolicy(tries=3).pause(failed, left=10, chance=0) for failed in (1, 2, 3, 4)] == [0, 0, None, None]
    assert RetryPolicy(tries=1).pause(1, left=10, chance=0) is None


def test_a_host_that_asks_for_all_the_time_that_is_left_gets_no_other_try() -> None:
    assert RetryPolicy().pause(1, left=5, chance=0, retry_after=4.5) == 4.5
    assert RetryPolicy().pause(1, left=5, chance=0, retry_after=5.0) is None
    assert RetryPolicy().pause(1, left=0, chance=0) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("Thu, 01 Jan 1970 00:02:00 GMT", 20.0),
        ("Thu, 01 Jan 1970 00:02:00 -0000", 20.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        (None, None),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("9" * 400, None),
        ("٣", None),
        ("Thu, 99 Jan 1970 00:02:00 GMT", None),
        ("Thu, 01 Jan 99999999999 00:02:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str | None, seconds: float | None) -> None:
    assert read_retry_after(text, now=100.0) == seconds


@given(st.text(max_size=60))
def test_nothing_that_a_host_sends_as_retry_after_is_an_error(text: str) -> None:
    seconds = read_retry_after(text, now=1e9)
    assert seconds is None or seconds >= 0
