"""Which entries deserve to stay: the policy that the sweeping hands ask.

A policy knows slots and nothing else. It never sees held entries being passed over: those are not its decision.
"""

from __future__ import annotations

from typing import Protocol


class Policy(Protocol):
    """The interface; every method is called once an event and must take constant time."""

    def touched(self, slot: int) -> None:
        """Note that the entry in ``slot`` was found by its key."""

    def spare(self, slot: int) -> bool:
        """Say whether a hand that meets the unheld entry in ``slot`` passes over it.

        A policy must not answer yes for ever: the hands ask an entry again in the next revolution, and the second
        answer within one allocation has to be no unless the entry was touched in between.
        """

    def forgotten(self, slot: int) -> None:
        """Note that the entry in ``slot`` is gone; the next one there starts without a history."""


class Clock:
    """One bit an entry: used since a hand last passed.

    A new entry starts without the mark: the hand has just passed it, so it has a full revolution to be used.

    Parameters
    ----------
    slots:
        How many slots the directory has.
    """

    __slots__ = ("_used",)

    def __init__(self, slots: int) -> None:
        self._used = bytearray(slots)

    def touched(self, slot: int) -> None:
        self._used[slot] = 1

    def spare(self, slot: int) -> bool:
        if self._used[slot]:
            self._used[slot] = 0
            return True
        return False

    def forgotten(self, slot: int) -> None:
        self._used[slot] = 0
