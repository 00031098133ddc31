"""What all requests of a frontend may hold."""

import pytest

from mmprep.errors import Busy, TooLarge
from mmprep_frontend.room import Room


def sums(room):
    return room.requests, room.body_bytes, room.answer_bytes


def test_the_number_of_requests_is_bounded():
    room = Room(max_requests=2)
    first, second = room.enter(), room.enter()
    with pytest.raises(Busy):
        room.enter()
    first.leave()
    first.leave()
    room.enter().leave()
    second.leave()
    assert sums(room) == (0, 0, 0)


def test_all_bodies_share_one_bound_and_a_body_above_it_never_fits():
    room = Room(max_body_bytes=100)
    with room.enter() as first, room.enter() as second:
        first.hold_body(60)
        second.hold_body(40)
        with pytest.raises(Busy):
            second.hold_body(41)
        with pytest.raises(TooLarge):
            second.hold_body(101)
        first.hold_body(59)
        second.hold_body(41)
        assert sums(room) == (2, 100, 0)
    assert sums(room) == (0, 0, 0)


def test_all_answers_share_one_bound_and_one_alone_may_be_above_it():
    room = Room(max_answer_bytes=100)
    with room.enter() as first, room.enter() as second:
        first.hold_answer(400)
        with pytest.raises(Busy):
            second.hold_answer(1)
        first.hold_answer(100)
        with pytest.raises(Busy):
            second.hold_answer(1)
        first.hold_answer(99)
        second.hold_answer(1)
    assert sums(room) == (0, 0, 0)


def test_bytes_that_are_handed_over_outlive_their_request():
    room = Room(max_answer_bytes=100)
    with room.enter() as held:
        held.hold_answer(90)
        give_back = held.hand_over(80)
        assert sums(room) == (1, 0, 90)
    assert sums(room) == (0, 0, 80)
    give_back()
    assert sums(room) == (0, 0, 0)
