"""Keeps the time of a load test: sends when it is due, counts from when it was due, second by second.

All of it is callbacks, of the clock and of the target: a task or a timer for each request would cost more than the request.
What comes next is encoded ahead: much of it before the first request is sent, the rest as others are.

Open loop: arrivals say when. A request that finds ``max_in_flight`` others under way is sent late, and its latency counts
from when it was due all the same. Closed loop: so many users, each of whom asks again a while after the answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

from mmprep.errors import MmprepError
from mmprep.loadtest.clock import Clock
from mmprep.loadtest.histogram import Histogram
from mmprep.loadtest.targets import OK, TIMEOUT, Prepared, Target
from mmprep.loadtest.workloads import Ask

#: Requests that are encoded before they are due: as many as this, and as few as have so many bytes.
_MOST_AHEAD: Final = 65_536
_AHEAD_BYTES: Final = 64 << 20
#: Seconds by which a call of the clock may be early.
_EARLY: Final = 1e-6


class Time(Protocol):
    """As :class:`mmprep.loadtest.clock.Clock` has it."""

    def now(self) -> float:
        """Return the time in seconds."""

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        """Call back then."""


class _Sent(NamedTuple):
    """A request under way: when it was due and sent, what gives it up, and what is done when its end is counted."""

    due: float
    sent: float
    give_up: Callable[[], object]
    then: Callable[[], None]


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
    cpu: seconds of CPU time that this process used meanwhile.
    in_flight: requests under way.
    seconds: each second of it.
    """

    def __init__(self) -> None:
        self.latency = Histogram()
        self.service = Histogram()
        self.outcomes: Counter[str] = Counter()
        self.late = 0.0
        self.elapsed = 0.0
        self.cpu = 0.0
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
    clock:
        Seconds that pass; by default those of the running loop's machine.
    """

    def __init__(
        self,
        target: Target,
        asks: Iterator[Ask],
        *,
        timeout: float = 60.0,
        max_in_flight: int = 512,
        clock: Time | None = None,
    ) -> None:
        self.record = Record()
        self._target = target
        self._asks = asks
        self._timeout = timeout
        self._most = max_in_flight
        self._given_clock = clock
        self._clock: Time
        self._started = 0.0
        self._stopped = False
        self._numbers = 0
        #: By number, and so in the order in which they were sent.
        self._under_way: dict[int, _Sent] = {}
        #: What is sent next, with when it is due, and whether there is more.
        self._prepared: deque[tuple[float, Prepared]] = deque()
        self._ahead_bytes = 0
        self._more: Iterator[tuple[float, Ask]] | None = None
        #: Users of a closed loop who will ask again.
        self._users = 0
        self._pacing = self._watching = False
        self._end: asyncio.Future[None] | None = None

    def stop(self) -> None:
        """Send nothing any more; the run ends when what is under way has its answers."""
        self._stopped = True
        self._end_if_done()

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
        self._more = ((0.0, ask) for ask in self._asks)
        self._prepare(2 * users)

        def ask_again() -> None:
            due = self._now()
            if due >= seconds or self._stopped or not (self._prepared or self._prepare(1)):
                self._leave()
                return
            self._send(self._take(), due, think_first)
            self._prepare(1)

        def think_first() -> None:
            if think:
                self._clock.call_at(self._clock.now() + think, ask_or_leave)
            else:
                ask_again()

        def ask_or_leave() -> None:
            ask_again()
            self._end_if_done()

        def begin() -> None:
            self._users = users
            for _ in range(users):
                ask_again()

        return await self._ran(begin)

    def _leave(self) -> None:
        """A user asks no more; after the last one nothing is sent."""
        self._users -= 1
        if not self._users:
            self._more = None
            self._prepared.clear()

    async def _paced(self, timed: Iterator[tuple[float, Ask]]) -> Record:
        self._more = timed
        self._prepare(_MOST_AHEAD)
        return await self._ran(self._pace)

    async def _ran(self, begin: Callable[[], None]) -> Record:
        """Begin, and wait until nothing is left to be sent or under way."""
        if self._given_clock is None:
            with Clock() as self._clock:
                await self._driven(begin)
        else:
            self._clock = self._given_clock
            await self._driven(begin)
        self.record.elapsed = self._now()
        return self.record

    async def _driven(self, begin: Callable[[], None]) -> None:
        self._end = asyncio.get_running_loop().create_future()
        self._started, cpu = self._clock.now(), time.process_time()
        try:
            begin()
            self._end_if_done()
            await self._end
        finally:
            for sent in self._under_way.values():
                sent.give_up()
            self._stopped = True
            self.record.cpu = time.process_time() - cpu

    # --- what is sent ---------------------------------------------------------------------------------------------

    def _prepare(self, count: int) -> bool:
        """Encode so many requests that come next, as far as there is room; return whether one waits to be sent."""
        for _ in range(count):
            if self._prepared and (self._ahead_bytes > _AHEAD_BYTES or len(self._prepared) >= _MOST_AHEAD):
                break
            try:
                following = None if self._more is None else next(self._more, None)
            except MmprepError as error:  # as of a line of a trace
                following = None
                self._fail(error)
            if following is None:
                self._more = None
                break
            prepared = self._target.prepare(following[1])
            self._ahead_bytes += prepared.nbytes
            self._prepared.append((following[0], prepared))
        return bool(self._prepared)

    def _take(self) -> Any:
        """Return the request that is sent next."""
        prepared = self._prepared.popleft()[1]
        self._ahead_bytes -= prepared.nbytes
        return prepared.request

    def _pace(self) -> None:
        """Send all that is due, as far as there is room, and come again when the next is."""
        sent = 0
        while len(self._under_way) < self._most and not self._stopped and (self._prepared or self._prepare(1)):
            due = self._prepared[0][0]
            if due > self._now() + _EARLY:
                self._pace_at(due)
                break
            self._send(self._take(), due, self._pace)
            sent += 1
        self._prepare(sent + 1)  # never many at a time: meanwhile no answer is seen to come

    def _pace_at(self, due: float) -> None:
        if self._pacing:  # the next that is due is always the same until it is sent
            return
        self._pacing = True
        self._clock.call_at(self._started + due, self._due)

    def _due(self) -> None:
        self._pacing = False
        self._pace()
        self._end_if_done()

    def _send(self, request: Any, due: float, then: Callable[[], None]) -> None:
        self.record.second(due).due += 1
        self.record.in_flight += 1
        self._numbers += 1
        sent = self._now()
        self.record.late = max(self.record.late, sent - due)
        give_up = self._target.start(request, partial(self._ended, self._numbers))
        self._under_way[self._numbers] = _Sent(due, sent, give_up, then)
        self._watch()

    # --- what becomes of it ---------------------------------------------------------------------------------------

    def _ended(self, number: int, outcome: str | BaseException) -> None:
        """A request has ended."""
        sent = self._under_way.pop(number, None)
        if sent is None:
            return
        self.record.in_flight -= 1
        if isinstance(outcome, BaseException):
            self._fail(outcome)
            return
        self.record.answered(outcome, due=sent.due, sent=sent.sent, now=self._now())
        sent.then()
        self._end_if_done()

    def _watch(self) -> None:
        """Look again when the request that was sent first has had its time."""
        if self._under_way and not self._watching:
            self._watching = True
            first = next(iter(self._under_way.values()))
            self._clock.call_at(self._started + first.sent + self._timeout, self._expire)

    def _expire(self) -> None:
        self._watching = False
        while self._under_way:
            number, first = next(iter(self._under_way.items()))
            if first.sent + self._timeout > self._now() + _EARLY:
                break
            first.give_up()
            self._ended(number, TIMEOUT)
        self._watch()

    def _end_if_done(self) -> None:
        if self._end is None or self._end.done() or self._under_way:
            return
        if self._stopped or not (self._users or self._prepared or self._more):
            self._end.set_result(None)

    def _fail(self, error: BaseException) -> None:
        """What is asked, or something here, is wrong, and not the server: the run ends with it."""
        if self._end is None:
            raise error
        self._stopped = True
        if not self._end.done():
            self._end.set_exception(error)

    def _now(self) -> float:
        return self._clock.now() - self._started
