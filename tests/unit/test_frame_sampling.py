"""Frames are chosen as vLLM chooses them; the lists here were computed by vLLM 0.33's own loaders."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep.errors import InvalidRequest
from mmprep_worker.video.sampling import Choice, paced, read_choice, spread

ANY = 10**9


def choices():
    return st.builds(
        Choice,
        st.none() | st.just(-1) | st.integers(1, 768),
        st.none() | st.floats(0.01, 1e300),
    )


TWICE_A_SECOND = [0, 15, 31, 47, 62, 78, 94, 110, 125, 141, 157, 173, 188, 204, 220, 236, 251, 267, 283, 299]
THIRTY_TWO = [0, 9, 19, 28, 38, 48, 57, 67, 77, 86, 96, 106, 115, 125, 135, 144, 154, 163, 173, 183, 192, 202, 212]
THIRTY_TWO += [221, 231, 241, 250, 260, 270, 279, 289, 299]


@pytest.mark.parametrize(
    ("count", "rate", "choice", "indices"),
    [
        (300, 30.0, Choice(), THIRTY_TWO),
        (31, 30.0, Choice(), list(range(31))),
        (32, 30.0, Choice(), list(range(32))),
        (300, 30.0, Choice(fps=1.0), [0, 33, 66, 99, 132, 166, 199, 232, 265, 299]),
        (300, 30.0, Choice(fps=2.0), TWICE_A_SECOND),
        (300, 30.0, Choice(-1, 4.0), [int(x) for x in np.linspace(0, 299, 40, dtype=int)]),
        (300, 30.0, Choice(3), [0, 149, 299]),
        (300, 30.0, Choice(fps=0.01), [0]),
    ],
)
def test_an_even_spread_is_vllms_default(count, rate, choice, indices):
    assert spread(count, rate, choice, ANY) == indices


TWICE_ROUNDED = [0, 16, 31, 47, 63, 79, 94, 110, 126, 142, 157, 173, 189, 205, 220, 236, 252, 268, 283, 299]


@pytest.mark.parametrize(
    ("count", "rate", "choice", "indices"),
    [
        (300, 30.0, Choice(), TWICE_ROUNDED),
        (31, 30.0, Choice(), [0, 10, 20, 30]),
        (3, 30.0, Choice(), [0, 1, 2]),
        (100, 25.0, Choice(), [0, 14, 28, 42, 57, 71, 85, 99]),
        (59, 29.97, Choice(), [0, 19, 39, 58]),
        (60, 29.97, Choice(), [0, 20, 39, 59]),
        (300, 30.0, Choice(fps=1.0), [0, 33, 66, 100, 133, 166, 199, 233, 266, 299]),
    ],
)
def test_a_pace_is_vllms_default_for_qwen3_vl(count, rate, choice, indices):
    assert paced(count, rate, choice, ANY) == indices


def test_a_number_of_frames_is_taken_at_any_pace_and_bounds_a_pace_that_is_asked_for():
    assert paced(300, 30.0, Choice(5), ANY) == [0, 75, 150, 224, 299]
    assert len(paced(300, 30.0, Choice(5, 3.0), ANY)) == 5
    assert len(paced(300, 30.0, Choice(50, 3.0), ANY)) == 30
    assert len(paced(300, 30.0, Choice(-1), ANY)) == 300


@given(st.integers(1, 100_000), st.floats(0.01, 1000), choices(), st.integers(1, 768), st.sampled_from([spread, paced]))
def test_any_rule_takes_frames_that_are_there_in_order_and_never_too_many(count, rate, choice, most, rule):
    indices = rule(count, rate, choice, most)
    assert 1 <= len(indices) <= min(most, count)
    assert indices[0] == 0
    assert indices[-1] < count
    assert all(first < second for first, second in pairwise(indices))
    assert all(type(index) is int for index in indices)


def test_what_a_request_asks_for_is_read():
    assert read_choice({}, most=768) == Choice(None, None)
    assert read_choice({"num_frames": None, "fps": None}, most=768) == Choice(None, None)
    assert read_choice({"num_frames": 768, "fps": 2}, most=768) == Choice(768, 2.0)
    assert read_choice({"num_frames": -1, "fps": 0.5}, most=1) == Choice(-1, 0.5)


@pytest.mark.parametrize(
    ("io", "name"),
    [
        ({"backend": "opencv"}, "backend"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": -2}, "num_frames"),
        ({"num_frames": 769}, "num_frames"),
        ({"num_frames": True}, "num_frames"),
        ({"num_frames": 2.0}, "num_frames"),
        ({"num_frames": "8"}, "num_frames"),
        ({"fps": 0}, "fps"),
        ({"fps": -1}, "fps"),
        ({"fps": True}, "fps"),
        ({"fps": "2"}, "fps"),
        ({"fps": (1, 2)}, "fps"),
        ({"fps": float("inf")}, "fps"),
        ({"fps": float("nan")}, "fps"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name(io, name):
    with pytest.raises(InvalidRequest) as refused:
        read_choice(io, most=768)
    assert refused.value.param == f"media_io_kwargs.video.{name}"
