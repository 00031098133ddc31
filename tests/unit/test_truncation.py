"""Cutting prompts: the promise of every prompt, and the cases at its edges."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.expansion import Expanded, Range
from mmprep_frontend.render.truncation import Truncation, truncate, truncate_offsets, truncation


@st.composite
def prompts(draw):
    """Return a prompt of numbered tokens with ranges between them."""
    ranges, end = [], 0
    for _ in range(draw(st.integers(0, 3))):
        offset = end + draw(st.integers(0, 4))
        length = draw(st.integers(1, 4))
        ranges.append(Range(draw(st.sampled_from(["image", "video"])), offset, length, None))
        end = offset + length
    return Expanded(list(range(end + draw(st.integers(0, 4)))), ranges)


@given(prompts(), st.integers(1, 30), st.sampled_from(["left", "right"]))
def test_what_is_kept_is_one_end_of_the_prompt_with_every_medium_whole_or_the_request_is_refused(prompt, tokens, side):
    ids = prompt.token_ids
    expected = ids[-tokens:] if side == "left" else ids[:tokens]
    media = [ids[placed.offset : placed.offset + placed.length] for placed in prompt.ranges]
    whole = all(set(medium) <= set(expected) for medium in media)
    if not whole:
        with pytest.raises(InvalidRequest) as refused:
            truncate(prompt, Truncation(tokens, side))
        assert refused.value.param == "truncate_prompt_tokens"
        return
    cut = truncate(prompt, Truncation(tokens, side))
    assert cut.token_ids == expected
    assert [cut.token_ids[placed.offset : placed.offset + placed.length] for placed in cut.ranges] == media
    assert [placed.modality for placed in cut.ranges] == [placed.modality for placed in prompt.ranges]
    offsets = [(token, token + 1) for token in ids]
    assert truncate_offsets(offsets, Truncation(tokens, side)) == [(token, token + 1) for token in expected]


def test_nothing_is_cut_where_nothing_was_asked_for():
    prompt = Expanded([1, 2, 3], [])
    assert truncate(prompt, Truncation(None, "left")) is prompt
    assert truncate(prompt, Truncation(3, "left")) is prompt
    assert truncate_offsets(None, Truncation(1, "left")) is None


def test_the_refusal_says_which_medium_would_be_cut_and_where_it_is():
    prompt = Expanded(list(range(20)), [Range("image", 2, 3, None), Range("video", 10, 5, None)])
    with pytest.raises(InvalidRequest, match=r"12 of the prompt's 20 .* medium 2, of modality 'video'.*10 to 14"):
        truncate(prompt, Truncation(12, "right"))


@pytest.mark.parametrize(
    ("asked", "side", "expected"),
    [
        (None, None, Truncation(None, "right")),
        (5, None, Truncation(5, "right")),
        (5, "left", Truncation(5, "left")),
        (100, "right", Truncation(100, "right")),
        (-1, None, Truncation(99, "right")),
    ],
)
def test_minus_one_means_all_that_leaves_room_for_an_answer_and_the_side_is_the_tokenizers(asked, side, expected):
    assert truncation(asked, side, default="right", max_model_len=100) == expected


def test_more_than_the_model_takes_is_refused_with_both_numbers():
    with pytest.raises(InvalidRequest, match=r"101.*100") as refused:
        truncation(101, None, default="right", max_model_len=100)
    assert refused.value.param == "truncate_prompt_tokens"


@given(st.text(max_size=20), st.integers(1, 25), st.sampled_from(["left", "right"]))
def test_a_text_is_trimmed_on_the_side_that_is_cut_and_only_beyond_the_bound(text, characters, side):
    trimmed, dropped = Truncation(3, side).trim(text, characters)
    assert trimmed == (text[-characters:] if side == "left" else text[:characters])
    assert text[dropped : dropped + len(trimmed)] == trimmed
    assert Truncation(None, side).trim(text, characters) == (text, 0)
