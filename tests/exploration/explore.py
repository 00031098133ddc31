"""Every interleaving of a protocol's events up to a depth, breadth first, each different state once.

A *world* is the core under test, what surrounds it, and a reference that knows what must hold. It is deterministic: a
state is reached again by applying its path of events to a new world, which is how branches are made, so that nothing
has to be copied. Two states are the same when their canonical forms are equal; those contain all that the future depends
on, with times relative to now, and without the names of things that are alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol, TypeAlias

import pytest

Event: TypeAlias = tuple[Hashable, ...]


class World(Protocol):
    """What is explored."""

    def events(self) -> list[Event]:
        """Return what may happen next."""

    def apply(self, event: Event) -> list[Event]:
        """Let it happen; return variants of the event that may happen in its place, as a crash half-way through."""

    def check(self) -> None:
        """Raise AssertionError where something does not hold that always holds."""

    def canonical(self) -> Hashable:
        """Return what the future depends on."""

    def probe(self) -> None:
        """Try what must be refused, and wind everything up; the world is not used any more then."""


@dataclass
class Explored:
    """Counts of what was seen; ``events`` has the transitions by the event's name."""

    states: int = 0
    events: Counter[Hashable] = field(default_factory=Counter)

    @property
    def transitions(self) -> int:
        """How many events happened, over all states."""
        return self.events.total()


class Broken(AssertionError):
    """Something does not hold; the message has a shortest path of events to it."""


def report(name: str, explored: Explored) -> tuple[int, int]:
    """Print what was seen; return the numbers of states and transitions."""
    print(f"{name}: {explored.states} states, {explored.transitions} transitions, {dict(explored.events)}")  # noqa: T201 -- what an exploration is for
    return explored.states, explored.transitions


def explore(make: Callable[[], World], depth: int, starts: Sequence[tuple[Event, ...]] = ((),)) -> Explored:
    """Visit every state within ``depth`` events of a new world, or of where ``starts`` lead.

    Raises
    ------
    Broken
        An event, a check or a probe failed.
    """
    seen = {_digest(_replay(make, start)) for start in starts}
    level = list(starts)
    explored = Explored()
    for _ in range(depth):
        following: list[tuple[Event, ...]] = []
        for path in level:
            waiting = _replay(make, path).events()
            while waiting:
                step = (*path, waiting.pop())
                world, variants = _step(make, step)
                waiting += variants
                explored.events[step[-1][0]] += 1
                state = _digest(world)
                if state not in seen:
                    seen.add(state)
                    following.append(step)
                    _probe(make, step)
        level = following
    explored.states = len(seen)
    return explored


def _digest(world: World) -> bytes:
    """Return what stands for a state: a long exploration would not fit into memory with the states themselves."""
    return blake2b(repr(world.canonical()).encode(), digest_size=16).digest()


def _replay(make: Callable[[], World], path: tuple[Event, ...]) -> World:
    world = make()
    for event in path:
        world.apply(event)
    return world


def _step(make: Callable[[], World], path: tuple[Event, ...]) -> tuple[World, list[Event]]:
    world = _replay(make, path[:-1])
    try:
        variants = world.apply(path[-1])
        world.check()
    except (Exception, pytest.fail.Exception) as error:
        raise _broken(error, path) from error
    return world, variants


def _probe(make: Callable[[], World], path: tuple[Event, ...]) -> None:
    try:
        _replay(make, path).probe()
    except (Exception, pytest.fail.Exception) as error:
        raise _broken(error, (*path, ("probe",))) from error


def _broken(error: BaseException, path: tuple[Event, ...]) -> Broken:
    steps = "".join(f"\n  {number}. {' '.join(map(str, event))}" for number, event in enumerate(path, 1))
    return Broken(f"{type(error).__name__}: {error}\nafter the shortest path of events:{steps}")
