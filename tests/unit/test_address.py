"""Addresses are data from outside: a forged one is a typed error, and never someone else's bytes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep import layout
from mmprep.address import Address, AddressField, address_fields, check_against, check_record, parse_address
from mmprep.errors import InvalidRequest, StaleAddress
from mmprep.items import ItemMeta, Plan, Run, lay_out
from mmprep.layout import Geometry, Record, State

GEOMETRY = Geometry.plan(4 * 4096, 8)
EPOCH = "ab" * 16
META = ItemMeta("image", Plan((Run(5, 3),)), lay_out([("pixel_values", "uint8", (4, 100), "flat", False)]), {})
META_LEN = 100
GENERATION = layout.generation(1, 7)
START = GEOMETRY.arena_offset + 128
LENGTH = 128 + 400
RECORD = Record(State.READY, 3, GENERATION, START, META_LEN, LENGTH, bytes(32))
PLAIN = {
    "segment": "mmprep-0-x",
    "epoch": EPOCH,
    "slot": 3,
    "offset": START,
    "length": LENGTH,
    "generation": GENERATION,
    "metadata_length": META_LEN,
    "fields": [{"name": "pixel_values", "dtype": "uint8", "shape": [4, 100], "offset": 128}],
}
INTEGERS = st.integers(-(2**70), 2**70) | st.sampled_from(
    [0, -1, 7, 8, START, START + 64, GEOMETRY.total_size, 2**48, 2**63, 2**64, GENERATION + 1]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=40) | st.binary(max_size=40),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(list(PLAIN)) | st.integers(), children, max_size=9)
    ),
    max_leaves=12,
)


def address(**changes):
    return parse_address({**PLAIN, **changes})


def check(found, record=RECORD):
    check_against(found, segment="mmprep-0-x", epoch=EPOCH, geometry=GEOMETRY)
    check_record(found, layout.pack_record(record), GEOMETRY)


def field(**changes):
    return [{**PLAIN["fields"][0], **changes}]


def test_an_address_as_it_was_given_out_is_believed():
    found = address()
    check(found)
    assert found.fields == address_fields(META, META_LEN)
    assert parse_address(msgspec.to_builtins(found)) == found


def test_an_address_is_read_again_when_it_is_an_object_already():
    assert parse_address(address()) == address()
    forged = msgspec.structs.replace(address(), slot=-1)
    with pytest.raises(InvalidRequest):
        parse_address(forged)


@given(ANYTHING)
def test_anything_is_an_address_or_an_invalid_request(plain):
    with pytest.raises(InvalidRequest) as caught:
        parse_address(plain)
    assert caught.value.param == "address"


@given(st.sampled_from(list(PLAIN)), ANYTHING)
def test_an_address_with_one_forged_value_is_a_typed_error_or_the_same_item(name, value):
    try:
        found = address(**{name: value})
        check(found)
    except (InvalidRequest, StaleAddress):
        return
    same = msgspec.structs.replace(found, fields=address().fields)
    assert same == address()
    for forged in found.fields:
        assert forged.offset <= LENGTH


@given(st.dictionaries(st.sampled_from(["name", "dtype", "shape", "offset"]), ANYTHING, min_size=1))
def test_a_forged_field_is_a_typed_error_or_lies_inside_the_extent(changes):
    try:
        found = address(fields=field(**changes))
        check(found)
    except (InvalidRequest, StaleAddress):
        return
    (forged,) = found.fields
    size = 1
    for extent in forged.shape:
        size *= extent
    assert forged.offset + size <= LENGTH


@pytest.mark.parametrize(
    "changes",
    [
        {"segment": "mmprep-0-y"},
        {"epoch": "ba" * 16},
        {"generation": GENERATION + 1},
        {"generation": GENERATION - 1},
        {"offset": START + 64},
        {"length": LENGTH - 64, "fields": []},
        {"slot": 4},
    ],
    ids=repr,
)
def test_an_address_of_something_else_is_stale(changes):
    with pytest.raises(StaleAddress):
        check(address(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"slot": 8},
        {"slot": 2**48},
        {"offset": 0},
        {"offset": GEOMETRY.arena_offset - 64},
        {"offset": GEOMETRY.total_size},
        {"length": 2**48},
        {"length": GEOMETRY.arena_capacity},
        {"metadata_length": LENGTH + 1},
        {"metadata_length": META_LEN - 1},
        {"fields": field(dtype="float64")},
        {"fields": field(dtype="")},
        {"fields": field(dtype="float32")},
        {"fields": field(shape=[2**48] * 30)},
        {"fields": field(offset=2**48)},
        {"fields": field(offset=129)},
    ],
    ids=lambda changes: repr(changes)[:60],
)
def test_an_address_that_points_outside_is_invalid(changes):
    with pytest.raises(InvalidRequest):
        check(address(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"slot": -1},
        {"offset": -64},
        {"length": 2**49},
        {"generation": -1},
        {"generation": 2**63},
        {"epoch": EPOCH.upper()},
        {"epoch": EPOCH + "\n"},
        {"lease": "x" * 32},
        {"lease": "0" * 32 + "\n"},
        {"segment": None},
        {"fields": field(shape=[-1])},
        {"fields": field(shape=4)},
        {"more": 1},
    ],
    ids=repr,
)
def test_what_has_not_the_form_of_an_address_is_invalid(changes):
    with pytest.raises(InvalidRequest):
        address(**changes)


@pytest.mark.parametrize("state", [State.FREE, State.GRANTED])
def test_a_slot_that_is_free_or_being_filled_is_stale(state):
    with pytest.raises(StaleAddress):
        check(address(), RECORD._replace(state=state))


def test_what_was_removed_while_somebody_holds_it_stays_readable():
    check(address(), RECORD._replace(state=State.RETIRED))


@given(st.binary(min_size=128, max_size=128))
def test_a_damaged_record_is_stale(record):
    with pytest.raises(StaleAddress):
        check_record(address(), record, GEOMETRY)


def test_fields_may_overlap_but_not_leave_the_extent():
    check(address(fields=[*PLAIN["fields"], *field(name="again")]))


def test_no_error_shows_an_offset_or_a_path():
    for changes in ({"slot": 8}, {"offset": 0}, {"segment": "/dev/shm/other"}):
        with pytest.raises((InvalidRequest, StaleAddress)) as caught:
            check(address(**changes))
        assert not any(character.isdigit() or character == "/" for character in caught.value.message)


def test_fields_of_an_address_count_from_the_start_of_the_extent():
    assert address_fields(META, 65) == (AddressField("pixel_values", "uint8", (4, 100), 128),)
    assert isinstance(address(), Address)
