"""Bodies are read by their schema, and once more where clients say the same in other words."""

import json
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.requests import parse
from mmprep_frontend.render.schema import Schema


class Left(Struct, tag="left", tag_field="type"):
    left: str | None = None
    weight: int = 0


class Right(Struct, tag="right", tag_field="type"):
    right: str


class Form(Struct):
    count: Annotated[int, Meta(ge=1)] | None = None
    share: float | None = None
    either: bool | int | float | str | None = None
    ids: list[str | int | list[int]] | None = None
    named: dict[Literal["a", "b"], int] | None = None
    sides: list[Left | Right | str] | None = None
    mode: Literal["slow", "fast"] | None = None
    only: Literal["this"] | None = None
    free: dict[str, Any] | None = None


SCHEMA = Schema(Form, untyped=("left",))


def read(**fields):
    return SCHEMA.decode(json.dumps(fields).encode())


def refused(**fields):
    with pytest.raises(InvalidRequest) as caught:
        read(**fields)
    return caught.value


@given(st.integers(1, 2**53))
def test_a_whole_number_is_one_however_it_is_written(number):
    assert read(count=float(number)).count == number


def test_whole_numbers_are_found_in_lists_objects_and_structs():
    assert read(ids=[1, [2.0, 3]]).ids == [1, [2, 3]]
    assert read(named={"a": 7.0}).named == {"a": 7}
    assert read(sides=[{"type": "left", "weight": 2.0}]).sides == [Left(weight=2)]


@pytest.mark.parametrize("number", [1.5, 1e300, 2.0**54, "5", True])
def test_what_is_no_whole_number_stays_refused(number):
    assert refused(count=number).param == "count"


def test_bounds_hold_for_whole_numbers_that_are_written_as_others():
    assert "1" in refused(count=0.0).message


def test_what_may_be_a_fraction_or_anything_is_left_as_it_was_sent():
    told = read(count=2.0, share=3.0, either=4.0, free={"minimum": 5.0, "left": [6.0]})
    assert [type(value) for value in (told.share, told.either, told.free["minimum"], told.free["left"][0])] == [
        float
    ] * 4


def test_a_struct_without_its_tag_is_known_by_a_key_of_that_name_where_that_is_said():
    assert read(sides=[{"left": "x", "weight": 1.0}, "y"]).sides == [Left("x", 1), "y"]
    assert read(sides=[{"type": None, "left": "x"}]).sides == [Left("x")]
    error = refused(sides=[{"left": "x"}, {"right": "x"}])
    assert error.param == "sides[1].type"
    assert error.message == "sides[1].type: it is required; send 'left' or 'right'."


def test_a_value_that_is_not_among_those_listed_is_answered_with_them():
    assert refused(mode="Fast").message == "mode: 'Fast' is not allowed here; send 'fast' or 'slow'."
    assert refused(only="that").message == "only: 'that' is not allowed here; send 'this'."
    assert refused(named={"c": 1}).message == "named: 'c' is not allowed here; send 'a' or 'b'."
    assert refused(sides=[{"type": "up"}]).message == "sides[0].type: 'up' is not allowed here; send 'left' or 'right'."


def test_places_within_a_piece_of_a_body_are_told_from_its_own():
    with pytest.raises(InvalidRequest) as caught:
        SCHEMA.convert({"sides": [{"type": "up"}]}, "input[3]")
    assert caught.value.param == "input[3].sides[0].type"
    assert SCHEMA.convert({"count": 5.0}, "input[3]").count == 5


def test_no_json_is_told_as_such_also_behind_what_breaks_the_schema():
    for body in (b'{"count": "x", ', b'{"count": "x", "free": ' + b"[" * 100_000):
        with pytest.raises(InvalidRequest, match=r"not valid JSON|nested too deeply"):
            SCHEMA.decode(body)


@pytest.mark.parametrize(
    "part",
    [
        {"image_url": "http://host/a.png"},
        {"image_url": {"url": "http://host/a.png", "detail": "low"}, "uuid": "a"},
        {"image_url": None, "uuid": "a"},
        {"video_url": {"url": "http://host/a.mp4"}},
        {"audio_url": {"url": "http://host/a.wav"}},
        {"input_audio": {"data": "AAAA", "format": "wav"}},
        {"image_embeds": {"image_embeds": "AAAA", "image_grid_thw": [1, 2, 2]}},
        {"tool_reference": True, "name": "f"},
    ],
    ids=str,
)
def test_a_part_of_a_message_without_its_type_is_the_one_with_it(part):
    """As vLLM's chat parser infers it; it does not for texts."""
    kind = next(key for key in part if key not in ("uuid", "name"))

    def messages(*parts):
        return parse(json.dumps({"messages": [{"role": "user", "content": parts}]}).encode(), "chat").messages

    assert messages(part, {"type": "text", "text": "?"}) == messages(
        {"type": kind, **part}, {"type": "text", "text": "?"}
    )
    with pytest.raises(InvalidRequest) as caught:
        messages(part, {"text": "?"})
    assert caught.value.param == "messages[0].content[1].type"
