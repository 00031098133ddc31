"""How a backend stands with the service: what those are told who wait for that to change. On one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mmprep.errors import CLOSED, InvalidRequest, MmprepError


class Standing:
    """Wakes who waits, for what has come, for a refusal, and for the end.

    Attributes
    ----------
    closed: this side has left.
    refusal: why the other side takes nothing from this one, ``None`` where it does or has not said.
    """

    def __init__(self) -> None:
        self.closed = False
        self.refusal: MmprepError | None = None
        self._changed = asyncio.Event()

    def note(self) -> None:
        """Something has changed: let all who wait look again."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for ``condition``; raises a refusal that comes meanwhile, and InvalidRequest where this side has left."""
        former = self.refusal
        while not condition():
            if self.closed:
                raise InvalidRequest(CLOSED)
            if self.refusal is not former and self.refusal is not None:
                raise self.refusal
            self._changed.clear()
            await self._changed.wait()
