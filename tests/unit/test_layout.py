"""The bytes of a segment: what is packed comes back, and nothing else is believed."""

import itertools

import pytest

from mmprep.items import ALIGNMENT
from mmprep.layout import (
    COUNTER_BITS,
    MAX_COUNTER,
    MAX_INCARNATION,
    PAGE,
    RECORD_SIZE,
    Geometry,
    Header,
    Record,
    State,
    generation,
    pack_free,
    pack_header,
    pack_record,
    unpack_header,
    unpack_record,
)

GEOMETRY = Geometry.plan(10 * PAGE, 100)
HEADER = Header(bytes(range(16)), 3, GEOMETRY)
RECORD = Record(State.READY, 5, generation(3, 9), GEOMETRY.arena_offset + 128, 70, 1000, bytes(range(32)))


def flips(page):
    """Return every copy of ``page`` with one bit of one byte flipped: for each byte another bit."""
    for at, bit in zip(range(len(page)), itertools.cycle(range(8)), strict=False):
        yield page[:at] + bytes([page[at] ^ (1 << bit)]) + page[at + 1 :]


def test_a_segment_is_header_directory_and_a_page_aligned_arena():
    assert Geometry.plan(10 * PAGE, 100) == Geometry(
        total_size=PAGE + 4 * PAGE + 10 * PAGE,
        slots=100,
        directory_offset=PAGE,
        arena_offset=5 * PAGE,
        arena_capacity=10 * PAGE,
    )
    assert Geometry.plan(1, 1).arena_capacity == PAGE
    assert GEOMETRY.record_offset(99) + RECORD_SIZE <= GEOMETRY.arena_offset


@pytest.mark.parametrize(("capacity", "slots"), [(0, 1), (-1, 1), (2**49, 1), (PAGE, 0), (PAGE, 2**25)])
def test_an_impossible_geometry_is_refused(capacity, slots):
    with pytest.raises(ValueError):
        Geometry.plan(capacity, slots)


def test_a_header_comes_back():
    page = pack_header(HEADER)
    assert len(page) == PAGE
    assert unpack_header(page) == HEADER
    assert unpack_header(memoryview(bytearray(page))) == HEADER


def test_a_flipped_bit_in_any_byte_of_a_header_is_refused():
    for page in flips(pack_header(HEADER)):
        with pytest.raises(ValueError):
            unpack_header(page)


def test_a_header_of_another_kind_or_version_is_named():
    with pytest.raises(ValueError, match="no ring segment"):
        unpack_header(bytes(PAGE))
    page = bytearray(pack_header(HEADER))
    page[8] = 2
    with pytest.raises(ValueError, match="version 2, this code reads 1"):
        unpack_header(page)
    with pytest.raises(ValueError, match="4096 bytes"):
        unpack_header(page[:-1])


@pytest.mark.parametrize("field", ["total_size", "slots", "directory_offset", "arena_offset", "arena_capacity"])
@pytest.mark.parametrize("change", [-64, 64, PAGE])
def test_a_header_that_contradicts_itself_is_refused(field, change):
    geometry = GEOMETRY._replace(**{field: getattr(GEOMETRY, field) + change})
    with pytest.raises(ValueError):
        unpack_header(pack_header(HEADER._replace(geometry=geometry)))


def test_a_header_with_a_wrong_epoch_or_incarnation_is_not_made():
    for wrong in (HEADER._replace(epoch=b"short"), HEADER._replace(incarnation=0)):
        with pytest.raises(ValueError):
            pack_header(wrong)


@pytest.mark.parametrize("state", [State.GRANTED, State.READY, State.RETIRED])
def test_a_record_comes_back(state):
    record = RECORD._replace(state=state)
    packed = pack_record(record)
    assert len(packed) == RECORD_SIZE
    assert unpack_record(packed, 5, GEOMETRY) == record
    assert unpack_record(memoryview(bytearray(packed)), 5, GEOMETRY) == record
    assert record.readable == (state is not State.GRANTED)


def test_a_free_slot_has_a_record_too_and_zeros_are_none():
    assert unpack_record(pack_free(7), 7, GEOMETRY) is None
    with pytest.raises(ValueError, match="self-check"):
        unpack_record(bytes(RECORD_SIZE), 0, GEOMETRY)


@pytest.mark.parametrize("packed", [pack_record(RECORD), pack_free(5)], ids=["ready", "free"])
def test_a_flipped_bit_in_any_byte_of_a_record_is_refused(packed):
    for damaged in flips(packed):
        with pytest.raises(ValueError):
            unpack_record(damaged, 5, GEOMETRY)


def test_a_record_in_another_slot_is_refused():
    with pytest.raises(ValueError, match="slot 6 holds the record of slot 5"):
        unpack_record(pack_record(RECORD), 6, GEOMETRY)
    with pytest.raises(ValueError, match="128 bytes"):
        unpack_record(pack_record(RECORD)[:-1], 5, GEOMETRY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": GEOMETRY.arena_offset - ALIGNMENT},
        {"offset": GEOMETRY.arena_offset + 1},
        {"offset": GEOMETRY.total_size},
        {"offset": GEOMETRY.total_size - 64, "length": 65, "meta_len": 0},
        {"length": 0, "meta_len": 0},
        {"length": 2**40},
        {"meta_len": 1001},
        {"length": 100},
        {"generation": 9},
    ],
    ids=str,
)
def test_a_record_whose_values_are_out_of_bounds_is_refused(wrong):
    with pytest.raises(ValueError):
        unpack_record(pack_record(RECORD._replace(**wrong)), 5, GEOMETRY)


def test_an_extent_may_end_where_the_arena_ends():
    record = RECORD._replace(offset=GEOMETRY.total_size - 64, length=64, meta_len=64)
    assert unpack_record(pack_record(record), 5, GEOMETRY) == record


def test_generations_rise_with_the_counter_and_then_the_incarnation():
    assert generation(1, 0) == 1 << COUNTER_BITS
    assert generation(1, MAX_COUNTER) + 1 == generation(2, 0)
    assert generation(MAX_INCARNATION, MAX_COUNTER) == 2**63 - 1
    for incarnation, counter in [(0, 1), (MAX_INCARNATION + 1, 1), (1, -1), (1, MAX_COUNTER + 1)]:
        with pytest.raises(ValueError):
            generation(incarnation, counter)
