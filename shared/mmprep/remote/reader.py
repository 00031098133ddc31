"""A backend's way to a service on another host: one connection to its door, over which tensors are received.

The door registers the backend on its side and holds its leases; :mod:`mmprep_frontend.remote` says how. With a connection
ends all that the backend had there: leases and deliveries, not what was received. A lost connection is made anew by
itself; what is asked meanwhile waits. Tensors are received when an item is opened or delivered, so that a view of them
needs no word with anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import zmq

import mmprep
from mmprep.address import Address
from mmprep.errors import AuthenticationError, InvalidRequest, MmprepError, ProtocolError, ServiceUnavailable
from mmprep.item import Item, Runner, Source
from mmprep.items import ItemMeta, align, region_size, unpack_meta
from mmprep.reading import item_of
from mmprep.registration import Pulls, WriterLostError
from mmprep.remote.curve import RemoteKeys
from mmprep.remote.endpoint import TcpEndpoint, host_id
from mmprep.remote.received import Memory, Received, aligned
from mmprep.remote.reception import Asking, Reception
from mmprep.runtime import RuntimeDir
from mmprep.segment import segments_of
from mmprep.wire import messages
from mmprep.wire import remote_messages as remote
from mmprep.wire.calls import CallTable
from mmprep.wire.codec import CONTROL_LIMIT, PROTOCOL, pack, unpack
from mmprep.wire.sockets import Link

#: Seconds for one word with the door, its replacement included.
_CALL_SECONDS = 10.0
#: Seconds in which something has to come of tensors that were asked for.
_STALL_SECONDS = 30.0
_CLOSE_SECONDS = 2.0
_UPKEEP_SECONDS = 0.05
#: Seconds between two signs of life; a third of a short lease's time.
_ALIVE_SECONDS = 1.0
#: Seconds after a loss, until the door is tried again.
_PAUSE_SECONDS = 0.2
#: Milliseconds between two heartbeats of ZeroMQ's own, and until one that is not answered ends the connection.
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 2000, 10_000
_CONNECT_MS = 5000
#: How often tensors are asked for again because the connection was lost.
_MOST_RETRIES = 2
#: Leases in one message.
_BATCH = 512


class _Receiving(NamedTuple):
    """An item that is being received."""

    region: memoryview
    arrived: asyncio.Future[None]


class RemoteReader:
    """A backend's registration with the door of a service.

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

    Attributes
    ----------
    near: the service's runtime directory where it is on this host; then this backend is not registered here.
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
        self.near: RuntimeDir | None = None
        self._keys = keys
        self._id = backend_id
        self._pulls = pulls
        self._queues = tuple(queues)
        self._credits = credits
        self._run = run
        self._host = b"" if receives else host_id()
        self._instance = os.urandom(16)
        self._memory = Memory(receive_limit)
        self._loop = asyncio.get_running_loop()
        self._calls = CallTable()
        self._receiving: dict[bytes, _Receiving] = {}
        self._reception: Reception | None = None
        self._dropped: deque[bytes] = deque()
        self._up = self._closed = self._known = False
        self._refusal: MmprepError | None = None
        self._changed = asyncio.Event()
        self._alive_seconds = _ALIVE_SECONDS
        self._ipv6 = endpoint.is_ipv6
        self._link = Link(
            context,
            str(endpoint),
            f"backend:{backend_id}",
            greeting=self._greeting,
            on_message=self._on_message,
            on_down=self._on_down,
            frame_limit=remote.MAX_CHUNK,
            copy=False,
            tune=self._tune,
            on_refusal=self._handshake_failed,
            pause=_PAUSE_SECONDS,
        )
        self._upkeep = asyncio.create_task(self._keep_up())

    # --- life -----------------------------------------------------------------------------------------------------

    async def ready(self, seconds: float) -> None:
        """Wait until this backend is registered, or was found to be on the service's host.

        Raises
        ------
        AuthenticationError
            The keys do not fit.
        ServiceUnavailable
            Nobody answered within ``seconds``.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._until(lambda: self._up or self.near is not None)
        except TimeoutError:
            raise ServiceUnavailable(
                "no service answers at this endpoint; is it started with --remote-endpoint?"
            ) from None

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._upkeep.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._upkeep
        if self._up:
            self._release_dropped()
            with contextlib.suppress(MmprepError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self.call(remote.Bye)
        self._link.close()
        self._end_all(InvalidRequest, "this client is closed")

    # --- items ----------------------------------------------------------------------------------------------------

    def open_now(self, address: Address) -> Item | None:  # noqa: ARG002 -- it has to be received
        return None

    async def open(self, address: Address) -> Item:
        assert address.lease is not None
        return await self._open(address, bytes.fromhex(address.lease), address.lease_kind or "copy")

    async def acquire(self, address: Address, kind: messages.LeaseKind) -> Item:
        return await self._open(msgspec.structs.replace(address, lease_kind=kind), None, kind)

    async def source(self, address: Address, meta: ItemMeta) -> tuple[Address, Source]:
        assert address.lease is not None
        length = region_size(meta.fields)
        if align(address.metadata_length) + length > address.length:
            raise ProtocolError("a job has an item that is longer than its extent")
        return address, await self._receive(bytes.fromhex(address.lease), length, None)

    async def renew(self, leases: tuple[bytes, ...]) -> tuple[bytes, ...]:
        over: tuple[bytes, ...] = ()
        for start in range(0, len(leases), _BATCH):
            batch = leases[start : start + _BATCH]
            answer = await self.call(partial(messages.Renew, leases=batch))
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
            opened, blob = await self.call(lambda call: remote.Open(call, place, lease, kind))
            try:
                meta = _read_meta(blob)
                source = await self._receive(opened.lease, region_size(meta.fields), _CALL_SECONDS)
            except WriterLostError:  # the lease went with the connection
                if not retries_left:
                    raise
                continue
            except BaseException:
                self.drop(opened.lease)
                raise
            return item_of(address, opened.lease, meta, source, self._run)
        raise AssertionError

    async def _receive(self, lease: bytes, length: int, seconds: float | None) -> Received:
        """Receive an item; ``seconds``: to wait for memory."""
        await self._memory.take(length, seconds)
        try:
            region = aligned(length)
            if length:
                await self._fill(lease, region)
        except BaseException:
            self._memory.give(length)
            raise
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
            self._tell(messages.Release(0, (lease,)))
            self._ask(self._reception.abandon(lease, time.monotonic()))

    # --- words with the door --------------------------------------------------------------------------------------

    async def call(self, make: Callable[[int], msgspec.Struct]) -> Any:
        """Ask the door, and the next one where the connection is lost before it answers: every call may be made twice."""
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                while True:
                    if not self._closed:
                        await self._until(lambda: self._up)
                    number, future = self._calls.open()
                    try:
                        self._tell(make(number))
                        return await future
                    except WriterLostError:
                        continue
                    finally:
                        self._calls.forget(number)
        except TimeoutError:
            raise ServiceUnavailable("the service did not answer", retry_after=1.0) from None

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for ``condition``; raises a refusal that comes meanwhile, and InvalidRequest where this is closed."""
        former = self._refusal
        while not condition():
            if self._closed:
                raise InvalidRequest("this client is closed")
            if self._refusal is not former and self._refusal is not None:
                raise self._refusal
            self._changed.clear()
            await self._changed.wait()

    def _tell(self, message: msgspec.Struct) -> None:
        self._link.send([pack(message)])

    def _ask(self, asks: Sequence[Asking]) -> None:
        for ask in asks:
            self._tell(remote.Ask(*ask))

    def _release_dropped(self) -> None:
        while self._dropped:
            batch = tuple(self._dropped.popleft() for _ in range(min(_BATCH, len(self._dropped))))
            if self._up:  # else they ended with the connection
                self._tell(messages.Release(0, batch))

    async def _keep_up(self) -> None:
        said = 0.0
        while True:
            await asyncio.sleep(_UPKEEP_SECONDS)
            now = time.monotonic()
            if self._up and now - said >= self._alive_seconds:
                said = now
                with contextlib.suppress(MmprepError):  # the door does not read: ZeroMQ's heartbeat will tell
                    self._tell(remote.Alive())
                    self._ask([] if self._reception is None else self._reception.tell())
            if self._reception is not None:
                for lease in self._reception.stalled(now, _STALL_SECONDS):
                    self._fail(lease, ServiceUnavailable("the tensors do not come; try again", retry_after=1.0))

    def _fail(self, lease: bytes, error: MmprepError) -> None:
        receiving = self._receiving.get(lease)
        if receiving is not None and not receiving.arrived.done():
            receiving.arrived.set_exception(error)

    def _end_all(self, kind: type[MmprepError], why: str) -> None:
        """The session is over."""
        self._up, self._reception = False, None
        receiving, self._receiving = self._receiving, {}
        for one in receiving.values():
            if not one.arrived.done():
                one.arrived.set_exception(kind(why))
        self._calls.fail_all(kind, why)
        self._changed.set()

    # --- the connection -------------------------------------------------------------------------------------------

    def _tune(self, socket: zmq.Socket[bytes]) -> None:
        self._keys.apply(socket)
        socket.ipv6 = self._ipv6
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)

    def _greeting(self) -> list[bytes]:
        hello = remote.RemoteHello(
            PROTOCOL, mmprep.__version__, self._id, self._instance, self._queues, self._credits, self._host
        )
        return [pack(hello)]

    def _on_down(self) -> None:
        self._end_all(WriterLostError, "the connection to the service was lost; try again")

    def _handshake_failed(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            why = "the service does not know this backend's key: put its public key into the service's --curve-clients-dir"
        elif self._known and event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            return  # a service that was there before is going away
        elif self._keys.given:
            why = "the handshake failed: curve_server_key_file is not this service's key, or it listens without keys"
        else:
            why = "the handshake failed: the service wants keys; give curve_key_file and curve_server_key_file"
        self._refuse(AuthenticationError(why))

    def _refused(self, error: MmprepError) -> None:
        """The door has ended the session, or begins none: say so to those who wait, and try another connection."""
        if not (self._up and isinstance(error, ServiceUnavailable)):
            self._refuse(error)
        self._link.reopen()

    def _refuse(self, error: MmprepError) -> None:
        self._refusal = error
        self._calls.fail_all(ServiceUnavailable, error.message)
        self._changed.set()

    def _on_message(self, frames: list[zmq.Frame]) -> None:
        message = unpack(frames[0].buffer, remote.FromDoor)
        match message:
            case remote.Chunk():
                self._chunk(message, frames[1:])
            case remote.RemoteWelcome():
                self._welcomed(message)
            case remote.Neighbour():
                self._is_near(message)
            case messages.Refused():
                self._refused(message.fault.error())
            case remote.Ended():
                self._ended(message)
            case remote.Opened():
                self._calls.resolve(message.call, (message, b"".join(frame.bytes for frame in frames[1:2])))
            case messages.Failed():
                self._calls.resolve(message.call, message.fault.error())
            case messages.Done() | messages.Renewed() | messages.Kept():
                self._calls.resolve(message.call, message)
            case messages.Delivery() if self._pulls is not None:
                self._pulls.delivered(message, [frame.bytes for frame in frames[1:]])
            case _:
                pass

    def _welcomed(self, welcome: remote.RemoteWelcome) -> None:
        self._reception = Reception(chunk=welcome.chunk, credits=welcome.credits)
        self._alive_seconds = min(_ALIVE_SECONDS, welcome.lease_ms / 3000)
        self._dropped.clear()
        self._host = b""  # where it is now it stays
        self._refusal, self._up, self._known = None, True, True
        if self._pulls is not None:
            for make, answered in self._pulls.greets():
                number, future = self._calls.open()
                future.add_done_callback(answered)
                self._tell(make(number))
        self._changed.set()

    def _is_near(self, neighbour: remote.Neighbour) -> None:
        """Use the service's shared memory, where it can be seen from here; containers of one host may not see it."""
        runtime, runtime_id = RuntimeDir(neighbour.runtime_dir), neighbour.runtime_id.hex()
        self._host = b""
        with contextlib.suppress(OSError):
            if runtime.runtime_id == runtime_id and segments_of(runtime_id):
                self.near = runtime
                self._changed.set()
                return
        self._link.send(self._greeting())

    def _chunk(self, chunk: remote.Chunk, frames: list[zmq.Frame]) -> None:
        if self._reception is None:
            return
        data = frames[0].buffer if len(frames) == 1 else memoryview(b"")
        try:
            arrival = self._reception.arrived(chunk.lease, chunk.number, len(data), time.monotonic())
        except ProtocolError:
            self._link.reopen()  # nothing that this door sends can be relied on
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


def _read_meta(blob: bytes) -> ItemMeta:
    if len(blob) > CONTROL_LIMIT:
        raise ProtocolError("an item's metadata are too long")
    try:
        return unpack_meta(blob)
    except ValueError as error:
        raise ProtocolError(f"an item came without right metadata: {error}") from None
