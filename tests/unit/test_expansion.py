import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmprep.errors import InvalidRequest
from mmprep.items import Plan, Run
from mmprep_frontend.render.expansion import Range, expand
from mmprep_frontend.render.tokens import Placed

PAD = 9
runs = st.builds(Run, st.integers(10, 12), st.integers(1, 5), st.booleans())
plans = st.builds(Plan, st.lists(runs, min_size=1, max_size=4).map(tuple))
texts = st.lists(st.integers(0, 8), max_size=6)


@st.composite
def prompts(draw):
    """Texts with a medium between each two of them, and the media's modalities and plans."""
    media = draw(st.lists(st.tuples(st.sampled_from(["image", "video"]), plans), max_size=6))
    return [draw(texts) for _ in range(len(media) + 1)], media


@settings(deadline=None)
@given(prompts())
def test_ranges_hold_the_plans_and_what_lies_between_is_unchanged(prompt):
    pieces, media = prompt
    token_ids, placeholders = list(pieces[0]), []
    by_modality = {}
    for (modality, plan), text in zip(media, pieces[1:], strict=True):
        placeholders.append(Placed(modality, len(token_ids)))
        by_modality.setdefault(modality, []).append(plan)
        token_ids += [PAD, *text]
    before = list(token_ids)

    expanded = expand(token_ids, placeholders, by_modality)

    assert token_ids == before
    end, between = 0, []
    for placed, (modality, plan) in zip(expanded.ranges, media, strict=True):
        assert placed.modality == modality
        assert placed.offset >= end
        between.append(expanded.token_ids[end : placed.offset])
        end = placed.offset + placed.length
        assert expanded.token_ids[placed.offset : end] == plan.token_ids()
        assert placed.is_embed == plan.is_embed()
    between.append(expanded.token_ids[end:])
    assert between == pieces


def test_a_mask_is_given_only_where_some_position_takes_no_embedding():
    plan = Plan((Run(5, 2), Run(6, 1, embed=False)))
    assert expand([1, PAD], [Placed("image", 1)], {"image": [plan]}).ranges == [
        Range("image", 1, 3, [True, True, False])
    ]
    assert expand([PAD], [Placed("image", 0)], {"image": [Plan((Run(5, 2),))]}).ranges[0].is_embed is None


@pytest.mark.parametrize("items", [0, 1, 3])
def test_more_or_fewer_media_than_placeholders_are_refused_with_both_numbers(items):
    placeholders = [Placed("image", 0), Placed("image", 1)]
    with pytest.raises(InvalidRequest, match=rf"has {items} of .* room for 2"):
        expand([PAD, PAD], placeholders, {"image": [Plan((Run(5, 1),))] * items})


def test_a_medium_of_a_modality_without_a_placeholder_is_refused():
    with pytest.raises(InvalidRequest, match="has 1 of modality 'video'"):
        expand([1], [], {"video": [Plan((Run(5, 1),))]})
