"""A process of the load: asks one service for pictures, in several calls at once, and checks what it gets.

It sends a call again after an error that allows it, within the call's time, as a good client does; every outcome is told.
Pictures are re-used ones, whose popularity falls off with their number, and ones that nobody has asked for before.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from mmprep.chaos import events, pictures
from mmprep.chaos.asking import Answered, Asked, NeverAnsweredError, RefusedError, ask_http, ask_native, post, refused
from mmprep.chaos.pictures import Picture
from mmprep.client import AsyncClient
from mmprep.errors import MmprepError
from mmprep.item import Item

#: Seconds after its time in which a call may still get an answer. A process that was stopped has less of it.
PATIENCE = 20.0

_PAUSE = (0.02, 0.3)
_NEW = 0.3
_SEVERAL = 0.08
_BROKEN = 0.01
_GIVEN_UP = 0.02
_HOLDS = 6
_HAND_OVER_SECONDS = 10.0
#: Calls of a process that starts one every so often, whether others have ended or not.
_MOST_PACED = 64

_weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(pictures.REUSED)))


class Orders(msgspec.Struct, forbid_unknown_fields=True):
    """What a client is to do.

    Attributes
    ----------
    name, seed: of this process.
    kinds: of calls, door and payload.
    in_flight: calls at once; 0: one every ``pace`` seconds.
    seconds: a call's time.
    backends: id and socket of those to which addresses are leased.
    """

    name: str
    seed: int
    runtime_dir: str
    port: int
    kinds: tuple[str, ...]
    seconds: float
    in_flight: int = 3
    pace: float = 0.0
    backends: dict[str, str] = {}


class Load:
    """The calls of one process."""

    def __init__(self, orders: Orders, client: AsyncClient) -> None:
        self._orders = orders
        self._client = client
        self._random = random.Random(orders.seed)  # noqa: S311 -- repeatable, not secret
        # The high bits are this process's, so that nobody else sends the same new pictures.
        self._new = itertools.count(max(orders.seed, 1) << 16)
        self._holds = asyncio.Semaphore(_HOLDS)
        self._hashes: dict[int, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self.open = 0

    # --- how many -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until told to stop, then let what is under way end."""
        if self._orders.in_flight:
            await asyncio.gather(*(self._keep_calling() for _ in range(self._orders.in_flight)))
        while not self._stop.is_set():
            if len(self._tasks) < _MOST_PACED:
                self._beside(self._call())
            await asyncio.sleep(self._orders.pace)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def stop(self) -> None:
        """Start no more calls."""
        self._stop.set()

    async def _keep_calling(self) -> None:
        while not self._stop.is_set():
            await self._call()

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            now = time.monotonic()
            events.tell(events.Failed("load", type(error).__name__, str(error), False, now, now))

    # --- one call -------------------------------------------------------------------------------------------------

    async def _call(self) -> None:
        self.open += 1
        call = events.Called(self._random.choice(self._orders.kinds), "broken off", time.monotonic(), 0.0)
        wanted = self._choose()
        # Without tensors only the header of a picture is read.
        broken = not call.kind.endswith("none") and self._random.random() < _BROKEN
        call.cold = not broken and any(which.number >= pictures.REUSED for which in wanted)
        try:
            await self._tries(call, wanted, broken=broken)
        finally:
            call.end = call.end or time.monotonic()
            events.tell(call)
            self.open -= 1

    def _choose(self) -> list[Picture]:
        count = self._random.choice((2, 3)) if self._random.random() < _SEVERAL else 1
        chosen = []
        for _ in range(count):
            new = self._random.random() < _NEW
            number = next(self._new) if new else self._random.choices(range(pictures.REUSED), cum_weights=_weights)[0]
            which = pictures.picture(number)
            # Two large ones in a request would be above half of the ring.
            chosen.append(which if count == 1 or which.tokens < 500 else pictures.picture(next(self._new)))
        return chosen

    async def _tries(self, call: events.Called, wanted: list[Picture], *, broken: bool) -> None:
        encode = pictures.broken_png if broken else pictures.png
        media = [encode(which) for which in wanted]
        deadline = time.monotonic() + self._orders.seconds
        impatient = self._random.random() < _GIVEN_UP
        call.tries = 0
        while True:
            call.tries += 1
            asked = self._asked(call.kind, media)
            started = time.monotonic()
            try:
                answer = await self._try(asked, call.kind, deadline - started, impatient=impatient)
            except TimeoutError:
                call.outcome = "given up on purpose"
                return
            except NeverAnsweredError:
                call.outcome = "unanswered"
                return
            except RefusedError as error:
                if broken and error.type in {"DecodeError", "MediaError", "UnprocessableEntityError"}:
                    call.outcome = "refused as it should be"
                    return
                self._tell_failed(call.kind, error, started, asked)
                if not self._goes_on(call, error, deadline):
                    return
                await asyncio.sleep(self._random.uniform(*_PAUSE))
                continue
            call.end = time.monotonic()
            await self._take(call, wanted, asked, answer)
            call.outcome = "a broken picture was taken" if broken else "ok"
            call.wrong += broken
            return

    def _asked(self, kind: str, media: list[bytes]) -> Asked:
        door, _, payload = kind.partition(" ")
        if payload != "shm":
            return Asked(payload, media)
        lease_kind = self._random.choice((None, "copy", "view"))
        backend = self._random.choice(list(self._orders.backends)) if door == "http" else None
        return Asked(payload, media, backend, lease_kind)

    async def _try(self, asked: Asked, kind: str, seconds: float, *, impatient: bool) -> Answered:
        if kind.startswith("http"):
            return await asyncio.to_thread(ask_http, self._orders.port, asked, seconds, PATIENCE)
        task = asyncio.create_task(ask_native(self._client, asked, seconds))
        if impatient:
            async with asyncio.timeout(self._random.uniform(0.0, 0.1)):
                return await task
        # Twice: after this process was stopped the first time may be over before what has come was looked at.
        for _ in range(2):
            await asyncio.wait({task}, timeout=(seconds + PATIENCE) / 2)
        if not task.done():
            task.cancel()
            raise NeverAnsweredError
        return task.result()

    def _goes_on(self, call: events.Called, error: RefusedError, deadline: float) -> bool:
        """Whether the call is sent again; else it has its outcome."""
        # A backend that is gone comes back; who asks for addresses for it asks again.
        again = error.retryable or error.param == "backend_id"
        if again and time.monotonic() + _PAUSE[1] < deadline:
            return True
        call.outcome = error.type
        return False

    def _tell_failed(self, what: str, error: RefusedError, started: float, asked: Asked | None = None) -> None:
        about_backend = asked is not None and error.param == "backend_id"
        backend = asked.backend or self._orders.name if asked is not None and about_backend else None
        now = time.monotonic()
        events.tell(events.Failed(what, error.type, str(error), error.retryable, started, now, backend))

    # --- its answer -----------------------------------------------------------------------------------------------

    async def _take(self, call: events.Called, wanted: list[Picture], asked: Asked, answer: Answered) -> None:
        call.wrong += self._wrong(wanted, asked, answer)
        if call.wrong:
            return
        if answer.items is not None and asked.payload != "none":
            reused = [item for item, which in zip(answer.items, wanted, strict=True) if which.number < pictures.REUSED]
            call.lookups, call.hits = len(reused), sum(item.cached for item in reused)
            if asked.payload == "shm":
                for which, item in zip(wanted, answer.items, strict=True):
                    await self._read(which, item)
        for which, address in zip(wanted, answer.addresses or (), strict=bool(answer.addresses)):
            if address is not None:
                self._beside(self._hand_over(asked.backend or "", which, address))

    def _wrong(self, wanted: list[Picture], asked: Asked, answer: Answered) -> int:
        """Return how much of an answer is not as it must be; every item has tensors in one way, where they were wanted."""
        places = {"shm": answer.items or answer.addresses, "tensors": answer.fields, "none": answer.lengths}
        wrong = 0
        for found in (answer.lengths, answer.hashes, places[asked.payload] or ()):
            wrong += abs(len(found) - len(wanted))
        if wrong:
            return wrong
        for which, length, hashed in zip(wanted, answer.lengths, answer.hashes, strict=True):
            wrong += (length != which.tokens) + self._hash_differs(which, hashed)
        fields = answer.fields or [None] * len(wanted)
        for which, found_fields in zip(wanted, fields, strict=True):
            wrong += 0 if found_fields is None else pictures.wrong_bytes(which, found_fields)
        if asked.payload == "tensors":
            wrong += fields.count(None)
        for address, travelled in zip(answer.addresses or (), fields, strict=bool(answer.addresses)):
            wrong += (address is None) == (travelled is None)
        return wrong

    def _hash_differs(self, which: Picture, found: str) -> bool:
        if which.number >= pictures.REUSED:
            return False
        return self._hashes.setdefault(which.number, found) != found

    async def _read(self, which: Picture, item: Item) -> None:
        """Read an item now, and some of them for a while."""
        if self._holds.locked() or self._stop.is_set() or self._random.random() < 0.5:
            await self._hold(which, item, 0.0, view=self._random.random() < 0.5)
            return

        async def later() -> None:
            async with self._holds:
                await self._hold(which, item, self._random.uniform(0.0, 3.0), view=self._random.random() < 0.5)

        self._beside(later())

    async def _hold(self, which: Picture, item: Item, seconds: float, *, view: bool) -> None:
        held = events.Held("native view" if view else "native copy", 0, 0)
        started = time.monotonic()
        try:
            if view:
                async with item.view() as fields:
                    await self._read_for(seconds, held, which, lambda: fields)
            else:
                await self._read_for(seconds, held, which, item.materialize)
        except MmprepError as error:
            self._tell_failed("read", refused(error), started)
        finally:
            item.release()
            events.tell(held)

    async def _read_for(
        self, seconds: float, held: events.Held, which: Picture, fields: Callable[[], dict[str, Any]]
    ) -> None:
        pauses = [self._random.uniform(0.0, seconds / 2) for _ in range(4)] if seconds else []
        for pause in (0.0, *pauses):
            await asyncio.sleep(pause)
            held.wrong += pictures.wrong_bytes(which, fields())
            held.reads += 1

    async def _hand_over(self, backend: str, which: Picture, address: dict[str, Any]) -> None:
        """Give an address to its backend; one that does not take it does not keep its lease."""
        try:
            async with asyncio.timeout(_HAND_OVER_SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._orders.backends[backend])
                try:
                    writer.write(msgspec.json.encode({"picture": which, "address": address}) + b"\n")
                    if await reader.readline() == b"taken\n":
                        return
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            pass
        body = {"backend_id": backend, "leases": [address["lease"]]}
        started = time.monotonic()
        try:
            await asyncio.to_thread(post, self._orders.port, "/leases/release", body, PATIENCE)
        except RefusedError as error:
            self._tell_failed("release", error, started)
        except NeverAnsweredError:
            now = time.monotonic()
            events.tell(events.Failed("release", "no answer", "", False, started, now))


async def _connected(orders: Orders) -> AsyncClient:
    """Return an open client, however long its service takes."""
    while True:
        # A process keeps its name, so that it takes the place of a dead one of that name.
        client = AsyncClient(f"ipc://{orders.runtime_dir}", backend_id=orders.name, request_timeout=orders.seconds)
        try:
            await client.open()
        except MmprepError as error:
            now = time.monotonic()
            events.tell(events.Failed("connect", type(error).__name__, error.message, error.retryable, now, now))
            await asyncio.sleep(_PAUSE[1])
        else:
            return client


async def _work(orders: Orders) -> None:
    client = await _connected(orders)
    load = Load(orders, client)
    loop = asyncio.get_running_loop()

    def told_to_stop() -> None:
        loop.remove_reader(sys.stdin.fileno())
        load.stop()

    # Whoever started us says when it is enough; its death says so too.
    loop.add_reader(sys.stdin.fileno(), told_to_stop)
    events.tell(events.Started(time.monotonic()))
    try:
        await load.run()
    finally:
        await client.close()
    events.tell(events.Ended(load.open))


if __name__ == "__main__":
    asyncio.run(_work(msgspec.json.decode(os.read(0, 1 << 20).partition(b"\n")[0], type=Orders)))
