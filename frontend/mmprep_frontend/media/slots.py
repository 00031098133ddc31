"""How many fetches may be under way: in all, for one host, and waiting. First come, first served where it fits."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mmprep.errors import Busy


class Slots:
    """The bounds, and who waits. Used on the event loop only.

    Parameters
    ----------
    total, per_host:
        Held at a time, in all and for one host.
    waiting:
        At most so many wait; the next one is refused at once.
    """

    def __init__(self, total: int, per_host: int, waiting: int) -> None:
        self._free = total
        self._per_host = per_host
        self._max_waiting = waiting
        self._held: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def hold(self, host: str) -> AsyncIterator[None]:
        """Wait for a slot, and hold it in the block; raises :class:`~mmprep.errors.Busy` where too many wait."""
        await self._acquire(host)
        try:
            yield
        finally:
            self._release(host)

    def _fits(self, host: str) -> bool:
        return self._free > 0 and self._held[host] < self._per_host

    def _take(self, host: str) -> None:
        self._free -= 1
        self._held[host] += 1

    def _release(self, host: str) -> None:
        self._free += 1
        self._held[host] -= 1
        if not self._held[host]:
            del self._held[host]
        for index, (waiting_host, granted) in enumerate(self._waiting):
            # One that is done was cancelled in this turn of the loop, and will leave by itself.
            if not granted.done() and self._fits(waiting_host):
                del self._waiting[index]
                self._take(waiting_host)
                granted.set_result(None)
                return

    async def _acquire(self, host: str) -> None:
        # Nobody who waits fits, else the last release would have taken it in: whoever fits overtakes nobody.
        if self._fits(host):
            self._take(host)
            return
        if len(self._waiting) >= self._max_waiting:
            raise no_slot()
        entry = (host, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        try:
            await entry[1]
        except BaseException:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                # Granted and given up in the same turn of the loop.
                self._release(host)
            raise


def no_slot() -> Busy:
    """Return what is told to those for whom there is no slot, or none in time."""
    return Busy("too many media are being fetched at the moment; try again", retry_after=1.0)
