"""Ctrl-C, SIGTERM and SIGHUP as one exception, raised where it can do no harm, and only once.

A child that was started and not yet noted would be left behind by an exception between the two: :meth:`Interrupts.held`
puts the exception off until the block is over. After the first one nothing is raised any more, so that cleaning up is
not cut short; whoever waits in it may count on its bounds.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """The demonstration was told to stop; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupts:
    """Takes the signals for the life of this process."""

    def __init__(self) -> None:
        self._held = 0
        self._pending: int | None = None
        self._raised = False
        for number in SIGNALS:
            signal.signal(number, self._take)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put an interrupt off until the end of the block."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self._raise()

    def _take(self, number: int, _frame: object) -> None:
        self._pending = number
        self._raise()

    def _raise(self) -> None:
        if self._pending is not None and not self._held and not self._raised:
            self._raised = True
            raise Interrupted(self._pending)
