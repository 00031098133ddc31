"""The books of a chaos run: what makes it fail, what is excused, and how its figures come about."""

import random

import pytest

from mmprep.chaos import schedule
from mmprep.chaos.events import Called, Ended, Failed, Held, Started
from mmprep.chaos.garbage import messages_of
from mmprep.chaos.report import tables
from mmprep.chaos.schedule import Schedule
from mmprep.chaos.service import not_quiet
from mmprep.chaos.tally import Tally
from mmprep.errors import ProtocolError
from mmprep.wire import messages
from mmprep.wire.codec import MAX_FRAMES, unpack


def judged(tally):
    tally.judge()
    return tally.report()


def ok(start, end, **more):
    return Called("native shm", "ok", start, end, **more)


def refusal(message="no living backend", *, retryable=False, start=10.0, end=10.1, backend=None):
    return Failed("http shm", "NotFoundError", message, retryable, start, end, backend)


def test_a_run_in_which_all_is_right_passes():
    tally = Tally()
    tally.event("c", ok(1.0, 2.0, tries=3))
    tally.event("c", Called("http shm", "refused as it should be", 2.0, 3.0))
    tally.event("c", Held("view", 5, 0))
    tally.event("c", refusal(retryable=True))
    tally.event("c", Ended(0))
    report = judged(tally)
    assert report["passed"]
    assert (report["calls"], report["answered_right"], report["retries"], report["reads"]) == (2, 1, 2, 5)


@pytest.mark.parametrize(
    ("event", "what"),
    [
        (ok(1.0, 2.0, wrong=7), "wrong_bytes"),
        (Held("copy", 1, 7), "wrong_bytes"),
        (Called("http none", "unanswered", 1.0, 60.0), "unanswered"),
        (Ended(2), "unanswered"),
        (refusal(), "unexpected_errors"),
    ],
)
def test_one_wrong_byte_unanswered_call_or_unexpected_error_fails_the_run(event, what):
    tally = Tally()
    tally.event("c", event)
    report = judged(tally)
    assert not report["passed"]
    assert report[what] > 0


def test_a_leak_or_something_stuck_fails_the_run():
    for enter in (Tally.leak, Tally.stuck):
        tally = Tally()
        enter(tally, "a segment")
        assert not judged(tally)["passed"]


@pytest.mark.parametrize(("end", "expected"), [(10.0, 0), (8.0, 1), (12.0, 0)])
def test_an_unknown_backend_is_excused_only_while_it_was_killed_and_not_back(end, expected):
    tally = Tally()
    tally.fault("kill backend", 5.0, "b0")
    tally.event("b0", Started(end))
    tally.event("c", refusal(backend="b0"))
    assert judged(tally)["unexpected_errors"] == expected


def test_a_stopped_backend_is_no_excuse():
    tally = Tally()
    tally.fault("stop backend", 5.0, "b0")
    tally.event("c", refusal(backend="b0"))
    assert judged(tally)["unexpected_errors"] == 1


@pytest.mark.parametrize(("kills", "expected"), [((8.0, 9.0), 0), ((9.0,), 1), ((), 1)])
def test_a_quarantined_medium_is_excused_only_after_two_lanes_were_killed(kills, expected):
    tally = Tally()
    for at in kills:
        tally.fault("kill lane", at)
    tally.event("c", refusal("Processing this medium broke off 2 times; it is refused for another 60 seconds."))
    assert judged(tally)["unexpected_errors"] == expected


def test_recovery_is_counted_to_the_end_of_the_first_call_that_began_after_the_kill():
    tally = Tally()
    tally.fault("kill writer", 10.0)
    tally.event("c", ok(9.9, 10.1))
    tally.event("c", ok(10.2, 13.0, cold=True))
    tally.event("c", ok(10.3, 12.0))
    report = judged(tally)
    assert report["after_writer_kill"]["any_answer"] == {"kills": 1, "median_seconds": 2.0, "max_seconds": 2.0}
    assert report["after_writer_kill"]["answer_that_needs_a_lane"]["max_seconds"] == 3.0
    assert report["longest_gap"] == {"seconds": 1.9, "began": 0.0}


def test_hit_rates_are_taken_before_a_kill_and_after_service_is_back():
    tally = Tally()
    tally.fault("kill writer", 100.0)
    for end, hits in ((90.0, 0), (96.0, 4), (99.0, 4), (103.0, 1), (107.0, 1), (109.0, 4)):
        tally.event("c", ok(end - 0.5, end, lookups=4, hits=hits))
    rates = judged(tally)["hit_rate"]
    assert rates["before"] == {"lookups": 8, "rate": 1.0}
    assert rates["after"] == {"lookups": 8, "rate": 0.25}
    assert rates["all"]["lookups"] == 24


def test_every_kind_of_fault_comes_before_any_comes_again_and_a_seed_repeats_them():
    kinds = schedule.kinds(shm=True)
    planned = Schedule(7, kinds)
    first = [planned.next() for _ in range(2 * len(kinds))]
    assert sorted(f.kind for f in first[: len(kinds)]) == sorted(kinds)
    assert sorted(f.kind for f in first[len(kinds) :]) == sorted(kinds)
    again = Schedule(7, kinds)
    assert [again.next() for _ in first] == first
    assert [Schedule(8, kinds).next() for _ in first] != first


def test_stops_last_as_long_as_their_role_says():
    planned = Schedule(1, schedule.STOPS)
    for fault in (planned.next() for _ in range(100)):
        least, most = schedule.STOPPED[fault.kind.rpartition(" ")[2]]
        assert least <= fault.seconds <= most
    assert not {schedule.FILL, schedule.FILL_AND_KILL} & set(schedule.kinds(shm=False))


def test_garbage_is_never_a_hello_that_anybody_welcomes():
    chosen = random.Random(1)
    for _ in range(200):
        for frames in messages_of(chosen):
            if len(frames) > MAX_FRAMES:
                continue
            try:
                message = unpack(frames[0], messages.ToWriter)
            except ProtocolError:
                continue
            assert not isinstance(message, messages.Hello) or message.protocol != 1


QUIET = {
    "ring": {"capacity": 10, "free": 4, "ready": 6, "leased": 0, "filling": 0},
    "pins": 0,
    "backends": [],
    "frontends": [{"pid": 1, "inflight": 0}],
    "queues": {"media": {"depth": 0}},
    "lanes": [{"pid": 2, "state": "idle"}],
}


@pytest.mark.parametrize(
    "change",
    [
        {"ring": {**QUIET["ring"], "free": 3}},
        {"ring": {**QUIET["ring"], "ready": 5, "leased": 1}},
        {"ring": {**QUIET["ring"], "ready": 5, "filling": 1}},
        {"pins": 1},
        {"backends": [{"id": "b", "leases": 0}]},
        {"frontends": [{"pid": 1, "inflight": 1}]},
        {"queues": {"media": {"depth": 1}}},
        {"lanes": [{"pid": 2, "state": "busy"}]},
    ],
)
def test_a_status_with_anything_held_is_not_quiet(change):
    assert not_quiet(QUIET) == []
    assert len(not_quiet({**QUIET, **change})) == 1


def test_the_tables_name_what_went_wrong():
    tally = Tally()
    tally.event("c", ok(1.0, 2.0, wrong=7))
    tally.leak("segment /mmprep-x")
    tally.event("c", refusal("no such thing"))
    machine = {"load_average": [0.1], "cores": 2, "python": "3"}
    result = {"machine": machine, "seed": 5, "minutes": 1.0, "every": 2.0, "circumstances": {}, **judged(tally)}
    text = tables(result)
    for word in ("seed 5", "7 wrong bytes", "segment /mmprep-x", "no such thing", "FAILED"):
        assert word in text
    assert tables({**result, "passed": True}).endswith("passed")
