"""Fetching media over http(s) without being led inside: who waits for which download, redirects, tries, bounds.

For each hop: judge the URL, take a slot, resolve the name once, judge every address it gave, and hand those addresses
to the connection, so that there is no second resolution which could answer otherwise. Redirects are followed here, each
judged like a first URL; :mod:`mmprep_frontend.media.exchange` asks one host once.

Who asks for a URL that is on its way already waits for that one flight. It goes on while anybody waits, so its deadline is
the latest of theirs; everybody leaves at their own. Who comes a moment after it has landed gets the same bytes, as long as
somebody still has them and the host lets them be kept: requests that come at once are not all read at once. A host that
fails or is overloaded, and a connection that is lost, get another try, as :mod:`mmprep_frontend.media.retry` decides.

Bounds: bytes (announced and counted, after decompression), time (total, connecting, between two reads), redirects,
tries, connections in all and per host, idle ones, and fetches that wait for one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final, Self, TypeAlias
from weakref import ref

from mmprep.errors import FetchError, MmprepError, ServiceUnavailable
from mmprep.metrics import Metrics
from mmprep_frontend.media.allowance import Hold
from mmprep_frontend.media.exchange import Condition, Exchange, OpenSocket, PassingError, Reply, silence
from mmprep_frontend.media.memory import MediaMemory
from mmprep_frontend.media.names import Resolver, SystemResolver
from mmprep_frontend.media.policy import Target, UrlPolicy
from mmprep_frontend.media.retry import RetryPolicy
from mmprep_frontend.media.slots import Slots, no_slot

MAX_REDIRECTS: Final = 5

#: What a flight is shared by: who has something at hand does not wait with those who have not.
_Course: TypeAlias = tuple[str, Condition | None]


class Fetcher:
    """Fetches media, as far as a policy lets it. To be made and used within one event loop.

    Parameters
    ----------
    policy:
        What may be read.
    max_bytes:
        Largest medium, in bytes, ``--max-media-size``.
    memory:
        What all media may take.
    metrics:
        Where downloads are counted, and those who waited for one that was on its way.
    timeout:
        Seconds for one fetch in all, redirects and waiting included.
    connect_timeout, read_timeout:
        Seconds for one connection to stand, TLS included, and for the next bytes to arrive.
    connections, connections_per_host:
        At most so many in use at a time. None is kept for later while twice ``connections`` are open.
    waiting:
        At most so many fetches wait for a connection; the next one is refused at once.
    recent:
        Seconds for which what has landed, and is in use, is also given to who asks then.
    retry:
        Which failures get another try, and when.
    chance:
        Gives random numbers from 0 up to and without 1.
    resolver:
        What names mean.
    open_socket:
        Makes the socket for an address that is about to be dialled.
    """

    def __init__(
        self,
        policy: UrlPolicy,
        *,
        max_bytes: int,
        memory: MediaMemory,
        metrics: Metrics,
        timeout: float = 30.0,
        connect_timeout: float = 5.0,
        read_timeout: float = 10.0,
        connections: int = 64,
        connections_per_host: int = 16,
        waiting: int = 1024,
        recent: float = 1.0,
        retry: RetryPolicy | None = None,
        chance: Callable[[], float] = random.random,
        resolver: Resolver | None = None,
        open_socket: OpenSocket | None = None,
    ) -> None:
        self._policy = policy
        self._timeout = timeout
        self._metrics = metrics
        self._slots = Slots(connections, connections_per_host, waiting)
        self._flights: dict[_Course, _Flight] = {}
        #: Those that were under way when all was forgotten: who waits for them gets them, and nobody else.
        self._former: set[_Flight] = set()
        self._recent = recent
        #: What has landed and is in use, and when it did.
        self._in_use: dict[_Course, tuple[ref[Reply], float]] = {}
        self._retry = retry or RetryPolicy()
        self._chance = chance
        self._resolver = resolver or SystemResolver()
        self._exchange = Exchange(
            policy,
            max_bytes=max_bytes,
            memory=memory,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            # As many idle ones as may be in use; beyond, a connection serves one exchange.
            most_open=2 * connections,
            resolver=self._resolver,
            open_socket=open_socket,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection. Fetches under way fail."""
        flights = [flight.task for flight in (*self._flights.values(), *self._former)]
        for task in flights:
            task.cancel()
        if flights:
            await asyncio.wait(flights)
        await self._exchange.close()
        self._resolver.close()

    def forget(self) -> None:
        """Give nobody who asks from now on what was asked for before."""
        self._former.update(self._flights.values())
        self._flights.clear()
        self._in_use.clear()

    async def fetch(
        self,
        url: str,
        *,
        param: str | None = None,
        timeout: float | None = None,
        condition: Condition | None = None,
        hold: Hold | None = None,
    ) -> Reply:
        """Return what lies at ``url``, with what its host says about keeping it.

        Where the last who waits for it is cancelled, the connection closes.

        Parameters
        ----------
        url:
            As the request holds it; it is judged here.
        param:
            The place in the request; every error names it.
        timeout:
            Seconds that are left for it, where that is less than the fetcher's own.
        condition:
            What is at hand; the host is asked only where the way still leads to the same URL.
        hold:
            Told the bytes of the medium as far as they are known: as the host announces them, and as they come. What it
            raises is raised here, and whoever else waits for the same URL goes on.

        Raises
        ------
        mmprep.errors.InvalidRequest, mmprep.errors.Forbidden
            The URL, a redirect, or an address behind them must not be read.
        mmprep.errors.FetchError
            The host answered, and not with a medium.
        mmprep.errors.FetchBadGateway
            The host is unknown, unreachable, broken, or not to be trusted.
        mmprep.errors.FetchTimeout
            The host was silent, or too slow.
        mmprep.errors.TooLarge
            More than ``max_bytes``.
        mmprep.errors.Busy
            Too many fetches, or too many bytes of media, at the moment.
        mmprep.errors.ServiceUnavailable
            The fetcher was closed meanwhile.
        """
        seconds = self._timeout if timeout is None else min(timeout, self._timeout)
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            return await self._share(self._policy.judge_url(url), deadline, condition, hold)
        except MmprepError as error:
            if param is not None:
                error.at(param)
            raise

    async def _share(self, target: Target, deadline: float, condition: Condition | None, hold: Hold | None) -> Reply:
        """Wait for the flight to ``target`` until ``deadline``, or until it is too large for who waits; start it where
        there is none.
        """
        course = (target.url, condition)
        if (reply := self._just_landed(course)) is not None:
            self._metrics.count("mmprep_fetch_joins_total")
            return reply
        flight = self._flights.get(course)
        if flight is None:
            flight = self._flights[course] = _Flight(deadline)
            flight.task = asyncio.create_task(self._fly(target, flight, condition))
            flight.task.add_done_callback(lambda _: self._landed(course, flight))
        else:
            self._metrics.count("mmprep_fetch_joins_total")
        flight.deadline = max(flight.deadline, deadline)
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        end = loop.call_at(deadline, _wake, waiter)
        try:
            flight.join(waiter, hold)
            await waiter
        finally:
            end.cancel()
            flight.waiting.pop(waiter, None)
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # looked at, even where who waited was cancelled
            if not flight.waiting and not flight.task.done():
                # Who comes now must not join what is being given up.
                self._landed(course, flight)
                flight.task.cancel()
        if not flight.task.done():
            raise flight.too_late()
        if flight.task.cancelled():
            raise ServiceUnavailable("the service is stopping")
        error = flight.task.exception()
        if error is not None:
            raise _own(error)
        return flight.task.result()

    def _landed(self, course: _Course, flight: _Flight) -> None:
        current = self._flights.get(course) is flight
        if current:
            del self._flights[course]
        if not flight.task.done():
            return
        self._former.discard(flight)
        flight.wake_all()
        outcome = _outcome(flight.task)
        self._metrics.count("mmprep_fetches_total", outcome=outcome)
        if outcome == "ok" and current:
            self._remember(course, flight.task.result())

    def _remember(self, course: _Course, reply: Reply) -> None:
        """Let those who come in the next moment have a reply, unless its host wants to be asked each time."""
        if reply.keeping != "ttl":
            return

        def forget(gone: ref[Reply]) -> None:
            if self._in_use.get(course, (None,))[0] is gone:
                del self._in_use[course]

        self._in_use[course] = ref(reply, forget), asyncio.get_running_loop().time()

    def _just_landed(self, course: _Course) -> Reply | None:
        reply, landed = self._in_use.get(course, (None, 0.0))
        in_time = asyncio.get_running_loop().time() - landed < self._recent
        return reply() if reply is not None and in_time else None

    async def _fly(self, target: Target, flight: _Flight, condition: Condition | None) -> Reply:
        failed, lost = 0, False
        hops: tuple[Target, ...] = (target,)
        while True:
            try:
                flight.queued = True
                async with self._slots.hold(hops[-1].host):
                    flight.queued = False
                    answer = await self._exchange.ask(hops, condition, flight.grew, anew=lost)
            except PassingError as passing:
                failed += 1
                flight.error = passing.error
                # A connection that was kept may have ended while nobody used it, which says nothing about its host; the
                # others may have, too.
                at_once = passing.lost and not lost
                lost |= passing.lost
                pause = self._retry.pause(
                    failed,
                    left=flight.deadline - asyncio.get_running_loop().time(),
                    chance=0.0 if at_once else self._chance(),
                    retry_after=passing.retry_after,
                )
                if pause is None:
                    raise passing.error from None
                await asyncio.sleep(pause)
                continue
            if isinstance(answer, Reply):
                return answer
            if len(hops) > MAX_REDIRECTS:
                raise FetchError(f"the host redirects more than {MAX_REDIRECTS} times")
            hops += (answer,)


class _Flight:
    """One download and those who wait for it.

    Attributes
    ----------
    task: gives the medium, or how it failed.
    deadline: the latest of those who wait, in the loop's time.
    waiting: who waits, by what wakes him, and what he is told of the size by, which raises where it is too large for him.
    queued: whether it has no connection yet.
    error: how the last try failed.
    """

    task: asyncio.Task[Reply]

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.waiting: dict[asyncio.Future[None], Hold | None] = {}
        self.queued = True
        self.error: MmprepError | None = None
        self._size = 0

    def join(self, waiter: asyncio.Future[None], hold: Hold | None) -> None:
        """Wake ``waiter`` at the end, or with what ``hold`` raises at the size that is known until then."""
        self.waiting[waiter] = hold
        self._tell(waiter, hold)

    def grew(self, size: int) -> None:
        """The medium has so many bytes at least."""
        self._size = size
        for waiter, hold in self.waiting.items():
            self._tell(waiter, hold)

    def _tell(self, waiter: asyncio.Future[None], hold: Hold | None) -> None:
        if hold is None or waiter.done():
            return
        try:
            hold(self._size)
        except MmprepError as error:
            waiter.set_exception(error)

    def wake_all(self) -> None:
        """It is over."""
        for waiter in self.waiting:
            _wake(waiter)

    def too_late(self) -> BaseException:
        """Return what to tell one whose time is over: what the host said, where it has said something."""
        if self.error is not None:
            return _own(self.error)
        return no_slot() if self.queued else silence()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _outcome(task: asyncio.Task[Reply]) -> str:
    """Return how a flight ended, as the outcome of a request is told; the exception counts as looked at."""
    if task.cancelled():
        return "cancelled"
    error = task.exception()
    return "ok" if error is None else error.type if isinstance(error, MmprepError) else "InternalServerError"


def _own(error: BaseException) -> BaseException:
    """Return ``error`` for one of several who are told it: each names another place in another request."""
    return type(error)(error.message, retry_after=error.retry_after) if isinstance(error, MmprepError) else error
