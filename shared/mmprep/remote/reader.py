"""A backend's way to a service on another host: one connection to its door, over which tensors are received.

The door registers the backend on its side and holds its leases; :mod:`mmprep_frontend.remote` says how. With a connection
ends all that the backend had there: leases and deliveries, not what was received. A lost connection is made anew by
itself; what is asked meanwhile waits. Tensors are received when an item is opened or delivered, so that a view of them
needs no word with anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import zmq

from mmprep.address import Address
from mmprep.errors import MmprepError, ProtocolError, ServiceUnavailable
from mmprep.item import Item, Runner, Source
from mmprep.items import ItemMeta, align, region_size, unpack_meta
from mmprep.reading import item_of
from mmprep.registration import Pulls
from mmprep.remote.connection import DoorConnection, Handlers
from mmprep.remote.curve import RemoteKeys
from mmprep.remote.endpoint import TcpEndpoint
from mmprep.remote.received import Memory, Received, aligned
from mmprep.remote.reception import Asking, Reception
from mmprep.runtime import RuntimeDir
from mmprep.wire import messages
from mmprep.wire import remote_messages as remote
from mmprep.wire.calls import WriterLostError
from mmprep.wire.codec import CONTROL_LIMIT

#: Seconds to wait for memory where there is none for what is opened.
_ROOM_SECONDS = 10.0
#: Seconds in which something has to come of tensors that were asked for.
_STALL_SECONDS = 30.0
_CLOSE_SECONDS = 2.0
_UPKEEP_SECONDS = 0.05
#: Seconds between two signs of life; a third of a short lease's time.
_ALIVE_SECONDS = 1.0
#: How often tensors are asked for again because the connection was lost.
_MOST_RETRIES = 2
#: Leases in one message.
_BATCH = 512


class _Receiving(NamedTuple):
    """An item that is being received."""

    region: memoryview
    arrived: asyncio.Future[None]


class RemoteReader:
    """A :class:`mmprep.reading.Reader` by way of a door.

    Parameters
    ----------
    endpoint, keys:
        Of the door.
    backend_id:
        This backend's name, unique among the living.
    pulls, queues, credits:
        What takes jobs, of which queues, how many at a time; ``None``: nothing does.
    receive_limit:
        Bytes of received tensors that may be here at a time.
    receives:
        Tensors are to travel even where the service is on this host.
    run:
        How other threads run coroutines on the loop, ``None`` where the program is on it.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: TcpEndpoint,
        keys: RemoteKeys,
        backend_id: str,
        *,
        pulls: Pulls | None,
        queues: Sequence[str],
        credits: int,  # noqa: A002 -- the word for it
        receive_limit: int,
        receives: bool,
        run: Runner | None,
    ) -> None:
        self._pulls = pulls
        self._run = run
        self._memory = Memory(receive_limit)
        self._loop = asyncio.get_running_loop()
        self._receiving: dict[bytes, _Receiving] = {}
        self._reception: Reception | None = None
        self._dropped: deque[bytes] = deque()
        self._closed = False
        self._alive_seconds = _ALIVE_SECONDS
        self._door = DoorConnection(
            context,
            endpoint,
            keys,
            backend_id,
            queues=tuple(queues),
            credits=credits,
            receives=receives,
            handlers=Handlers(self._welcomed, self._said, self._over),
        )
        self._upkeep = asyncio.create_task(self._keep_up())

    # --- life -----------------------------------------------------------------------------------------------------

    @property
    def near(self) -> RuntimeDir | None:
        """The service's runtime directory where it is on this host; then this backend is not registered."""
        return self._door.near

    async def ready(self, seconds: float) -> None:
        await self._door.ready(seconds)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._upkeep.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._upkeep
        self._release_dropped()
        await self._door.close(_CLOSE_SECONDS)

    async def call(self, make: Callable[[int], msgspec.Struct]) -> Any:
        return await self._door.call(make)

    def tell(
        self,
        make: Callable[[int], msgspec.Struct],  # noqa: ARG002 -- see below
        told: Callable[[Any], None],  # noqa: ARG002
    ) -> Callable[[], bool]:
        """Refuse: on the way to another host a hop between threads counts for nothing; raises WriterLostError."""
        raise WriterLostError("say it with call()")

    # --- items ----------------------------------------------------------------------------------------------------

    def open_now(self, address: Address) -> Item | None:  # noqa: ARG002 -- it has to be received
        return None

    async def open(self, address: Address) -> Item:
        assert address.lease is not None
        return await self._open(address, bytes.fromhex(address.lease), address.lease_kind or "copy")

    async def acquire(self, address: Address, kind: messages.LeaseKind) -> Item:
        return await self._open(msgspec.structs.replace(address, lease_kind=kind), None, kind)

    def sources_now(self, wanted: Sequence[tuple[Address, ItemMeta]]) -> list[tuple[Address, Source]] | None:
        return None if wanted else []

    async def sources(self, wanted: Sequence[tuple[Address, ItemMeta]]) -> list[tuple[Address, Source]]:
        """Return the received items of a job; room for all is taken at once, so that two jobs never wait for each other."""
        lengths = [_length(address, meta) for address, meta in wanted]
        await self._memory.take(sum(lengths), None)
        leases = [bytes.fromhex(address.lease or "") for address, _ in wanted]
        # All at once: the next item's first chunks come right behind the last ones of the item before.
        receiving = [asyncio.create_task(self._receive(*one)) for one in zip(leases, lengths, strict=True)]
        try:
            sources = await asyncio.gather(*receiving)
        except BaseException:
            for task in receiving:
                task.cancel()
            ended = await asyncio.gather(*receiving, return_exceptions=True)
            for outcome, length in zip(ended, lengths, strict=True):
                if isinstance(outcome, Received):
                    outcome.release()
                else:
                    self._memory.give(length)
            raise
        return [(address, source) for (address, _), source in zip(wanted, sources, strict=True)]

    async def renew(self, leases: tuple[bytes, ...]) -> tuple[bytes, ...]:
        over: tuple[bytes, ...] = ()
        for start in range(0, len(leases), _BATCH):
            batch = leases[start : start + _BATCH]
            answer = await self._door.call(partial(messages.Renew, leases=batch))
            over += tuple(answer.lost)
        return over

    def drop(self, lease: bytes) -> None:
        self._dropped.append(lease)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the lease over
            self._loop.call_soon_threadsafe(self._release_dropped)

    async def _open(self, address: Address, lease: bytes | None, kind: messages.LeaseKind) -> Item:
        place = remote.RemoteAddress(
            address.segment,
            bytes.fromhex(address.epoch),
            address.slot,
            address.offset,
            address.length,
            address.generation,
            address.metadata_length,
        )
        for retries_left in reversed(range(_MOST_RETRIES + 1)):
            opened, blob = await self._door.call(lambda call: remote.Open(call, place, lease, kind))
            try:
                meta = _read_meta(blob)
                source = await self._receive_alone(opened.lease, region_size(meta.fields))
            except WriterLostError:  # the lease went with the connection
                if not retries_left:
                    raise
                continue
            except BaseException:
                self.drop(opened.lease)
                raise
            return item_of(address, opened.lease, meta, source, self._run)
        raise AssertionError

    async def _receive_alone(self, lease: bytes, length: int) -> Received:
        await self._memory.take(length, _ROOM_SECONDS)
        try:
            return await self._receive(lease, length)
        except BaseException:
            self._memory.give(length)
            raise

    async def _receive(self, lease: bytes, length: int) -> Received:
        """Receive an item for which memory is taken."""
        region = aligned(length)
        if length:
            await self._fill(lease, region)
        return Received(region, lambda: self._give_up(lease, length))

    def _give_up(self, lease: bytes, length: int) -> None:
        self._memory.give(length)
        self.drop(lease)

    async def _fill(self, lease: bytes, region: memoryview) -> None:
        if self._reception is None:
            raise WriterLostError("the connection to the service was lost; try again")
        receiving = _Receiving(region, self._loop.create_future())
        asks = self._reception.begin(lease, len(region), time.monotonic())
        self._receiving[lease] = receiving
        self._ask(asks)
        try:
            await receiving.arrived
        finally:
            if self._receiving.get(lease) is receiving:  # nobody waits for the rest
                self._abandon(lease)

    def _abandon(self, lease: bytes) -> None:
        del self._receiving[lease]
        if self._reception is not None and lease in self._reception:
            self._door.tell(messages.Release(0, (lease,)))
            self._ask(self._reception.abandon(lease, time.monotonic()))

    def _ask(self, asks: Sequence[Asking]) -> None:
        for ask in asks:
            self._door.tell(remote.Ask(*ask))

    def _release_dropped(self) -> None:
        while self._dropped:
            batch = tuple(self._dropped.popleft() for _ in range(min(_BATCH, len(self._dropped))))
            if self._door.up:  # else they ended with the connection
                self._door.tell(messages.Release(0, batch))

    async def _keep_up(self) -> None:
        said = 0.0
        while True:
            await asyncio.sleep(_UPKEEP_SECONDS)
            now = time.monotonic()
            if self._door.up and now - said >= self._alive_seconds:
                said = now
                with contextlib.suppress(MmprepError):  # the door does not read: ZeroMQ's heartbeat will tell
                    self._door.tell(remote.Alive())
                    self._ask([] if self._reception is None else self._reception.tell())
            if self._reception is not None:
                for lease in self._reception.stalled(now, _STALL_SECONDS):
                    self._fail(lease, ServiceUnavailable("the tensors do not come; try again", retry_after=1.0))

    def _fail(self, lease: bytes, error: MmprepError) -> None:
        receiving = self._receiving.get(lease)
        if receiving is not None and not receiving.arrived.done():
            receiving.arrived.set_exception(error)

    # --- what the door says ---------------------------------------------------------------------------------------

    def _over(self, kind: type[MmprepError], why: str) -> None:
        """The session is over."""
        self._reception = None
        receiving, self._receiving = self._receiving, {}
        for one in receiving.values():
            if not one.arrived.done():
                one.arrived.set_exception(kind(why))

    def _welcomed(self, welcome: remote.RemoteWelcome) -> None:
        self._reception = Reception(chunk=welcome.chunk, credits=welcome.credits)
        self._alive_seconds = min(_ALIVE_SECONDS, welcome.lease_ms / 3000)
        self._dropped.clear()
        if self._pulls is not None:
            for make, answered in self._pulls.greets():
                self._door.ask(make, answered)

    def _said(self, message: msgspec.Struct, frames: list[zmq.Frame]) -> None:
        match message:
            case remote.Chunk():
                self._chunk(message, frames)
            case remote.Ended():
                self._ended(message)
            case messages.Delivery() if self._pulls is not None:
                self._pulls.delivered(message, [frame.bytes for frame in frames])

    def _chunk(self, chunk: remote.Chunk, frames: list[zmq.Frame]) -> None:
        if self._reception is None:
            return
        data = frames[0].buffer if len(frames) == 1 else memoryview(b"")
        try:
            arrival = self._reception.arrived(chunk.lease, chunk.number, len(data), time.monotonic())
        except ProtocolError:
            self._door.give_up()
            raise
        receiving = self._receiving.get(chunk.lease)
        if arrival.offset is not None and receiving is not None:
            receiving.region[arrival.offset : arrival.offset + len(data)] = data
            if arrival.complete and not receiving.arrived.done():
                del self._receiving[chunk.lease]
                receiving.arrived.set_result(None)
        self._ask(arrival.asks)

    def _ended(self, ended: remote.Ended) -> None:
        if self._reception is not None:
            asks = self._reception.ended(ended.lease, time.monotonic())
            self._fail(ended.lease, ended.fault.error())
            self._ask(asks)


def _length(address: Address, meta: ItemMeta) -> int:
    """Return the bytes of the tensor region of an item of a job, which lies in its extent."""
    length = region_size(meta.fields)
    if align(address.metadata_length) + length > address.length:
        raise ProtocolError("a job has an item that is longer than its extent")
    return length


def _read_meta(blob: bytes) -> ItemMeta:
    if len(blob) > CONTROL_LIMIT:
        raise ProtocolError("an item's metadata are too long")
    try:
        return unpack_meta(blob)
    except ValueError as error:
        raise ProtocolError(f"an item came without right metadata: {error}") from None
