"""The flight protocol, explored: every interleaving of calls, uploads, lanes and time around two keys.

The numbers are asserted so that an exploration that shrinks without anybody noticing fails. They change where the
flights' behaviour, or the reference's events, change; then look at why, and put the new ones in.
"""

from __future__ import annotations

import pytest
from tests.exploration.explore import Broken, explore, report
from tests.exploration.flights_world import FlightsWorld

from mmprep_worker.scheduling.flights import Flights

EVENTS = {
    "cancel",
    "fail",
    "give up",
    "join",
    "lose",
    "peer gone",
    "publish",
    "refuse",
    "start",
    "tick",
    "upload",
    "upload other size",
}

#: Situations that take too many events to be reached from nothing.
BOTH_LANES_BUSY = (
    ("join", "a", 1, b"light", "tensors"),
    ("upload", 1),
    ("start", 0),
    ("join", "b", 1, b"heavy", "tensors"),
    ("upload", 2),
    ("start", 1),
    ("join", "a", 2, b"light", "plan"),
)
MANY_WANTED = (
    ("join", "a", 1, b"light", "plan"),
    ("join", "b", 1, b"light", "plan"),
    ("join", "a", 2, b"light", "tensors"),
    ("join", "b", 1, b"heavy", "tensors"),
)
STRUCK_ONCE = (
    ("join", "a", 1, b"light", "tensors"),
    ("upload", 1),
    ("start", 0),
    ("lose", 0),
    ("start", 0),
    ("join", "b", 1, b"light", "tensors"),
)
IN_QUARANTINE = (*STRUCK_ONCE, ("lose", 0), ("join", "a", 1, b"heavy", "plan"))
STARTS = (BOTH_LANES_BUSY, MANY_WANTED, STRUCK_ONCE, IN_QUARANTINE)


def test_no_four_events_cost_a_call_its_answer():
    explored = explore(FlightsWorld, 4)
    assert report("flights, 4 events", explored) == (11685, 32542)


def test_no_three_events_cost_a_call_its_answer_while_much_goes_on():
    explored = explore(FlightsWorld, 3, STARTS)
    assert report("busy flights, 3 events", explored) == (3292, 10192)
    assert set(explored.events) == EVENTS


@pytest.mark.slow
def test_no_five_events_cost_a_call_its_answer():
    explored = explore(FlightsWorld, 5)
    assert report("flights, 5 events", explored) == (60292, 277279)


@pytest.mark.slow
def test_no_five_events_cost_a_call_its_answer_while_much_goes_on():
    explored = explore(FlightsWorld, 5, STARTS)
    assert report("busy flights, 5 events", explored) == (137511, 526480)


def test_a_lost_answer_is_shown_with_a_shortest_path(monkeypatch):
    monkeypatch.setattr(Flights, "lane_lost", lambda *_: None)  # a lost lane's flight is forgotten
    with pytest.raises(Broken) as caught:
        explore(FlightsWorld, 4)
    steps = [line.split(". ")[1].split()[0] for line in str(caught.value).splitlines()[2:]]
    assert steps == ["join", "upload", "start", "lose"]
