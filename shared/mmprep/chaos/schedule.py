"""Which fault comes next: a seeded choice, nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

#: Seconds for which a process of each role is stopped: the least and the most. Readers are stopped for longer than a
#: lease lasts.
STOPPED = {
    "writer": (0.2, 2.0),
    "lane": (0.3, 4.0),
    "frontend": (0.3, 3.0),
    "backend": (0.5, 7.0),
    "client": (0.5, 7.0),
}
#: Seconds for which /dev/shm is full.
FULL = (0.5, 1.8)

KILLS = tuple(f"kill {role}" for role in STOPPED)
STOPS = tuple(f"stop {role}" for role in STOPPED)
GARBAGE = "garbage"
FILL = "fill /dev/shm"
FILL_AND_KILL = "fill /dev/shm, kill writer"


class Fault(NamedTuple):
    """One fault.

    Attributes
    ----------
    kind: of :func:`kinds`.
    choice: from 0 to 1, exclusive: which of the processes of the role.
    seconds: how long it lasts, where it does.
    seed: of its own random choices.
    """

    kind: str
    choice: float
    seconds: float
    seed: int


def kinds(*, shm: bool) -> tuple[str, ...]:
    """Return the kinds of fault, with those of a full /dev/shm or without."""
    return (*KILLS, *STOPS, GARBAGE, *((FILL, FILL_AND_KILL) if shm else ()))


class Schedule:
    """An endless, seeded sequence of faults in which each kind comes once before any comes again.

    Parameters
    ----------
    among:
        The kinds.
    """

    def __init__(self, seed: int, among: Sequence[str]) -> None:
        self._random = random.Random(seed)  # noqa: S311 -- repeatable, not secret
        self._among = tuple(among)
        self._bag: list[str] = []

    def next(self) -> Fault:
        """Return the next fault."""
        if not self._bag:
            self._bag = list(self._among)
            self._random.shuffle(self._bag)
        kind = self._bag.pop()
        least, most = STOPPED.get(kind.rpartition(" ")[2], FULL) if kind in STOPS else FULL
        return Fault(kind, self._random.random(), self._random.uniform(least, most), self._random.getrandbits(32))
