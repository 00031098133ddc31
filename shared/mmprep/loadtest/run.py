"""Keeps the time of a load test: sends when it is due, counts from when it was due, second by second.

Open loop: arrivals say when. A request that finds ``max_in_flight`` others under way is sent late, and its latency counts
from when it was due all the same. Closed loop: so many users, each of whom asks again a while after the answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from mmprep.loadtest.histogram import Histogram
from mmprep.loadtest.targets import OK, Target, within
from mmprep.loadtest.workloads import Ask

#: Requests that are encoded before they are due.
_AHEAD: Final = 64
#: Seconds between two looks whether the run was stopped.
_NAP: Final = 0.2


@dataclass(slots=True)
class Second:
    """What happened in one second of a run: what was due, sent and answered then, and how long the answered took."""

    due: int = 0
    answered: int = 0
    failed: int = 0
    latency: Histogram = field(default_factory=Histogram)


class Record:
    """What happened in a run.

    Attributes
    ----------
    latency: of all requests that were answered well, from when they were due.
    service: of the same, from when they were sent; less than ``latency`` where they were sent late.
    outcomes: how often which.
    late: seconds by which a request was sent after it was due, at most.
    elapsed: seconds from the start to the last answer.
    in_flight: requests under way.
    seconds: each second of it.
    """

    def __init__(self) -> None:
        self.latency = Histogram()
        self.service = Histogram()
        self.outcomes: Counter[str] = Counter()
        self.late = 0.0
        self.elapsed = 0.0
        self.in_flight = 0
        self.seconds: list[Second] = []

    def second(self, at: float) -> Second:
        """Return the second that holds so many seconds from the start."""
        while len(self.seconds) <= int(at):
            self.seconds.append(Second())
        return self.seconds[int(at)]

    def answered(self, outcome: str, *, due: float, sent: float, now: float) -> None:
        """Count an answer; all times in seconds from the start."""
        self.outcomes[outcome] += 1
        second = self.second(now)
        if outcome != OK:
            second.failed += 1
            return
        second.answered += 1
        second.latency.record(now - due)
        self.latency.record(now - due)
        self.service.record(now - sent)


class Run:
    """One run of asks against a target.

    Parameters
    ----------
    timeout:
        Seconds after which a request is given up.
    max_in_flight:
        Requests under way at a time in an open loop, at most.
    clock, sleep:
        Seconds that pass, and waiting for them to.
    """

    def __init__(
        self,
        target: Target,
        asks: Iterator[Ask],
        *,
        timeout: float = 60.0,
        max_in_flight: int = 512,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self.record = Record()
        self._target = target
        self._asks = asks
        self._timeout = timeout
        self._room = asyncio.Semaphore(max_in_flight)
        self._clock = clock
        self._sleep = sleep
        self._started = 0.0
        self._stopped = False

    def stop(self) -> None:
        """Send nothing any more; the run ends when what is under way has its answers."""
        self._stopped = True

    async def open_loop(self, arrivals: Iterable[float]) -> Record:
        """Send each ask at its time; return when all are answered."""
        due_times = iter(arrivals)
        return await self._paced((due, ask) for due, ask in zip(due_times, self._asks, strict=False))

    async def replay(self, seconds: float) -> Record:
        """Send asks that say themselves when they are due, as far as that is within so many seconds."""

        def timed() -> Iterator[tuple[float, Ask]]:
            for ask in self._asks:
                assert ask.due is not None
                if ask.due >= seconds:
                    return
                yield ask.due, ask

        return await self._paced(timed())

    async def closed_loop(self, users: int, seconds: float, *, think: float = 0.0) -> Record:
        """Let ``users`` ask for so many seconds, each ``think`` seconds after an answer; return when all have theirs."""
        self._started = self._clock()

        async def ask_again_and_again() -> None:
            while self._now() < seconds and not self._stopped:
                ask = next(self._asks, None)
                if ask is None:
                    return
                prepared = self._target.prepare(ask)
                due = self._now()
                self.record.second(due).due += 1
                await self._send(prepared, due)
                if think:
                    await self._sleep(think)

        async with asyncio.TaskGroup() as group:
            for _ in range(users):
                group.create_task(ask_again_and_again())
        return self._ended()

    async def _paced(self, timed: Iterator[tuple[float, Ask]]) -> Record:
        self._started = self._clock()
        prepared: list[tuple[float, Any]] = []
        async with asyncio.TaskGroup() as group:
            while True:
                # While nothing is due, those that come next are encoded.
                while len(prepared) < _AHEAD and (not prepared or prepared[0][0] > self._now()):
                    if (following := next(timed, None)) is None:
                        break
                    prepared.append((following[0], self._target.prepare(following[1])))
                if not prepared:
                    break
                due, request = prepared.pop(0)
                while (wait := due - self._now()) > 0 and not self._stopped:
                    await self._sleep(min(wait, _NAP))
                await self._room.acquire()
                if self._stopped:
                    break
                self.record.second(due).due += 1
                group.create_task(self._send(request, due)).add_done_callback(lambda _: self._room.release())
                await asyncio.sleep(0)
        return self._ended()

    async def _send(self, prepared: Any, due: float) -> None:
        sent = self._now()
        self.record.late = max(self.record.late, sent - due)
        self.record.in_flight += 1
        outcome = await within(self._timeout, self._target.send(prepared))
        self.record.in_flight -= 1
        self.record.answered(outcome, due=due, sent=sent, now=self._now())

    def _now(self) -> float:
        return self._clock() - self._started

    def _ended(self) -> Record:
        self.record.elapsed = self._now()
        return self.record
