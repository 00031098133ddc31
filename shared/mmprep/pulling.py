"""A backend's part in queues: it takes jobs, knows which it has, and says what became of them.

It runs on the loop of its registration. A writer that welcomes the registration is told first which jobs are here: what it
does not hear of it delivers again, what it says is over is dropped. Jobs that wait here for the program count against
the credits, so no more of them come than the program was said to take.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Literal

import msgspec

from mmprep import failpoints
from mmprep.address import Address
from mmprep.endings import Endings
from mmprep.errors import InvalidRequest, MmprepError, ProtocolError, ServiceUnavailable, StaleDelivery
from mmprep.item import Item, Runner, Source
from mmprep.items import ItemMeta, unpack_meta
from mmprep.job import Asker, AsyncJob, Job
from mmprep.job_content import JobContent, read_content
from mmprep.reading import Reader
from mmprep.result import HeadItem, leased_address
from mmprep.wire import messages
from mmprep.wire.calls import WriterLostError

_log = logging.getLogger("mmprep.pulling")

#: Seconds for the first word with the service about queues, its writer's replacement included.
_BEGIN_SECONDS = 10.0
#: Seconds for the last words when the backend closes.
_CLOSE_SECONDS = 1.0
_OVER = "the job is not this delivery's any more: its time was over, or it was delivered elsewhere"


class Held:
    """One delivery.

    Attributes
    ----------
    seconds, deadline: its time, and when that is over at the latest, by ``time.monotonic``.
    taken: the program has it.
    end: what was said of it; ``over``: it was delivered elsewhere.
    """

    __slots__ = ("attempt", "deadline", "end", "error", "items", "job", "job_id", "queue", "seconds", "taken", "token")

    def __init__(self, delivery: messages.Delivery) -> None:
        self.token = delivery.token
        self.queue = delivery.queue
        self.job_id = delivery.job
        self.attempt = delivery.attempt
        self.seconds = delivery.left_ms / 1000
        self.deadline = time.monotonic() + self.seconds
        self.error = None if delivery.fault is None else delivery.fault.error()
        self.taken = False
        self.end: Literal["acknowledged", "given back", "over"] | None = None
        self.items: list[Item] = []
        self.job: Any = None


class Pulling:
    """Takes jobs of some queues.

    Parameters
    ----------
    queues:
        Their names.
    credits:
        How many jobs may be here at a time.
    run:
        How other threads run coroutines on the loop, ``None`` where the program is on it.
    ask:
        How they ask without a coroutine, where ``run`` is given.
    make_job:
        What a delivery becomes for the program; by default a job that it can use.
    """

    def __init__(
        self,
        queues: Sequence[str],
        credits: int,  # noqa: A002 -- the word for it
        run: Runner | None,
        make_job: Callable[[Pulling, Held, JobContent], Any] | None = None,
        *,
        ask: Asker | None = None,
    ) -> None:
        if not 0 < len(queues) <= messages.MAX_PULLED:
            raise InvalidRequest(f"a backend pulls from 1 to {messages.MAX_PULLED} queues", param="queue")
        try:
            msgspec.convert(list(queues), list[messages.Name])
        except msgspec.ValidationError:
            raise InvalidRequest(
                "a queue's name has 1 to 64 letters, digits, '_', '.' and '-'", param="queue"
            ) from None
        if not 0 < credits <= messages.MAX_CREDITS:
            raise InvalidRequest(f"'credits' is from 1 to {messages.MAX_CREDITS}", param="credits")
        self._queues = tuple(queues)
        self._credits = credits
        self._run = run
        self._ask = ask
        self._make_job = make_job or self._job
        self._reader: Reader | None = None
        self._held: dict[bytes, Held] = {}
        #: What waits for the program; also read by other threads.
        self._ready: deque[Held] = deque()
        self._more = asyncio.Event()
        #: Other threads that wait for a job, each with whom to call when one may be there.
        self._takers: deque[Callable[[Any], None]] = deque()
        self._loop = asyncio.get_running_loop()
        self._begun: asyncio.Future[None] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._endings = Endings(credits, self._forget)

    # --- the registration's ---------------------------------------------------------------------------------------

    def use(self, reader: Reader) -> None:
        """Take items by this reader, and tell the service by it what becomes of jobs; before the first job comes."""
        self._reader = reader
        self._endings.use(reader)

    def greets(self) -> list[tuple[Callable[[int], msgspec.Struct], Callable[[asyncio.Future[Any]], None]]]:
        """Return what a new writer is told first: the jobs that are here, and which queues they shall come from.

        Also those whose end a writer was told and has not confirmed: this one may not have heard of it. What it leaves here
        has its full time again: none has passed while no writer was there.
        """
        here = list(self._held.values())[-messages.MAX_CREDITS :]
        for held in here:
            held.deadline = time.monotonic() + held.seconds
        told = tuple(messages.HeldJob(held.token, held.queue, held.job_id, held.attempt) for held in here)
        return [
            (partial(messages.Holding, jobs=told), self._kept),
            (partial(messages.Pull, queues=self._pulled(), credits=self._credit()), self._pull_answered),
        ]

    def _pulled(self) -> tuple[str, ...]:
        return () if self._draining else self._queues

    def _credit(self) -> int:
        return 0 if self._draining else self._credits

    def _kept(self, done: asyncio.Future[Any]) -> None:
        if done.cancelled() or done.exception() is not None:
            return  # the connection was lost: the next welcome begins anew
        for token in done.result().lost:
            held = self._held.get(token)
            if held is not None and held.end is None:  # else the answer to its end tells
                held.end = "over"
                if held.taken:  # the program may be reading: what it has stays until it says a word
                    del self._held[token]
                else:
                    self._drop(held)

    def _pull_answered(self, done: asyncio.Future[Any]) -> None:
        error = None if done.cancelled() else done.exception()
        if done.cancelled() or isinstance(error, WriterLostError):
            return  # the next welcome begins anew
        if self._begun.done():
            if error is not None:
                _log.error("the service does not let this backend pull: %s", error)
        elif error is None:
            self._begun.set_result(None)
        else:
            self._begun.set_exception(error)

    def delivered(self, delivery: messages.Delivery, content: list[bytes]) -> None:
        """Take a job."""
        failpoints.reach("backend.job.received")
        if delivery.token in self._held:
            return  # said twice
        self._drop_late()
        held = self._held[delivery.token] = Held(delivery)
        if not self._take_in_now(held, delivery, content):
            self._keep(self._take_in(held, delivery, content))

    def _take_in_now(self, held: Held, delivery: messages.Delivery, pieces: list[bytes]) -> bool:
        """Take a job in if that takes no wait; so whoever hears of the last one's end by it has it already."""
        assert self._reader is not None
        try:
            content = read_content(pieces)
            wanted = _wanted(held, content, delivery.leases)
            sources = self._reader.sources_now([one for one in wanted if one is not None])
        except MmprepError:
            return False  # it is met again, and said
        if sources is not None:
            self._have(held, content, wanted, sources)
        return sources is not None

    async def _take_in(self, held: Held, delivery: messages.Delivery, pieces: list[bytes]) -> None:
        assert self._reader is not None
        try:
            content = read_content(pieces)
            wanted = _wanted(held, content, delivery.leases)
            sources = await self._reader.sources([one for one in wanted if one is not None])
        except MmprepError as error:
            await self._give_back_unless_over(held, f"its content could not be had: {error}")
            return
        self._have(held, content, wanted, sources)

    def _have(
        self,
        held: Held,
        content: JobContent,
        wanted: Sequence[tuple[Address, ItemMeta] | None],
        sources: Sequence[tuple[Address, Source]],
    ) -> None:
        if held.end is not None:  # it was over before it was here
            for _, source in sources:
                source.release()
            return
        found = iter(sources)
        for item, one in zip(content.items, wanted, strict=True):
            held.items.append(self._item(item, _meta(item), *((None, None) if one is None else next(found))))
        held.job = self._make_job(self, held, content)
        self._ready.append(held)
        self._more.set()
        self._wake_taker()

    def _job(self, pulling: Pulling, held: Held, content: JobContent) -> AsyncJob | Job:
        if self._run is None or self._ask is None:
            return AsyncJob(pulling, held, content, held.items)
        return Job(pulling, held, content, held.items, self._run, self._ask)

    def _item(self, item: HeadItem, meta: ItemMeta, address: Address | None, source: Source | None) -> Item:
        return Item(
            meta,
            source,
            hash=item.hash.hex(),
            offset=item.offset,
            length=item.length,
            cached=item.cached,
            address=address,
            run=self._run,
        )

    # --- the program's --------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Wait until jobs can come; raises what speaks against it, ServiceUnavailable where nobody answers."""
        try:
            async with asyncio.timeout(_BEGIN_SECONDS):
                await asyncio.shield(self._begun)
        except TimeoutError:
            raise ServiceUnavailable("the service does not let this backend pull; try again", retry_after=1.0) from None

    def take_now(self) -> Any | None:
        """Return a job that is here, ``None`` where none is. May be called from any thread."""
        while True:
            try:
                held = self._ready.popleft()
            except IndexError:
                return None
            if held.end is None and held.deadline > time.monotonic():
                held.taken = True
                return held.job
            if held.end is None:  # it is somebody else's by now
                self._loop.call_soon_threadsafe(self._too_late, held)

    def _too_late(self, held: Held) -> None:
        """Say that a job waited here for too long: until a backend says a word, no job follows one whose time was over."""
        self._keep(self._give_back_unless_over(held, None))

    async def _give_back_unless_over(self, held: Held, failed: str | None) -> None:
        with contextlib.suppress(MmprepError):
            await self.give_back(held, failed)

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run something beside the program, until :meth:`close`."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def take(self) -> Any | None:
        """Wait for a job; ``None`` when this drains."""
        while True:
            job = self.take_now()
            if job is not None or self._draining:
                return job
            self._more.clear()
            await self._more.wait()

    @property
    def draining(self) -> bool:
        """Whether no more jobs come. May be asked by any thread."""
        return self._draining

    def wait(self, told: Callable[[Any], None]) -> Callable[[], None]:
        """Call ``told`` when a job may be here that nobody has taken, or this drains; return what gives up waiting."""
        if self._ready or self._draining:
            told(None)
            return lambda: None
        self._takers.append(told)

        def give_up() -> None:
            if told in self._takers:
                self._takers.remove(told)
            elif self._ready:  # what it was called for is another one's
                self._wake_taker()

        return give_up

    def _wake_taker(self) -> None:
        if self._takers:
            self._takers.popleft()(None)

    def _wake_all(self) -> None:
        self._more.set()
        while self._takers:
            self._wake_taker()

    async def ack(self, held: Held) -> None:
        """Say that a job is done."""
        failpoints.reach("backend.ack.before")
        await self._end(held, "acknowledged", partial(messages.Ack, token=held.token))

    def ack_now(self, held: Held, told: Callable[[Any], None]) -> Callable[[], None]:
        """Say that a job is done to the writer that is there; ``told`` is called with the answer or the error, as of :meth:`ack`.

        Returns what gives up waiting. Raises, as ``told`` may be called with, WriterLostError where it takes :meth:`ack`.
        """
        self._check_open(held)
        assert self._reader is not None
        failpoints.reach("backend.ack.before")

        def answered(outcome: Any) -> None:
            if isinstance(outcome, StaleDelivery):
                held.end = "over"
            elif isinstance(outcome, MmprepError):
                held.end = None
            if held.end is not None:
                self._drop(held)
            told(outcome)

        def give_up() -> None:
            if forget():
                held.end = None

        forget = self._reader.tell(partial(messages.Ack, token=held.token), answered)
        held.end = "acknowledged"
        return give_up

    def ack_soon(self, held: Held) -> None:
        """Say that a job is done, soon and together with others, and give its tensors up. May be called from any thread.

        Nobody is told what the service says to that.
        """
        self._check_open(held)
        failpoints.reach("backend.ack.before")
        self._endings.add(held)
        held.end = "acknowledged"
        for item in held.items:
            item.release()

    async def give_back(self, held: Held, failed: str | None) -> None:
        """Say that a job is not done; ``failed``: why, ``None``: it was not begun."""
        why = None if failed is None else failed[:2048]
        await self._end(held, "given back", partial(messages.GiveBack, token=held.token, failed=why))

    async def _end(
        self, held: Held, end: Literal["acknowledged", "given back"], make: Callable[[int], msgspec.Struct]
    ) -> None:
        self._check_open(held)
        assert self._reader is not None
        held.end = end
        try:
            await self._reader.call(make)
        except StaleDelivery:
            held.end = "over"
            self._drop(held)
            raise
        except BaseException:
            held.end = None
            raise
        self._drop(held)

    def _check_open(self, held: Held) -> None:
        if held.end == "over":
            self._drop(held)
            raise StaleDelivery(_OVER)
        if held.end is not None:
            raise InvalidRequest(f"the job was {held.end} already; each job ends once")

    async def drain(self) -> None:
        """Take no more jobs, and give back those that the program does not have. Again is no error."""
        if self._draining:
            return
        self._draining = True
        assert self._reader is not None
        try:
            await self._reader.call(partial(messages.Pull, queues=(), credits=0))
            await self._give_all_back(lambda held: not held.taken, None)
        finally:
            self._wake_all()

    async def close(self) -> None:
        """Give back everything: what the program has and has not ended has failed."""
        with contextlib.suppress(MmprepError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._endings.close()
                await self.drain()
                await self._give_all_back(lambda held: held.taken, "the backend closed before the job was acknowledged")
        for task in self._tasks:
            task.cancel()
        self._draining = True
        self._wake_all()

    async def _give_all_back(self, which: Callable[[Held], bool], why: str | None) -> None:
        for held in [held for held in self._held.values() if held.end is None and which(held)]:
            with contextlib.suppress(StaleDelivery):
                await self.give_back(held, why)

    # --- steps ----------------------------------------------------------------------------------------------------

    def _forget(self, held: Held) -> None:
        self._held.pop(held.token, None)

    def _drop(self, held: Held) -> None:
        self._forget(held)
        for item in held.items:
            item.release()

    def _drop_late(self) -> None:
        """Forget what is surely over; the program may still ask, and is told by the service."""
        now = time.monotonic()
        for held in [held for held in self._held.values() if held.deadline <= now and held.end is None]:
            if held.taken:
                del self._held[held.token]
            else:
                self._too_late(held)


def _wanted(held: Held, content: JobContent, leases: Sequence[bytes]) -> list[tuple[Address, ItemMeta] | None]:
    """Return the leased address of each item of a job, ``None`` for one without tensors; raises ProtocolError."""
    granted = iter(leases)
    wanted: list[tuple[Address, ItemMeta] | None] = []
    for item in content.items:
        meta = _meta(item)
        if item.place is None or held.error is not None:
            wanted.append(None)
            continue
        address = leased_address(
            item,
            meta,
            segment=content.segment,
            epoch=content.epoch,
            lease=next(granted, b""),
            lease_kind="view",
        )
        wanted.append((address, meta))
    return wanted


def _meta(item: HeadItem) -> ItemMeta:
    """Return the metadata of an item of a job; raises ProtocolError."""
    try:
        return unpack_meta(item.meta)
    except ValueError as error:
        raise ProtocolError(f"a job has an item without right metadata: {error}") from None
