"""Jobs that are done, of which the service is told soon and several at a time. A part of :mod:`mmprep.pulling`.

It runs on the registration's loop. A job stays here until the service has heard of it: where the writer goes away before
that, the next one is told. One of which no writer hears, because this process ends first, is delivered again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from mmprep.errors import CLOSED, InvalidRequest, MmprepError
from mmprep.wire import messages

if TYPE_CHECKING:
    from mmprep.pulling import Held
    from mmprep.reading import Reader

_log = logging.getLogger("mmprep.pulling")

#: Seconds until the service is told. Ended jobs use up credits for so long; a frontend hears of them later still.
_SOON_SECONDS = 0.01


class Endings:
    """What is to be told.

    Parameters
    ----------
    credits:
        How many jobs may be here at a time. When those that are to be told of use up half of them, they are told of at once: so
        there is always something to do meanwhile, or nothing to wait for.
    heard:
        Called with each job of which the service has heard.
    """

    def __init__(self, credits: int, heard: Callable[[Held], None]) -> None:  # noqa: A002 -- the word for it
        self._credits = credits
        self._heard = heard
        self._reader: Reader | None = None
        self._loop = asyncio.get_running_loop()
        #: Other threads put them there.
        self._waiting: deque[Held] = deque()
        self._due = False
        self._closed = False
        #: Who tells of which jobs.
        self._tasks: dict[asyncio.Task[None], list[Held]] = {}

    def use(self, reader: Reader) -> None:
        """Tell the service by this reader."""
        self._reader = reader

    def add(self, held: Held) -> None:
        """Tell the service of a job. May be called from any thread; raises InvalidRequest where this is closed."""
        if self._closed:
            raise InvalidRequest(CLOSED)
        self._waiting.append(held)
        if 2 * len(self._waiting) >= self._credits:
            self._loop.call_soon_threadsafe(self._tell)
        elif not self._due:
            self._due = True
            self._loop.call_soon_threadsafe(self._tell_soon)

    async def close(self) -> None:
        """Tell the service of what it was not told of yet, and of nothing any more."""
        self._closed = True
        for task, batch in self._tasks.items():
            task.cancel()
            self._waiting.extend(batch)  # they may have been told of already, which does no harm
        for batch in self._batches():
            await self._tell_anyone(batch)

    def _tell_soon(self) -> None:
        self._due = True
        self._loop.call_later(_SOON_SECONDS, self._tell_now)

    def _tell_now(self) -> None:
        self._due = False  # before what is there is taken: what comes from now on has a time of its own
        self._tell()

    def _tell(self) -> None:
        assert self._reader is not None
        for batch in self._batches():
            try:
                self._reader.tell(_about(batch), partial(self._told, batch))
            except MmprepError:
                self._start(batch)

    def _batches(self) -> Iterator[list[Held]]:
        while self._waiting:
            yield [self._waiting.popleft() for _ in range(min(len(self._waiting), messages.MAX_CREDITS))]

    def _told(self, done: list[Held], outcome: Any) -> None:
        if isinstance(outcome, MmprepError):
            if not self._closed:
                self._start(done)
            return
        for held in done:
            self._heard(held)
        if isinstance(outcome, messages.Kept):
            over = sorted(held.job_id for held in done if held.token in outcome.lost)
            _log.info("these jobs were done when their time was over: %s", ", ".join(over))

    def _start(self, done: list[Held]) -> None:
        task = self._loop.create_task(self._tell_anyone(done))
        self._tasks[task] = done
        task.add_done_callback(self._tasks.pop)

    async def _tell_anyone(self, done: list[Held]) -> None:
        """Tell the writer that is there, or the next one."""
        assert self._reader is not None
        try:
            self._told(done, await self._reader.call(_about(done)))
        except MmprepError as error:
            if not self._closed:
                _log.warning("the service could not be told of jobs that are done, and will be: %s", error)
                self._waiting.extend(done)
                self._tell_soon()


def _about(done: Sequence[Held]) -> Callable[[int], msgspec.Struct]:
    return partial(messages.Acks, tokens=tuple(held.token for held in done))
