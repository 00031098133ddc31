"""One backend on another host, for the time of one connection: registered here in its name, under a lock of this process.

For the writer it is a backend like others. Its leases are held and renewed here, and end with the session; the tensors are
copied out of the mapping chunk by chunk when they are asked for, never ahead (:mod:`mmprep.remote.supply`). A slow backend
so costs this process some chunks, and nobody else anything.

WARNING: nothing may be sent that refers to the segment: ZeroMQ keeps frames for as long as a peer does not read, and the
extent under them may be another item's by then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

import msgspec
import zmq

from mmprep import failpoints
from mmprep.address import Address
from mmprep.errors import Busy, InvalidRequest, LeaseLost, MmprepError, ProtocolError, StaleDelivery
from mmprep.item import Shared, Source
from mmprep.items import align, region_size
from mmprep.job_content import JobContent
from mmprep.metrics import Metrics
from mmprep.pulling import Held, Pulling
from mmprep.reading import LocalReader, read_meta
from mmprep.registration import Mapping
from mmprep.remote.supply import Supply
from mmprep.runtime import RuntimeDir
from mmprep.wire import messages
from mmprep.wire import remote_messages as remote

#: Bytes of a chunk, and how many of them may be under way to one backend: what a message may wait behind.
CHUNK, CREDITS = 1024 * 1024, 8
#: Words of one backend that may be worked on at once, and leases that it may have.
_MOST_CALLS, _MOST_LEASES = 256, 4096
_OPEN_SECONDS = 10.0
_LOST = "the lease has run out, or is none of this backend; ask for the item again"
_STALLED = "the tensors were not read in time, and their lease is over; ask for the item again"


class Handed(NamedTuple):
    """A delivery that is to be passed on."""

    held: Held
    content: JobContent


class _Lent(NamedTuple):
    """A lease that is held for the backend; ``length``: bytes of its tensor region."""

    source: Shared
    length: int


class Session:
    """What one connection has.

    Parameters
    ----------
    hello:
        Of the backend.
    user:
        Whose key it has; empty: there are no keys.
    send:
        Sends it a message with more frames; never raises.
    former:
        Ends when the session before, of the same id, has given everything back.

    Attributes
    ----------
    heard_at: when it last said something.
    ready: it is registered.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        runtime: RuntimeDir,
        hello: remote.RemoteHello,
        *,
        user: str,
        send: Callable[..., None],
        metrics: Metrics,
        former: asyncio.Task[None] | None,
    ) -> None:
        self.id = hello.id
        self.instance = hello.instance
        self.user = user
        self.heard_at = time.monotonic()
        self.ready = False
        self._context = context
        self._runtime = runtime
        self._hello = hello
        self._send = send
        self._metrics = metrics
        self._former = former
        self._supply = Supply(chunk=CHUNK, credits=CREDITS)
        self._lent: dict[bytes, _Lent] = {}
        self._jobs: dict[bytes, tuple[Held, tuple[bytes, ...]]] = {}
        self._pulling: Pulling | None = None
        self._reader: LocalReader | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None

    # --- life -----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Register the backend; raises InvalidRequest where its id is taken, ServiceUnavailable where no writer answers."""
        await self._former_ended()
        if self.closing:
            return
        hello = self._hello
        if hello.queues:
            self._pulling = Pulling(hello.queues, hello.credits, None, _handed)
        self._reader = LocalReader(self._context, self._runtime, self.id, self._pulling, None)
        if self._pulling is not None:
            self._pulling.use(self._reader)
        await self._reader.ready(_OPEN_SECONDS)
        if self.closing:
            return
        self.ready = True
        if self._pulling is not None:
            self._start(self._pass_jobs_on(self._pulling))

    @property
    def seconds(self) -> float:
        """How long a lease holds, and a backend may say nothing."""
        if self._reader is None or not self.ready:
            return _OPEN_SECONDS
        return self._reader.registration.lease_seconds

    @property
    def closing(self) -> bool:
        """Whether it is over, or about to be."""
        return self._closing is not None

    def close(self) -> asyncio.Task[None]:
        """Give back all that the backend has; the returned task ends when its id is free."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        return self._closing

    async def _former_ended(self) -> None:
        if self._former is not None:
            await asyncio.wait([self._former])

    async def _close(self) -> None:
        await self._former_ended()
        for task in self._tasks:
            task.cancel()
        for lease in list(self._lent):
            self._end_lease(lease)
        if self._pulling is not None and self._reader is not None:
            await self._pulling.close()
        if self._reader is not None:
            await self._reader.close()

    @property
    def status(self) -> dict[str, Any]:
        """What the service's status says of it."""
        key = self.user.partition(":")[0] or None
        return {"id": self.id, "key": key, "leases": len(self._lent), "jobs": len(self._jobs)}

    # --- what the backend says ------------------------------------------------------------------------------------

    def take(self, message: msgspec.Struct) -> None:
        """Do what a message says; raises ProtocolError where it must not be said."""
        if not self.ready:
            raise ProtocolError("something was said before the welcome")
        match message:
            case remote.Ask():
                self._asked(message)
            case messages.Release(owner=None):
                for lease in message.leases:
                    self._end_lease(lease)
                if message.call:
                    self._send(messages.Done(message.call))
            case messages.Holding():
                lost = tuple(job.token for job in message.jobs if job.token not in self._jobs)
                self._send(messages.Kept(message.call, lost))
            case _:
                self._take_call(message)

    def _take_call(self, message: msgspec.Struct) -> None:
        """Answer what takes a word with the writer."""
        match message:
            case remote.Open():
                self._work(message.call, self._open(message))
            case messages.Renew(owner=None):
                self._work(message.call, self._renew(message))
            case messages.Pull():
                self._work(message.call, self._pull(message))
            case messages.Acks():
                self._end_jobs(message)
            case messages.Ack() | messages.GiveBack():
                self._work(message.call, self._end_job(message))
            case _:
                raise ProtocolError("this is not said to a door for other hosts")

    def tick(self, now: float) -> None:
        """Give up what is not read, and forget jobs whose time is over: they are delivered again."""
        for token, (held, leases) in list(self._jobs.items()):
            if held.deadline <= now:
                self._forget_job(token, leases)
        for lease in self._supply.stalled(now, self.seconds):
            self._metrics.count("mmprep_remote_pulls_total", outcome="stalled")
            self._end_lease(lease)
            self._send(remote.Ended(lease, messages.Fault.of(LeaseLost(_STALLED))))

    def _work(self, call: int, answer: Coroutine[Any, Any, None]) -> None:
        """Answer a call in its own time."""
        if len(self._tasks) >= _MOST_CALLS:
            answer.close()
            self._send(messages.Failed(call, messages.Fault.of(Busy("too many calls are under way", retry_after=1.0))))
            return
        self._start(self._answered(call, answer))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answered(self, call: int, answer: Awaitable[None]) -> None:
        try:
            await answer
        except MmprepError as error:
            self._send(messages.Failed(call, messages.Fault.of(error)))

    # --- leases and tensors ---------------------------------------------------------------------------------------

    async def _open(self, message: remote.Open) -> None:
        if len(self._lent) >= _MOST_LEASES:
            raise Busy(f"a backend on another host has at most {_MOST_LEASES} items; release some", retry_after=1.0)
        assert self._reader is not None
        registration, address = self._reader.registration, _address(message)
        if message.lease is None:
            mapping, lease = await registration.acquire(address, message.kind)
        else:
            mapping, lease = registration.hold_now(address, None) or await registration.hold(address, None)
        try:
            blob, length = _checked(mapping, address)
        except BaseException:
            lease.release()
            raise
        source = Shared(registration, mapping, msgspec.structs.replace(address, lease=lease.id.hex()), lease)
        self._lent[lease.id] = _Lent(source, length)
        self._send(remote.Opened(message.call, lease.id), blob)

    def _end_lease(self, lease: bytes) -> None:
        lent = self._lent.pop(lease, None)
        if lent is not None:
            if self._supply.unfinished(lease):
                self._metrics.count("mmprep_remote_pulls_total", outcome="unfinished")
            self._supply.ended(lease)
            lent.source.release()

    def _asked(self, ask: remote.Ask) -> None:
        failpoints.reach("remote.ask.received")
        lent = self._lent.get(ask.lease)
        try:
            if lent is None:
                raise LeaseLost(_LOST)
            pieces = self._supply.asked(
                ask.lease, lent.length, upto=ask.upto, received=ask.received, now=time.monotonic()
            )
            for piece in pieces:
                frame = lent.source.part(piece.start, piece.stop)
                self._metrics.count("mmprep_remote_bytes_total", piece.stop - piece.start)
                self._send(remote.Chunk(ask.lease, piece.number), frame)
                failpoints.reach("remote.chunk.sent")
        except ProtocolError as error:
            self._metrics.count("mmprep_refused_total", link="remote", error="ProtocolError")
            self._send(remote.Ended(ask.lease, messages.Fault.of(error)))
        except MmprepError as error:
            self._end_lease(ask.lease)
            self._send(remote.Ended(ask.lease, messages.Fault.of(error)))
        else:
            if self._supply.complete(ask.lease):
                self._metrics.count("mmprep_remote_pulls_total", outcome="complete")

    async def _renew(self, message: messages.Renew) -> None:
        assert self._reader is not None
        held = tuple(lease for lease in message.leases if lease in self._lent)
        lost = tuple(lease for lease in message.leases if lease not in self._lent)
        lost += await self._reader.renew(held)
        self._send(messages.Renewed(message.call, lost, int(self.seconds * 1000)))

    # --- jobs -----------------------------------------------------------------------------------------------------

    async def _pull(self, message: messages.Pull) -> None:
        hello = self._hello
        if self._pulling is None or (message.queues and message.queues != hello.queues):
            raise InvalidRequest("a backend names its queues when it connects", param="queue")
        if message.queues:
            await self._pulling.begin()
        else:
            await self._pulling.drain()
        self._send(messages.Done(message.call))

    async def _pass_jobs_on(self, pulling: Pulling) -> None:
        while (handed := await pulling.take()) is not None:
            self._pass_on(*handed)

    def _pass_on(self, held: Held, content: JobContent) -> None:
        leases = []
        for item in held.items:
            if item.address is None or item.address.lease is None:
                continue
            lease = bytes.fromhex(item.address.lease)
            self._lent[lease] = _Lent(_shared(item.source), region_size(item.fields))
            leases.append(lease)
        self._jobs[held.token] = held, tuple(leases)
        left = max(0.0, held.deadline - time.monotonic())
        fault = None if held.error is None else messages.Fault.of(held.error)
        delivery = messages.Delivery(
            held.token,
            held.queue,
            held.job_id,
            held.attempt,
            int(left * 1000),
            int(self.seconds * 1000),
            tuple(leases),
            fault,
        )
        self._send(delivery, *content.pieces())
        failpoints.reach("remote.job.sent")

    async def _end_job(self, message: messages.Ack | messages.GiveBack) -> None:
        found = self._jobs.get(message.token)
        if found is None or self._pulling is None:
            raise StaleDelivery("the job is not this delivery's any more: it was delivered elsewhere, or has ended")
        held, leases = found
        try:
            if isinstance(message, messages.Ack):
                await self._pulling.ack(held)
            else:
                await self._pulling.give_back(held, message.failed)
        except StaleDelivery:
            self._forget_job(message.token, leases)
            raise
        self._forget_job(message.token, leases)
        self._send(messages.Done(message.call))

    def _end_jobs(self, message: messages.Acks) -> None:
        """Take jobs as done. The backend does not ask what the writer says to that: it is told by the way, with others."""
        over = []
        for token in message.tokens:
            held, leases = self._jobs.get(token, (None, ()))
            self._forget_job(token, leases)
            if held is None or self._pulling is None:
                over.append(token)
                continue
            try:
                self._pulling.ack_soon(held)
            except (StaleDelivery, InvalidRequest):
                over.append(token)
        self._send(messages.Kept(message.call, tuple(over)) if over else messages.Done(message.call))

    def _forget_job(self, token: bytes, leases: tuple[bytes, ...]) -> None:
        self._jobs.pop(token, None)
        for lease in leases:
            self._end_lease(lease)


def _handed(_pulling: Pulling, held: Held, content: JobContent) -> Handed:
    return Handed(held, content)


def _shared(source: Source) -> Shared:
    assert isinstance(source, Shared), "a backend on the writer's host has its tensors in shared memory"
    return source


def _address(message: remote.Open) -> Address:
    place = message.address
    return Address(
        segment=place.segment,
        epoch=place.epoch.hex(),
        slot=place.slot,
        offset=place.offset,
        length=place.length,
        generation=place.generation,
        metadata_length=place.metadata_length,
        fields=(),
        lease=None if message.lease is None else message.lease.hex(),
        lease_kind=message.kind,
    )


def _checked(mapping: Mapping, address: Address) -> tuple[bytes, int]:
    """Return an item's metadata and the bytes of its tensor region, which lies in its extent."""
    blob, meta = read_meta(mapping, address)
    length = region_size(meta.fields)
    if align(address.metadata_length) + length > address.length:
        raise InvalidRequest("the item is longer than its extent", param="address")
    return blob, length
