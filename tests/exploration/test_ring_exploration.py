"""The lease protocol, explored: every interleaving of all events on a tiny ring, and every crash within one of them.

The numbers are asserted so that an exploration that shrinks without anybody noticing fails. They change where the ring's
behaviour, or the reference's events, change; then look at why, and put the new ones in.
"""

from __future__ import annotations

import pytest
from tests.exploration.explore import Broken, explore, report
from tests.exploration.ring_world import RingWorld

from mmprep.layout import generation
from mmprep_worker.ring.space import Space

EVENTS = {
    "abort",
    "change",
    "clear",
    "crash",
    "crash within",
    "deliver",
    "grant",
    "hit",
    "owner_gone",
    "publish",
    "reassert",
    "release",
    "remove",
    "renew",
    "settle",
    "tick",
    "unpin",
    "wait",
}


def entry(number, key, units):
    """Return the events that publish the ``number``-th entry."""
    return (("grant", key, units), ("publish", generation(1, number)))


def lease(owner, number, kind):
    return ("deliver", owner, generation(1, number), kind)


#: Situations that take too many events to be reached from an empty ring.
FULL = (*entry(1, 1, 2), *entry(2, 2, 2), *entry(3, 3, 1))
SHARED = (
    *entry(1, 1, 1),
    *entry(2, 2, 2),
    lease("engine-0", 1, "view"),
    lease("engine-1", 1, "copy"),
    ("hit", 2),
)
REMOVED_AND_OVERDUE = (
    *entry(1, 1, 2),
    lease("engine-0", 1, "view"),
    ("remove", 1),
    *entry(2, 1, 2),
    ("wait",),
    lease("engine-0", 2, "copy"),
    ("tick",),
)
RESTARTED = (
    *entry(1, 1, 1),
    *entry(2, 2, 2),
    lease("engine-0", 1, "view"),
    lease("engine-1", 2, "copy"),
    ("remove", 1),
    ("crash",),
)
STARTS = (FULL, SHARED, REMOVED_AND_OVERDUE, RESTARTED)


def test_no_six_events_on_an_empty_ring_break_a_promise():
    explored = explore(RingWorld, 6)
    assert report("ring, 6 events", explored) == (3099, 9978)


def test_no_three_events_on_a_busy_ring_break_a_promise():
    explored = explore(RingWorld, 3, STARTS)
    assert report("busy ring, 3 events", explored) == (4913, 15366)
    assert set(explored.events) == EVENTS


@pytest.mark.slow
def test_no_eight_events_on_an_empty_ring_break_a_promise():
    explored = explore(RingWorld, 8)
    assert report("ring, 8 events", explored) == (53467, 231966)


@pytest.mark.slow
def test_no_five_events_on_a_busy_ring_break_a_promise():
    explored = explore(RingWorld, 5, STARTS)
    assert report("busy ring, 5 events", explored) == (137527, 653778)


def test_a_broken_promise_is_shown_with_a_shortest_path(monkeypatch):
    monkeypatch.setattr(Space, "_forget", lambda space, entry: space.directory.drop(entry))  # and tells nobody
    with pytest.raises(Broken, match="the directory differs") as caught:
        explore(RingWorld, 6)
    _, _, first, second = str(caught.value).splitlines()
    assert first.startswith("  1. grant ")
    assert second == f"  2. abort {generation(1, 1)}"
