"""Every interleaving of a protocol's events up to a depth, breadth first, each different state once.

A *world* is the core under test, what surrounds it, and a reference that knows what must hold. It is deterministic: a
state is reached again by applying its path of events to a new world, which is how branches are made, so that nothing
has to be copied. Two states are the same when their canonical forms are equal; those contain all that the future depends
on, with times relative to now, and without the names of things that are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
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
    """Counts; ``new`` are the states first seen after so many events."""

    states: int = 1
    transitions: int = 0
    new: list[int] = field(default_factory=lambda: [1])


class Broken(AssertionError):
    """Something does not hold; the message has a shortest path of events to it."""


def explore(make: Callable[[], World], depth: int) -> Explored:
    """Visit every state within ``depth`` events of a new world.

    Raises
    ------
    Broken
        An event, a check or a probe failed.
    """
    start = make()
    seen = {start.canonical()}
    level: list[tuple[Event, ...]] = [()]
    explored = Explored()
    for _ in range(depth):
        following: list[tuple[Event, ...]] = []
        for path in level:
            waiting = _replay(make, path).events()
            while waiting:
                step = (*path, waiting.pop())
                world, variants = _step(make, step)
                waiting += variants
                explored.transitions += 1
                state = world.canonical()
                if state not in seen:
                    seen.add(state)
                    following.append(step)
                    _probe(make, step)
        explored.new.append(len(following))
        level = following
    explored.states = len(seen)
    return explored


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
