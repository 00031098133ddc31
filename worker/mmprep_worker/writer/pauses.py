"""Whether the writer's process stood still: what has arrived meanwhile must count before time does. A pure core.

A process that was stopped, or starved of CPU time, finds deadlines that are over and, beside them, the renewals and results
that came in time and that it has not read. For a while after it goes on it takes in what has arrived, and lets time end nothing.
"""

from __future__ import annotations

#: Seconds beyond what a turn may take, after which this process has been stopped or starved; and how long what has
#: arrived meanwhile is then taken in before time is allowed to end anything.
STARVED_SECONDS = 0.5
CATCH_UP_SECONDS = 5.0


class Pauses:
    """The times of a loop's turns; ``now`` is monotonic seconds.

    Parameters
    ----------
    turn_seconds:
        How long a turn waits at most for something to happen.
    """

    def __init__(self, now: float, *, turn_seconds: float) -> None:
        self._longest = turn_seconds + STARVED_SECONDS
        self._turned = now
        self._behind_since: float | None = None

    @property
    def behind(self) -> bool:
        """Whether time must not end anything yet."""
        return self._behind_since is not None

    def turned(self, now: float, *, input_ready: bool) -> None:
        """A turn begins; ``input_ready``: there is something to read."""
        if now - self._turned > self._longest:
            self._behind_since = now
        elif self._behind_since is not None and (not input_ready or now - self._behind_since > CATCH_UP_SECONDS):
            self._behind_since = None
        self._turned = now
