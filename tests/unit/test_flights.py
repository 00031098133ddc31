"""Flights: one computation for all who wait, whatever happens to those who take part."""

from __future__ import annotations

import pytest

from mmprep import errors
from mmprep_worker.scheduling.admission import Quarantine
from mmprep_worker.scheduling.flight import (
    Abandon,
    Ask,
    Call,
    Expire,
    Fail,
    Joined,
    Need,
    Reprioritise,
    Retry,
)
from mmprep_worker.scheduling.flights import Flights

KEY = b"k" * 32
LANE, OTHER_LANE = 1, 2
UPLOAD_SECONDS = 10.0
QUARANTINE_SECONDS = 60.0


def new_flights(max_waiting: int = 1000) -> Flights:
    quarantine = Quarantine(max_keys=100, seconds=QUARANTINE_SECONDS)
    return Flights(max_waiting=max_waiting, upload_seconds=UPLOAD_SECONDS, quarantine=quarantine)


@pytest.fixture
def flights():
    flights = new_flights()
    yield flights
    flights.validate()


def join(
    flights: Flights,
    call: Call,
    key: bytes = KEY,
    need: Need = "tensors",
    *,
    priority=0,
    deadline=1000.0,
    now=0.0,
    sends=True,
) -> Joined:
    return flights.join(
        key, need, call, modality="image", cost=100, priority=priority, deadline=deadline, now=now, sends=sends
    )


def run(flights: Flights, flight_id: int, peer: str, lane: int = LANE) -> None:
    assert flights.uploaded(flight_id, peer, 10)
    flights.started(flight_id, lane)


def test_64_joiners_cause_one_upload_and_all_get_the_result(flights):
    calls = [(f"frontend-{number % 4}", number) for number in range(64)]
    joined = [join(flights, call) for call in calls]
    assert [answer.ask for answer in joined] == [True] + [False] * 63
    assert len({answer.flight_id for answer in joined}) == len(flights) == 1
    run(flights, 1, "frontend-0")
    waiters = flights.published(1, LANE)
    assert [waiter.call for waiter in waiters] == calls
    assert len(flights) == flights.waiting == 0


def test_an_upload_that_an_earlier_writer_asked_for_is_for_no_flight_of_this_one():
    flights = Flights(max_waiting=9, upload_seconds=1.0, quarantine=Quarantine(max_keys=1, seconds=1.0), after=1 << 39)
    assert join(flights, ("a", 1)).flight_id == (1 << 39) + 1
    assert not flights.uploaded(1, "a", 10)


def test_those_who_join_a_running_flight_get_its_result_too(flights):
    join(flights, ("a", 1))
    run(flights, 1, "a")
    assert not join(flights, ("b", 1)).ask
    assert [waiter.call for waiter in flights.published(1, LANE)] == [("a", 1), ("b", 1)]


def test_a_plan_is_waited_for_at_a_flight_for_the_tensors_and_not_the_other_way_round(flights):
    plan = join(flights, ("a", 1), need="plan")
    tensors = join(flights, ("b", 1), need="tensors")
    assert plan.ask
    assert tensors.ask
    assert plan.flight_id != tensors.flight_id
    other = join(flights, ("c", 1), key=b"o" * 32, need="tensors")
    joined = join(flights, ("d", 1), key=b"o" * 32, need="plan")
    assert (joined.flight_id, joined.ask) == (other.flight_id, False)
    run(flights, other.flight_id, "c")
    assert [(w.call, w.need) for w in flights.published(other.flight_id, LANE)] == [
        (("c", 1), "tensors"),
        (("d", 1), "plan"),
    ]


def test_a_call_that_joins_twice_is_one_waiter_with_the_larger_need_and_the_later_deadline(flights):
    join(flights, ("a", 1))
    join(flights, ("b", 1), need="plan", deadline=5.0, priority=3)
    assert not join(flights, ("b", 1), need="tensors", deadline=8.0, priority=-1).ask
    assert flights.waiting == 2
    assert flights[1].priority == -1
    assert flights.tick(5.0) == []
    assert flights.tick(8.0) == [Expire(("b", 1), 1)]


def test_when_the_uploader_dies_another_joiner_is_asked_and_only_its_bytes_count(flights):
    join(flights, ("a", 1))
    join(flights, ("a", 2))
    join(flights, ("b", 7))
    assert flights.peer_gone("a", 1.0) == [Ask(1, ("b", 7))]
    assert not flights.uploaded(1, "a", 10)
    assert flights.uploaded(1, "b", 10)
    assert not flights.uploaded(1, "b", 10)


def test_who_has_no_bytes_gets_the_result_and_is_never_asked(flights):
    join(flights, ("a", 1))
    join(flights, ("b", 1), sends=False)
    join(flights, ("c", 1))
    assert flights.cancel(("a", 1), 1.0) == [Ask(1, ("c", 1))]
    run(flights, 1, "c")
    assert [waiter.call for waiter in flights.published(1, LANE)] == [("b", 1), ("c", 1)]


def test_when_nobody_is_left_who_has_the_bytes_those_who_wait_are_told_so(flights):
    join(flights, ("a", 1))
    join(flights, ("b", 1), sends=False)
    (fail,) = flights.peer_gone("a", 1.0)
    assert (fail.calls, type(fail.error), fail.ended) == ((("b", 1),), errors.NotFound, True)
    assert len(flights) == flights.waiting == 0


def test_a_late_uploader_is_told_that_it_is_late_and_who_has_no_bytes_that_nobody_has_them(flights):
    join(flights, ("a", 1))
    join(flights, ("b", 1), sends=False)
    late, other = flights.tick(UPLOAD_SECONDS)
    assert (late.calls, type(late.error), late.ended) == ((("a", 1),), errors.DeadlineExceeded, False)
    assert (other.calls, type(other.error), other.ended) == ((("b", 1),), errors.NotFound, True)


def test_a_call_that_joins_again_with_the_bytes_may_be_asked_for_them(flights):
    join(flights, ("a", 1))
    join(flights, ("b", 1), sends=False)
    join(flights, ("b", 1))
    join(flights, ("b", 1), sends=False)
    assert flights.peer_gone("a", 1.0) == [Ask(1, ("b", 1))]


def test_an_uploader_that_cancels_is_replaced(flights):
    join(flights, ("a", 1))
    join(flights, ("b", 1))
    assert flights.cancel(("a", 1), 1.0) == [Ask(1, ("b", 1))]


def test_an_uploader_that_goes_after_its_upload_is_not_replaced(flights):
    join(flights, ("a", 1))
    join(flights, ("b", 1))
    assert flights.uploaded(1, "a", 10)
    assert flights.peer_gone("a", 1.0) == []
    flights.started(1, LANE)
    assert [waiter.call for waiter in flights.published(1, LANE)] == [("b", 1)]


def test_a_late_uploader_is_replaced_by_one_of_another_peer_and_still_gets_the_result(flights):
    join(flights, ("a", 1))
    join(flights, ("a", 2))
    join(flights, ("b", 1))
    assert flights.wake_at == UPLOAD_SECONDS
    assert flights.tick(UPLOAD_SECONDS - 0.1) == []
    assert flights.tick(UPLOAD_SECONDS) == [Ask(1, ("b", 1))]
    assert not flights.uploaded(1, "a", 10)
    run(flights, 1, "b")
    assert len(flights.published(1, LANE)) == 3


def test_when_every_joiner_was_asked_in_vain_the_flight_fails_for_all(flights):
    join(flights, ("a", 1))
    join(flights, ("b", 1))
    assert flights.tick(UPLOAD_SECONDS) == [Ask(1, ("b", 1))]
    (fail,) = flights.tick(2 * UPLOAD_SECONDS)
    assert (fail.flight_id, fail.calls, fail.ended) == (1, (("a", 1), ("b", 1)), True)
    assert isinstance(fail.error, errors.DeadlineExceeded)
    assert len(flights) == flights.waiting == 0


@pytest.mark.parametrize("uploaded", [False, True])
def test_the_last_waiter_that_leaves_a_flight_before_it_runs_ends_it(flights, uploaded):
    join(flights, ("a", 1))
    join(flights, ("b", 1))
    if uploaded:
        assert flights.uploaded(1, "a", 10)
    flights.cancel(("a", 1), 1.0)
    assert flights.cancel(("b", 1), 1.0) == [Abandon(1, None)]
    assert 1 not in flights
    assert not flights.uploaded(1, "b", 10)
    assert join(flights, ("c", 1)) == Joined(2, True, None)


def test_a_running_flight_that_nobody_waits_for_goes_on_and_may_be_joined_again(flights):
    join(flights, ("a", 1))
    run(flights, 1, "a")
    assert flights.peer_gone("a", 1.0) == [Abandon(1, LANE)]
    assert join(flights, ("b", 1), priority=7) == Joined(1, False, None)
    assert flights[1].priority == 7
    assert [waiter.call for waiter in flights.published(1, LANE)] == [("b", 1)]


def test_a_result_that_nobody_waits_for_goes_to_nobody(flights):
    join(flights, ("a", 1))
    run(flights, 1, "a")
    flights.cancel(("a", 1), 1.0)
    assert flights.published(1, LANE) == []


def test_cancelling_what_is_unknown_changes_nothing(flights):
    join(flights, ("a", 1))
    assert flights.cancel(("a", 2), 1.0) == []
    assert flights.cancel(("b", 1), 1.0) == []
    assert flights.peer_gone("b", 1.0) == []
    assert flights.waiting == 1


def test_one_waiters_deadline_does_not_end_the_flight_for_the_others(flights):
    join(flights, ("a", 1), deadline=3.0)
    join(flights, ("b", 1), deadline=7.0)
    assert flights[1].deadline == 7.0
    assert flights.uploaded(1, "a", 10)
    assert flights.tick(3.0) == [Expire(("a", 1), 1)]
    flights.started(1, LANE)
    assert [waiter.call for waiter in flights.published(1, LANE)] == [("b", 1)]


def test_an_uploader_whose_deadline_is_over_is_replaced_once(flights):
    join(flights, ("a", 1), deadline=UPLOAD_SECONDS)
    join(flights, ("b", 1))
    join(flights, ("c", 1))
    assert flights.tick(UPLOAD_SECONDS) == [Expire(("a", 1), 1), Ask(1, ("b", 1))]


def test_the_last_deadline_abandons_the_flight(flights):
    join(flights, ("a", 1), deadline=3.0)
    join(flights, ("b", 1), deadline=3.0)
    assert flights.tick(4.0) == [Expire(("a", 1), 1), Expire(("b", 1), 1), Abandon(1, None)]


def test_a_flight_has_the_highest_priority_of_those_who_wait(flights):
    join(flights, ("a", 1), priority=5)
    assert join(flights, ("b", 1), priority=3) == Joined(1, False, None)
    assert flights.uploaded(1, "a", 10)
    assert flights[1].priority == 3
    assert join(flights, ("c", 1), priority=-1) == Joined(1, False, -1)
    assert join(flights, ("d", 1), priority=4) == Joined(1, False, None)
    assert flights.cancel(("c", 1), 1.0) == [Reprioritise(1, 3)]
    assert flights.peer_gone("b", 1.0) == [Reprioritise(1, 4)]


def test_a_flight_whose_lane_is_lost_runs_once_more_with_the_same_bytes(flights):
    join(flights, ("a", 1))
    run(flights, 1, "a")
    assert flights.lane_lost(1, LANE, 1.0) == Retry(1)
    assert flights[1].nbytes == 10
    flights.started(1, OTHER_LANE)
    assert [waiter.call for waiter in flights.published(1, OTHER_LANE)] == [("a", 1)]


def test_a_key_that_takes_two_lanes_down_is_quarantined_for_a_time(flights):
    join(flights, ("a", 1))
    join(flights, ("b", 1))
    run(flights, 1, "a")
    assert flights.lane_lost(1, LANE, 1.0) == Retry(1)
    flights.started(1, OTHER_LANE)
    fail = flights.lane_lost(1, OTHER_LANE, 2.0)
    assert isinstance(fail, Fail)
    assert (fail.calls, fail.ended) == ((("a", 1), ("b", 1)), True)
    assert isinstance(fail.error, errors.MediaError)
    with pytest.raises(errors.MediaError, match="another 10 seconds"):
        join(flights, ("c", 1), now=2.0 + QUARANTINE_SECONDS - 10)
    with pytest.raises(errors.MediaError):
        join(flights, ("c", 1), need="plan", now=3.0)
    assert join(flights, ("c", 1), key=b"o" * 32, now=3.0).ask
    assert join(flights, ("c", 1), now=2.0 + QUARANTINE_SECONDS).ask


def test_hanging_up_before_the_lane_dies_does_not_hide_a_key_from_quarantine(flights):
    for number in (1, 2):
        join(flights, ("a", number))
        run(flights, number, "a")
        flights.cancel(("a", number), 1.0)
        assert isinstance(flights.lane_lost(number, LANE, 1.0), Abandon if number == 1 else Fail)
    with pytest.raises(errors.MediaError):
        join(flights, ("b", 1), now=1.0)


def test_a_result_wipes_out_the_loss_of_a_lane(flights):
    join(flights, ("a", 1))
    run(flights, 1, "a")
    flights.lane_lost(1, LANE, 1.0)
    flights.started(1, LANE)
    flights.published(1, LANE)
    join(flights, ("a", 2), now=2.0)
    run(flights, 2, "a")
    assert flights.lane_lost(2, LANE, 2.0) == Retry(2)


def test_the_last_words_of_a_lost_lane_change_nothing(flights):
    join(flights, ("a", 1))
    run(flights, 1, "a")
    flights.lane_lost(1, LANE, 1.0)
    flights.started(1, OTHER_LANE)
    assert flights.published(1, LANE) is None
    assert flights.failed(1, LANE) is None
    assert flights.refused(1, LANE, 1.0) is None
    assert flights.lane_lost(1, LANE, 1.0) is None
    assert len(flights.published(1, OTHER_LANE)) == 1


def test_a_failure_goes_to_all_who_wait_and_the_next_offer_starts_anew(flights):
    join(flights, ("a", 1))
    join(flights, ("b", 1))
    run(flights, 1, "a")
    assert [waiter.call for waiter in flights.failed(1, LANE)] == [("a", 1), ("b", 1)]
    assert join(flights, ("a", 2)).ask


def test_the_writer_can_give_up_a_flight_that_no_lane_has(flights):
    join(flights, ("a", 1))
    assert [waiter.call for waiter in flights.failed(1, None)] == [("a", 1)]


def test_wrong_bytes_fail_their_uploader_alone_and_another_is_asked(flights):
    join(flights, ("a", 1))
    join(flights, ("b", 1))
    run(flights, 1, "a")
    fail, ask = flights.refused(1, LANE, 1.0)
    assert (fail.calls, fail.ended) == ((("a", 1),), False)
    assert isinstance(fail.error, errors.ProtocolError)
    assert ask == Ask(1, ("b", 1))
    run(flights, 1, "b")
    assert [waiter.call for waiter in flights.published(1, LANE)] == [("b", 1)]


def test_wrong_bytes_end_a_flight_that_nobody_else_waits_for(flights):
    join(flights, ("a", 1))
    run(flights, 1, "a")
    (fail,) = flights.refused(1, LANE, 1.0)
    assert (fail.calls, fail.ended) == ((("a", 1),), True)
    join(flights, ("a", 2))
    run(flights, 2, "a")
    flights.cancel(("a", 2), 1.0)
    assert flights.refused(2, LANE, 1.0) == [Abandon(2, None)]
    assert len(flights) == 0


def test_openings_counts_only_what_no_flight_and_no_earlier_want_covers(flights):
    join(flights, ("a", 1), key=b"1" * 32)
    wants: list[tuple[bytes, Need]] = [
        (b"1" * 32, "tensors"),
        (b"1" * 32, "plan"),
        (b"2" * 32, "plan"),
        (b"2" * 32, "tensors"),
        (b"2" * 32, "tensors"),
        (b"2" * 32, "plan"),
    ]
    positions = flights.openings(wants)
    assert positions == [2, 3]
    assert [position for position, want in enumerate(wants) if join(flights, ("b", 1), *want).ask] == positions


def test_when_too_many_wait_a_further_one_is_refused_and_nothing_changes():
    flights = new_flights(max_waiting=2)
    join(flights, ("a", 1))
    with pytest.raises(errors.Busy) as caught:
        flights.openings([(KEY, "tensors"), (KEY, "plan")])
    assert caught.value.retry_after > 0
    join(flights, ("a", 2))
    with pytest.raises(errors.Busy):
        join(flights, ("a", 3))
    assert not join(flights, ("a", 2)).ask  # waits already
    flights.validate()
    assert flights.waiting == 2


def test_alarms_of_flights_that_are_over_do_not_pile_up(flights):
    for number in range(5000):
        join(flights, ("a", number), deadline=1e9)
        flights.cancel(("a", number), 0.0)
    flights.validate()
    assert len(flights._alarms) < 3000
