"""Taking up leases from addresses, explored: every interleaving of a backend, its writer, and a caller who opens at will.

The numbers are asserted so that an exploration that shrinks without anybody noticing fails. They change where the
cores' behaviour, or the world's events, change; then look at why, and put the new ones in.
"""

from __future__ import annotations

import pytest
from tests.exploration.explore import Broken, explore, report
from tests.exploration.taking_up_world import TakingUpWorld

from mmprep import holdings
from mmprep.holdings import Holdings
from mmprep_worker.writer.core import WriterCore

EVENTS = {
    "break",
    "die",
    "drop",
    "give back",
    "grant",
    "lock falls",
    "open",
    "release",
    "start",
    "to reader",
    "to writer",
    "upkeep",
}

#: Situations that take too many events to be reached from nothing.
NEXT_PROCESS = (("grant",), ("open", 0), ("die",), ("start",))
BEFORE_A_TURN = (("grant",), ("release", 0), ("upkeep",), ("to writer",), ("to reader",), ("grant",))
IN_A_TURN = (*BEFORE_A_TURN, ("give back", 1), ("to reader",))
STARTS = (NEXT_PROCESS, BEFORE_A_TURN, IN_A_TURN)


def test_no_six_events_let_a_reader_believe_what_the_writer_does_not_keep():
    explored = explore(TakingUpWorld, 6)
    assert report("taking up, 6 events", explored) == (1011, 2389)


def test_no_four_events_do_around_a_death_or_a_turn():
    explored = explore(TakingUpWorld, 4, STARTS)
    assert report("taking up around a death or a turn, 4 events", explored) == (786, 1623)
    assert set(explored.events) == EVENTS


@pytest.mark.slow
def test_no_eight_events_let_a_reader_believe_what_the_writer_does_not_keep():
    explored = explore(TakingUpWorld, 8)
    assert report("taking up, 8 events", explored) == (7661, 20790)


@pytest.mark.slow
def test_no_six_events_do_around_a_death_or_a_turn():
    explored = explore(TakingUpWorld, 6, STARTS)
    assert report("taking up around a death or a turn, 6 events", explored) == (6859, 16254)


def ignores_the_tag(monkeypatch):
    monkeypatch.setattr(holdings, "was_granted_to", lambda *_, **__: True)


def ends_what_is_given_back(monkeypatch):
    def give_back(core, _, release):
        core.ring.release(release.owner, release.leases)

    monkeypatch.setattr(WriterCore, "_give_back", give_back)


def forgets_without_a_turn(monkeypatch):
    def end(reader, lease):
        reader._held.pop(lease, None)
        reader._over = {lease}

    monkeypatch.setattr(Holdings, "_end", end)


@pytest.mark.parametrize(
    ("plant", "start", "shortest"),
    [
        (ignores_the_tag, (), ["die", "grant", "probe"]),
        (ends_what_is_given_back, (), ["grant", "give back", "probe"]),
        (forgets_without_a_turn, BEFORE_A_TURN, ["give back", "probe"]),
    ],
)
def test_a_broken_promise_is_shown_with_a_shortest_path(monkeypatch, plant, start, shortest):
    plant(monkeypatch)
    with pytest.raises(Broken) as caught:
        explore(TakingUpWorld, len(shortest), (start,))
    steps = [line.split(". ")[1].rstrip(" 012") for line in str(caught.value).splitlines()[2:]]
    assert steps[len(start) :] == shortest
