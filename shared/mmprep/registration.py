"""A reader's place with the writer: its id and process lock, its mapping of the segment, its leases.

A registration is what makes a process a *backend*: the writer leases addresses to it, and knows from the process lock, and
from nothing else, that it has died. It runs on one asyncio loop; what other threads may call says so.

Leases are renewed in the background at a third of their time for as long as someone refers to them. They outlive the
writer: the next one is told of them before anything else (:mod:`mmprep.holdings`). Where it starts with another segment,
the former one stays mapped, as it was, for as long as items refer to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import msgspec
import zmq

import mmprep
from mmprep import failpoints, layout
from mmprep.address import Address, check_against, check_record, is_in_spill
from mmprep.errors import InvalidRequest, LeaseLost, MmprepError, ProtocolError, ServiceUnavailable, StaleAddress
from mmprep.holdings import Holdings, Life
from mmprep.process_lock import ProcessLock
from mmprep.runtime import RuntimeDir
from mmprep.segment import Segment, sibling_name
from mmprep.wire import messages
from mmprep.wire.calls import CallTable, WriterLostError
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.sockets import Link
from mmprep.wire.standing import Standing

_UPKEEP_SECONDS = 0.05
#: Leases in one message.
_BATCH = 512
#: Seconds for one word with the writer, its replacement included, and for the segment that an answer speaks of.
_CALL_SECONDS = 10.0
_CLOSE_SECONDS = 1.0
_MOST_ENDED = 64
_NO_SERVICE = "no service answers in this runtime directory; start it with: mmprep serve"
_EARLIER_LIFE = "the address belongs to an earlier life of the cache; ask for the item again"


class Mapping:
    """One mapped segment: the ring in one of its lives."""

    def __init__(self, info: messages.SegmentInfo) -> None:
        self.segment = Segment.attach(info.name, writable=False)
        self.name = info.name
        self.epoch = info.epoch.hex()
        header = layout.unpack_header(bytes(self.segment.buffer[: layout.PAGE]))
        if header.epoch != info.epoch:
            raise ProtocolError("the segment's header is not of the epoch that the writer names")
        self.geometry = header.geometry
        #: Nobody writes to this segment any more: what is in it stays.
        self.frozen = False

    @classmethod
    def of_spill(cls, ring: str, epoch: bytes) -> Mapping:
        """Map the spill of ``epoch`` beside the segment ``ring``. It is written once: what is in it stays.

        Raises
        ------
        StaleAddress
            There is no such spill (any more).
        """
        name = sibling_name(ring, epoch)
        try:
            mapping = cls(messages.SegmentInfo(name, epoch, 0))
        except (ProtocolError, ValueError):
            mapping = None
        if mapping is None or mapping.geometry.slots != 1 or mapping.geometry.total_size > mapping.segment.size:
            raise StaleAddress("the item's segment is gone; ask for the item again")
        mapping.frozen = True
        return mapping

    def check(self, address: Address) -> None:
        """Check ``address`` against this mapping as it is at this moment; raises StaleAddress or InvalidRequest."""
        check_against(address, segment=self.name, epoch=self.epoch, geometry=self.geometry)
        start = self.geometry.record_offset(address.slot)
        check_record(address, bytes(self.segment.buffer[start : start + layout.RECORD_SIZE]), self.geometry)
        failpoints.reach("backend.mapped")

    def extent(self, address: Address) -> memoryview:
        """Return the extent's bytes as they lie there; read-only, not copied."""
        return self.segment.buffer[address.offset : address.offset + address.length]

    def copy(self, address: Address) -> memoryview:
        """Return a private copy of the extent, checked before and after; raises StaleAddress."""
        self.check(address)
        copied = memoryview(bytearray(self.extent(address)))
        self.check(address)
        return copied

    def part(self, address: Address, start: int, stop: int) -> zmq.Frame:
        """Return a private copy of a part of the extent, checked before and after; raises StaleAddress."""
        self.check(address)
        copied = zmq.Frame(self.extent(address)[start:stop], copy=True)
        self.check(address)
        return copied


class Lease:
    """One lease, held for as long as this object lives or until :meth:`release`."""

    __slots__ = ("_registration", "id")

    def __init__(self, registration: Registration | None, lease_id: bytes) -> None:
        self._registration = registration
        self.id = lease_id

    def release(self) -> None:
        """End the lease; again is no error. May be called from any thread."""
        registration, self._registration = self._registration, None
        if registration is not None:
            registration.drop(self.id)

    def __del__(self) -> None:
        self.release()


class Pulls(Protocol):
    """What takes jobs from queues, on the registration's loop."""

    def greets(self) -> Iterable[tuple[Callable[[int], msgspec.Struct], Callable[[asyncio.Future[Any]], None]]]:
        """Return what a writer that welcomes this reader is told first, and what takes each answer."""

    def delivered(self, delivery: messages.Delivery, content: list[bytes]) -> None:
        """Take a job."""


class Registration:
    """A backend's registration with the writer of one runtime directory.

    Parameters
    ----------
    runtime:
        Of the running service.
    backend_id:
        This reader's name, unique among the living.
    pulls:
        What takes jobs from queues, if anything.

    Attributes
    ----------
    mapping: the ring's segment, ``None`` before the first welcome.

    Raises
    ------
    InvalidRequest
        A living process has registered under the same id.
    ServiceUnavailable
        No service has ever run in the directory, or it has left.
    """

    def __init__(
        self, context: zmq.Context[Any], runtime: RuntimeDir, backend_id: str, pulls: Pulls | None = None
    ) -> None:
        self.id = backend_id
        self._pulls = pulls
        self.mapping: Mapping | None = None
        self._instance = os.urandom(8)
        self._connections = 0
        self._holdings = Holdings(self._instance)
        #: The turn that the writer was told last.
        self._turn = 0
        #: Guards the holdings: items are opened on other threads.
        self._guard = threading.Lock()
        self._former: weakref.WeakValueDictionary[str, Mapping] = weakref.WeakValueDictionary()
        self._spills: weakref.WeakValueDictionary[str, Mapping] = weakref.WeakValueDictionary()
        #: The last epochs of this service that have ended.
        self._ended: deque[str] = deque(maxlen=_MOST_ENDED)
        self._calls = CallTable()
        self._up = False
        self._standing = Standing()
        self._lock = ProcessLock(runtime.lock_path("backend", backend_id))
        try:
            alone = self._lock.acquire()
        except FileNotFoundError:  # as in a directory that a service has left
            raise ServiceUnavailable(_NO_SERVICE) from None
        if not alone:
            raise InvalidRequest(
                f"a living process is registered as {backend_id!r}; choose another backend id", param="backend_id"
            )
        self._lock.note(self._instance)
        self._link = Link(
            context,
            runtime.writer,
            f"backend:{backend_id}",
            greeting=self._greeting,
            on_message=self._on_message,
            on_down=self._on_down,
        )
        self._upkeep = asyncio.create_task(self._keep_up())

    # --- life -----------------------------------------------------------------------------------------------------

    async def ready(self, seconds: float) -> Mapping:
        """Wait until a writer has welcomed this registration, and return the mapped segment.

        Raises
        ------
        ServiceUnavailable
            None did within ``seconds``.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._standing.until(lambda: self._up)
        except TimeoutError:
            raise ServiceUnavailable(_NO_SERVICE) from None
        assert self.mapping is not None
        return self.mapping

    async def close(self) -> None:
        """Release every lease and leave; again is no error."""
        if self._standing.closed:
            return
        self._standing.closed = True
        self._upkeep.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._upkeep
        with self._guard:
            self._holdings.drop_all()
        if self._up:
            self._flush_dropped()
            with contextlib.suppress(MmprepError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self.call(lambda call: messages.Release(call, ()))
        self._link.close()
        self._calls.fail_all(InvalidRequest, "this client is closed")
        self._standing.note()
        mapping, self.mapping = self.mapping, None
        if mapping is not None:
            mapping.segment.close()
        self._lock.remove()

    # --- leases ---------------------------------------------------------------------------------------------------

    @property
    def lease_seconds(self) -> float:
        """How long a lease holds without renewal, as the writer that welcomed this registration last said."""
        return self._holdings.seconds

    def hold_now(self, address: Address, sent_at: float | None) -> tuple[Mapping, Lease] | None:
        """Take charge of a leased address; ``None`` where it takes :meth:`hold`. May be called from any thread.

        Parameters
        ----------
        sent_at:
            When the request was sent whose answer granted the lease, by ``time.monotonic``; ``None`` where nobody knows.
        """
        failpoints.reach("backend.lease.received")
        assert address.lease is not None
        frozen = self._former.get(address.epoch)
        if frozen is not None:
            return frozen, Lease(None, bytes.fromhex(address.lease))
        return self._adopt(address, sent_at)

    def _adopt(self, address: Address, sent_at: float | None) -> tuple[Mapping, Lease] | None:
        assert address.lease is not None
        ring, lease = self.mapping, bytes.fromhex(address.lease)
        if ring is None:
            return None
        spill = self._spill(ring, address)
        if spill is None and ring.epoch != address.epoch:
            return None
        with self._guard:
            good = self._holdings.adopt(
                lease,
                address.slot,
                address.generation,
                address.lease_kind or "copy",
                epoch=ring.epoch,
                sent_at=time.monotonic() if sent_at is None else sent_at,
                sure=sent_at is not None,
            )
        return (spill or ring, Lease(self, lease)) if good else None

    async def hold(self, address: Address, sent_at: float | None) -> tuple[Mapping, Lease]:
        """Take charge of a leased address. What the lease was not granted for is leased anew: see :class:`Holdings`.

        Such a lease may have been granted by a writer before the present one, or to a process before this one under the
        same id. The content is looked for all the same: whoever has the address can't tell, and a hit is worth a word.

        Raises
        ------
        StaleAddress
            Its content is gone.
        """
        found = self.hold_now(address, sent_at)
        if found is not None:
            return found
        if address.epoch in self._ended:
            raise StaleAddress(_EARLIER_LIFE)
        try:
            async with asyncio.timeout(_CALL_SECONDS):  # a frontend may know a new segment before this process does
                await self._standing.until(lambda: self._up and self._knows(address))
        except TimeoutError:
            raise StaleAddress(_EARLIER_LIFE) from None
        return self._adopt(address, sent_at) or await self.acquire(address, address.lease_kind or "copy")

    def _knows(self, address: Address) -> bool:
        ring = self.mapping
        return ring is not None and (ring.epoch == address.epoch or is_in_spill(address, ring=ring.name))

    def drop(self, lease_id: bytes) -> None:
        """Release a lease that was held here soon; may be called from any thread."""
        self._holdings.drop(lease_id)

    def give_up(self, lease_id: bytes) -> None:
        """Release the lease of an address soon, unless it is held here as a view; may be called from any thread."""
        self._holdings.give_up(lease_id)

    def check_held(self, lease_id: bytes) -> None:
        """Raise LeaseLost where the lease is over, InvalidRequest where this is closed.

        While no writer is there no lease ends: the next one is told of it before it allocates anything.
        """
        if self._standing.closed:
            raise InvalidRequest("this client is closed")
        if self._holdings.lost(lease_id, time.monotonic() if self._up else -math.inf):
            raise LeaseLost("the lease has run out; ask for the item again")

    def _spill(self, ring: Mapping, address: Address) -> Mapping | None:
        """Return the mapped spill that ``address`` names, ``None`` where it is no address in a spill beside ``ring``.

        It stays mapped while somebody refers to it. No other segment is ever opened, whatever the address says.

        Raises
        ------
        StaleAddress
            The spill is gone.
        """
        if not is_in_spill(address, ring=ring.name):
            return None
        mapping = self._spills.get(address.epoch)
        if mapping is None:
            mapping = self._spills[address.epoch] = Mapping.of_spill(ring.name, bytes.fromhex(address.epoch))
        return mapping

    async def acquire(self, address: Address, kind: messages.LeaseKind) -> tuple[Mapping, Lease]:
        """Lease the content of ``address``; raises StaleAddress where it is gone."""
        slot, generation = address.slot, address.generation
        while True:
            ring = await self.ready(_CALL_SECONDS)
            mapping = self._spill(ring, address) or ring
            mapping.check(address)
            sent_at = time.monotonic()
            answer = await self.call(lambda call: messages.Acquire(call, slot, generation, kind))
            with self._guard:
                if self._holdings.acquired(answer.lease, slot, generation, kind, epoch=ring.epoch, sent_at=sent_at):
                    return mapping, Lease(self, answer.lease)

    async def upgrade(self, lease_id: bytes, kind: messages.LeaseKind) -> None:
        """Make a lease a view, which is never revoked while this process lives, or a copy again; raises LeaseLost."""
        await self.call(lambda call: messages.Upgrade(call, lease_id, kind))
        with self._guard:
            self._holdings.changed(lease_id, kind)

    async def renew(self, lease_ids: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Prolong leases from now and return those that are over."""
        over: tuple[bytes, ...] = ()
        for start in range(0, len(lease_ids), _BATCH):
            batch = lease_ids[start : start + _BATCH]
            sent_at = time.monotonic()
            answer = await self.call(partial(messages.Renew, leases=batch))
            with self._guard:
                self._holdings.renewed(batch, frozenset(answer.lost), sent_at)
            over += tuple(answer.lost)
        return over

    # --- behind the scenes ----------------------------------------------------------------------------------------

    async def call(self, make: Callable[[int], msgspec.Struct]) -> Any:
        """Ask the writer, and its successor where it goes away before it answers: every call may be made twice."""
        return await self._calls.ask(
            lambda number: self._link.send([pack(make(number))]),
            self._connected,
            seconds=_CALL_SECONDS,
            silence="the writer did not answer",
        )

    def tell(self, make: Callable[[int], msgspec.Struct], told: Callable[[Any], None]) -> int:
        """Ask the writer that is there, once; ``told`` is called with the answer or the error. Returns the call's number.

        Raises
        ------
        WriterLostError
            None is there.
        """
        if not self._up:
            raise WriterLostError("no writer is there")
        return self._calls.tell(lambda number: self._link.send([pack(make(number))]), told)

    def forget(self, number: int) -> bool:
        """Let nobody be told of a call's outcome; say whether it had none."""
        return self._calls.forget(number)

    async def _connected(self) -> None:
        if not self._standing.closed:
            await self._standing.until(lambda: self._up)

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_UPKEEP_SECONDS)
            if not self._up:
                continue
            with contextlib.suppress(MmprepError):
                await self._release_dropped()
                await self._tell_turn()
            with self._guard:
                due = self._holdings.due(time.monotonic(), _BATCH)
            if due:
                with contextlib.suppress(MmprepError):
                    await self.renew(due)

    async def _release_dropped(self) -> None:
        """Release what was dropped, and hear that the writer has heard: a view that it does not know to be over stays."""
        while True:
            with self._guard:
                batch = self._holdings.take_dropped(_BATCH)
            if not batch:
                return
            failpoints.reach("backend.release.before")
            await self.call(partial(messages.Release, leases=batch))
            failpoints.reach("backend.release.after")
            with self._guard:
                self._holdings.released(batch)

    async def _tell_turn(self) -> None:
        turn = self._holdings.turn
        if turn > self._turn:
            await self.call(partial(messages.Retag, turn=turn))
            self._turn = max(self._turn, turn)

    def _flush_dropped(self) -> None:
        """Release what was dropped; nobody waits for an answer, because this process's lock falls next."""
        while True:
            with self._guard:
                batch = self._holdings.take_dropped(_BATCH)
            if not batch:
                return
            failpoints.reach("backend.release.before")
            self._link.send([pack(messages.Release(0, batch))])
            failpoints.reach("backend.release.after")

    def _greeting(self) -> list[bytes]:
        self._connections += 1
        self._turn = self._holdings.turn
        hello = messages.Hello(
            PROTOCOL,
            mmprep.__version__,
            "backend",
            self.id,
            os.getpid(),
            self._instance,
            self._connections,
            self._turn,
        )
        return [pack(hello)]

    def _on_down(self) -> None:
        self._up = False
        self._calls.fail_all(WriterLostError, "the writer went away; try again")
        self._standing.note()

    def _on_message(self, frames: list[Any]) -> None:
        message = unpack(frames[0], messages.FromWriter)
        match message:
            case messages.WriterWelcome():
                self._welcomed(message)
            case messages.Refused():
                self._refuse(message.fault.error())
            case messages.Failed():
                self._calls.resolve(message.call, message.fault.error())
            case messages.Done() | messages.Renewed() | messages.Acquired() | messages.Kept():
                self._calls.resolve(message.call, message)
            case messages.StillHeld():
                with self._guard:
                    self._holdings.asked(message.leases)
            case messages.Delivery():
                if self._pulls is not None:
                    self._pulls.delivered(message, frames[1:])
                if message.done:  # after the job: whoever hears of the end has the next one
                    self._calls.resolve(message.done, messages.Done(message.done))
            case _:
                pass

    def _refuse(self, error: MmprepError) -> None:
        """The writer does not take this connection: say so to those who wait, and try another one."""
        self._standing.refusal = error
        self._calls.fail_all(ServiceUnavailable, error.message)
        self._link.reopen()

    def _welcomed(self, welcome: messages.WriterWelcome) -> None:
        self._calls.fail_all(WriterLostError, "the writer has begun anew; try again")
        life = Life(welcome.segment.epoch.hex(), welcome.incarnation)
        if self.mapping is None or self.mapping.epoch != life.epoch:
            try:
                mapping = Mapping(welcome.segment)
            except (MmprepError, ValueError, OSError) as error:
                self._refuse(ServiceUnavailable(f"the segment cannot be mapped: {error}"))
                return
            former, self.mapping = self.mapping, mapping
            if former is not None:
                former.frozen = True
                self._former[former.epoch] = former
                self._ended.append(former.epoch)
        with self._guard:
            held = self._holdings.welcomed(life, welcome.lease_ms / 1000)
        if self._pulls is not None:  # before the word that this was all: a writer that waits for it delivers next
            for make, answered in self._pulls.greets():
                self._say(make, answered)
        self._reassert(held)
        self._standing.refusal, self._up = None, True
        self._standing.note()

    def _reassert(self, held: tuple[messages.Held, ...]) -> None:
        """Tell a new writer of everything, in order and before any other message; its answers come by themselves."""
        sent_at = time.monotonic()
        for start in range(0, max(1, len(held)), _BATCH):
            batch = held[start : start + _BATCH]
            ids = tuple(one.lease for one in batch)
            told = partial(messages.Reassert, leases=batch, last=start + _BATCH >= len(held))
            self._say(told, partial(self._reasserted, ids, sent_at))

    def _say(self, make: Callable[[int], msgspec.Struct], answered: Callable[[asyncio.Future[Any]], None]) -> None:
        """Ask without waiting for the answer; where the connection is lost the next welcome begins anew."""
        self._calls.begin(lambda number: self._link.send([pack(make(number))]), answered)

    def _reasserted(self, ids: tuple[bytes, ...], sent_at: float, done: asyncio.Future[Any]) -> None:
        if done.cancelled() or done.exception() is not None:
            return  # the connection was lost: the next welcome begins anew
        with self._guard:
            self._holdings.renewed(ids, frozenset(done.result().lost), sent_at)
