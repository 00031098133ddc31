"""What a request may choose about processing is judged by the card and brought into one form."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep.arguments import Argument, choose, read_chosen
from mmprep.errors import InvalidRequest

SIZE = (
    Argument("size.shortest_edge", "whole", 3136, 1, 1000_000, former=("min_pixels",)),
    Argument("size.longest_edge", "whole", 500_000, 1, 9_000_000, former=("max_pixels",)),
)
CARD = {
    "image": (*SIZE, Argument("do_resize", "flag", True)),
    "video": (
        Argument("size.shortest_edge", "whole", 100, 1, 200),
        Argument("size.longest_edge", "whole", 5000, 1, 9000),
        Argument("fps", "number", None, 0.001, 1000),
        Argument("num_frames", "whole", None, 2, 768),
        Argument("do_sample_frames", "flag", True, beside=("fps", "num_frames")),
    ),
}


def chosen(kwargs, *present):
    packed = choose(CARD, kwargs, present or ("image", "video"))
    return {modality: json.loads(one) for modality, one in packed.items()}


def test_names_old_and_new_are_one_choice_and_the_former_one_wins():
    told = {"image": {"size.longest_edge": 7}}
    assert chosen({"max_pixels": 7}) == told
    assert chosen({"size": {"shortest_edge": 3136, "longest_edge": 7}}, "image") == told
    assert chosen({"size": {"shortest_edge": 3136, "longest_edge": 8}, "max_pixels": 7}, "image") == told
    # A former name makes a mapping whole.
    assert chosen({"size": {"longest_edge": 7}, "min_pixels": 5}, "image") == {
        "image": {"size.shortest_edge": 5, "size.longest_edge": 7}
    }


def test_each_modality_gets_what_it_knows():
    assert chosen({"fps": 2, "do_resize": False, "max_pixels": 9}) == {
        "image": {"do_resize": False, "size.longest_edge": 9},
        "video": {"fps": 2.0},
    }
    assert chosen({"fps": 2}, "image") == {}


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"min_pixels": 3136, "max_pixels": 500_000, "do_resize": True},
        {"size": None, "max_pixels": None, "fps": None, "do_sample_frames": None},
        {"do_sample_frames": True},
        {"do_sample_frames": False},
    ],
)
def test_what_would_be_done_anyway_is_no_choice(kwargs):
    assert choose(CARD, kwargs, ("image", "video")) == {}
    assert choose(CARD, {"size": {"shortest_edge": 3136, "longest_edge": 500_000}}, ("image",)) == {}


def test_equal_choices_have_one_form_and_others_another():
    one = choose(CARD, {"fps": 2, "num_frames": 4}, ("video",))
    assert one == choose(CARD, {"num_frames": 4, "fps": 2.0}, ("video",))
    assert one == choose(CARD, {"num_frames": 4, "fps": 2.0, "do_sample_frames": True}, ("video",))
    others = [{"fps": 2}, {"num_frames": 4}, {"fps": 2.5, "num_frames": 4}]
    assert len({choose(CARD, kwargs, ("video",))["video"] for kwargs in [*others, {"fps": 2, "num_frames": 4}]}) == 4


@pytest.mark.parametrize(
    ("kwargs", "place", "words"),
    [
        ({"a": 1}, "a", "max_pixels, min_pixels"),
        ({"": 1}, "", "no argument"),
        ({"a": None}, "a", "no argument"),
        ({"size": {"a": None}}, "size.a", "no argument"),
        ({"size.shortest_edge": 7}, "size.shortest_edge", "no argument"),
        ({"size": 7}, "size", "object with shortest_edge and longest_edge"),
        ({"size": {"height": 7}}, "size.height", "no argument"),
        ({"size": {"shortest_edge": 7}}, "size", "must hold shortest_edge and longest_edge"),
        ({"size": {}}, "size", "must hold"),
        ({"size": {"shortest_edge": {"a": 1}, "longest_edge": 1}}, "size.shortest_edge", "a whole number"),
        ({"min_pixels": 0}, "min_pixels", "from 1 to 1000000"),
        ({"min_pixels": 1000_001}, "min_pixels", "from 1 to 1000000"),
        ({"min_pixels": 10**400}, "min_pixels", "a whole number"),
        ({"min_pixels": 5.0}, "min_pixels", "a whole number"),
        ({"min_pixels": True}, "min_pixels", "a whole number"),
        ({"min_pixels": "5"}, "min_pixels", "a whole number"),
        ({"min_pixels": [5]}, "min_pixels", "a whole number"),
        ({"do_resize": 1}, "do_resize", "true or false"),
        ({"do_resize": "true"}, "do_resize", "true or false"),
        ({"fps": float("nan")}, "fps", "a number from 0.001 to 1000"),
        ({"fps": float("inf")}, "fps", "a number"),
        ({"fps": -1}, "fps", "a number"),
        ({"fps": False}, "fps", "a number"),
        ({"fps": 10**400}, "fps", "a number"),
        ({"num_frames": 2.0}, "num_frames", "a whole number"),
    ],
)
def test_what_cannot_be_chosen_is_refused_by_its_path(kwargs, place, words):
    for present in (("image",), ("image", "video")):
        with pytest.raises(InvalidRequest) as caught:
            choose(CARD, kwargs, present)
        assert caught.value.param == f"mm_processor_kwargs.{place}"
        assert words in caught.value.message


def test_bounds_are_those_of_the_media_that_are_there():
    assert chosen({"max_pixels": 9_000_000}, "image") == {"image": {"size.longest_edge": 9_000_000}}
    size = {"size": {"shortest_edge": 150, "longest_edge": 8000}}
    assert set(chosen(size)) == {"image", "video"}
    with pytest.raises(InvalidRequest, match="from 1 to 200"):
        chosen({"size": {"shortest_edge": 250, "longest_edge": 8000}}, "video")
    # Nobody is there, and somebody could take it.
    assert choose(CARD, {"size": {"shortest_edge": 250, "longest_edge": 8000}, "fps": 3}, ()) == {}
    with pytest.raises(InvalidRequest):
        choose(CARD, {"fps": 0}, ())
    with pytest.raises(InvalidRequest):
        choose(CARD, {"nothing": 0}, ())


def test_a_long_or_large_choice_is_refused_without_being_repeated():
    with pytest.raises(InvalidRequest) as caught:
        choose(CARD, {"x" * 10_000: 1}, ())
    assert len(caught.value.message) < 300
    assert len(caught.value.param) < 100
    with pytest.raises(InvalidRequest, match="at most 64"):
        choose(CARD, {str(number): 1 for number in range(65)}, ())


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "min_pixels": st.integers(1, 200),
            "max_pixels": st.integers(1, 9000),
            "do_resize": st.booleans(),
            "fps": st.floats(0.001, 1000) | st.integers(1, 1000),
            "num_frames": st.integers(2, 768),
            "do_sample_frames": st.booleans(),
        },
    )
)
def test_lanes_read_what_frontends_chose(kwargs):
    for modality, packed in choose(CARD, kwargs, ("image", "video")).items():
        told = read_chosen(CARD[modality], packed)
        assert told == json.loads(packed)
        assert told
        former = {"size.shortest_edge": "min_pixels", "size.longest_edge": "max_pixels"}
        assert all(kwargs[former.get(name, name)] == value for name, value in told.items())


names = st.sampled_from(["size", "min_pixels", "fps", "do_resize", "shortest_edge", "longest_edge", "a", ""])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.integers(1, 200),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(names, anything, max_size=4), st.sets(st.sampled_from(["image", "video", "audio"])))
def test_whatever_a_request_holds_is_a_choice_or_refused(kwargs, present):
    try:
        packed = choose(CARD, kwargs, present)
    except InvalidRequest:
        return
    assert all(read_chosen(CARD[modality], one) for modality, one in packed.items())


@pytest.mark.parametrize(
    "packed", [b"{", b"[]", b'{"a":1}', b'{"fps":0}', b'{"num_frames":1e9}', b'{"fps":null}', b"\xff", b'{"fps":"1"}']
)
def test_what_nobody_chose_is_refused_in_a_lane(packed):
    with pytest.raises(InvalidRequest):
        read_chosen(CARD["video"], packed)
