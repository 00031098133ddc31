"""A reader's place with the writer: its id and process lock, its mapping of the segment, its leases.

A registration is what makes a process a *backend*: the writer leases addresses to it, and knows from the process lock, and
from nothing else, that it has died. It runs on one asyncio loop.

Leases are renewed in the background at a third of their time for as long as someone refers to them. Deadlines count from
the moment a request was *sent*, never from when its answer came.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import zmq

import mmprep
from mmprep import layout
from mmprep.address import Address, check_against, check_record
from mmprep.errors import LeaseLost, MmprepError, ProtocolError, ServiceUnavailable, StaleAddress
from mmprep.process_lock import ProcessLock
from mmprep.runtime import RuntimeDir
from mmprep.segment import Segment, sibling_name
from mmprep.wire import messages
from mmprep.wire.calls import CallTable
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.sockets import Link

_RELEASE_EVERY = 0.05
_BATCH = 512


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

    @classmethod
    def of_spill(cls, ring: Mapping, epoch: bytes) -> Mapping:
        """Map the spill of ``epoch`` in the runtime directory of ``ring``; its name is derived, and never another one.

        Raises
        ------
        StaleAddress
            There is no such spill (any more).
        """
        name = sibling_name(ring.name, epoch)
        try:
            mapping = cls(messages.SegmentInfo(name, epoch, 0))
        except (ProtocolError, ValueError):
            mapping = None
        if mapping is None or mapping.geometry.slots != 1 or mapping.geometry.total_size > mapping.segment.size:
            raise StaleAddress("the item's segment is gone; ask for the item again")
        return mapping

    def check(self, address: Address) -> None:
        """Check ``address`` against this mapping as it is at this moment; raises StaleAddress or InvalidRequest."""
        check_against(address, segment=self.name, epoch=self.epoch, geometry=self.geometry)
        start = self.geometry.record_offset(address.slot)
        check_record(address, bytes(self.segment.buffer[start : start + layout.RECORD_SIZE]), self.geometry)

    def extent(self, address: Address) -> memoryview:
        """Return the extent's bytes as they lie there; read-only, not copied."""
        return self.segment.buffer[address.offset : address.offset + address.length]

    def copy(self, address: Address) -> memoryview:
        """Return a private copy of the extent, checked before and after; raises StaleAddress."""
        self.check(address)
        copied = memoryview(bytearray(self.extent(address)))
        self.check(address)
        return copied


class Lease:
    """One lease, held for as long as this object lives or until :meth:`release`."""

    __slots__ = ("_registration", "id", "sent_at")

    def __init__(self, registration: Registration, lease_id: bytes, sent_at: float) -> None:
        self._registration: Registration | None = registration
        self.id = lease_id
        self.sent_at = sent_at
        registration.adopt(self)

    def release(self) -> None:
        """End the lease; again is no error. May be called from any thread."""
        registration, self._registration = self._registration, None
        if registration is not None:
            registration.drop(self.id)

    def __del__(self) -> None:
        self.release()


class Registration:
    """A backend's registration with the writer of one runtime directory.

    Parameters
    ----------
    runtime:
        Of the running service.
    backend_id:
        This reader's name, unique among the living.

    Raises
    ------
    InvalidRequest
        A living process has registered under the same id.
    """

    def __init__(self, context: zmq.Context[Any], runtime: RuntimeDir, backend_id: str) -> None:
        self.id = backend_id
        self.mapping: Mapping | None = None
        #: Spills by epoch; each stays mapped while an item of it refers to it.
        self._spills: WeakValueDictionary[str, Mapping] = WeakValueDictionary()
        self.lease_seconds = 0.0
        self._calls = CallTable()
        self._leases: dict[bytes, float] = {}
        self._dropped: deque[bytes] = deque()
        self._lost: set[bytes] = set()
        self._up = asyncio.Event()
        self._refused: MmprepError | None = None
        self._lock = ProcessLock(runtime.lock_path("backend", backend_id))
        if not self._lock.acquire():
            raise mmprep.InvalidRequest(
                f"a living process is registered as {backend_id!r}; choose another backend id", param="backend_id"
            )
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
        """Wait until the writer has welcomed this registration, and return the mapped segment.

        Raises
        ------
        ServiceUnavailable
            It did not within ``seconds``.
        """
        if self._up.is_set() and self.mapping is not None and self._refused is None:
            return self.mapping
        try:
            async with asyncio.timeout(seconds):
                await self._up.wait()
        except TimeoutError:
            raise ServiceUnavailable(
                "no service answers in this runtime directory; start it with: mmprep serve"
            ) from None
        if self._refused is not None:
            raise self._refused
        assert self.mapping is not None
        return self.mapping

    async def close(self) -> None:
        """Release every lease and leave."""
        self._upkeep.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._upkeep
        self._dropped.extend(self._leases)
        if self._up.is_set() and self._refused is None:
            self._flush_released()
            with contextlib.suppress(MmprepError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._call(lambda call: messages.Release(call, ()))
        self._link.close()
        mapping, self.mapping = self.mapping, None
        if mapping is not None:
            mapping.segment.close()
        self._lock.release()

    # --- leases ---------------------------------------------------------------------------------------------------

    def lease(self, lease_id: bytes, sent_at: float) -> Lease:
        """Take charge of a lease that an answer granted to this backend; ``sent_at`` by ``time.monotonic``."""
        return Lease(self, lease_id, sent_at)

    def adopt(self, lease: Lease) -> None:
        """Keep renewing ``lease``; may be called from any thread."""
        self._leases[lease.id] = lease.sent_at + self.lease_seconds

    def drop(self, lease_id: bytes) -> None:
        """Release a lease soon; may be called from any thread."""
        self._dropped.append(lease_id)

    def check_held(self, lease_id: bytes, kind: messages.LeaseKind) -> None:
        """Raise LeaseLost where the writer has said that the lease is gone, or where it may have ended by time.

        A view does not end by time: it is this process's for as long as it lives.
        """
        deadline = self._leases.get(lease_id)
        late = kind == "copy" and deadline is not None and deadline < time.monotonic()
        if late or lease_id in self._lost:
            raise LeaseLost("the lease has run out; ask for the item again")

    def mapping_of(self, address: Address) -> Mapping:
        """Return the segment that ``address`` names: the ring, or a spill, which the caller's reference keeps mapped.

        May be called from any thread. No other segment is opened, whatever the address says.

        Raises
        ------
        StaleAddress
            It names neither, or a spill that is gone.
        """
        ring = self.mapping
        if ring is None:
            raise ServiceUnavailable("not connected to the writer")
        epoch = bytes.fromhex(address.epoch)
        if address.segment == ring.name or address.segment != sibling_name(ring.name, epoch):
            return ring  # which refuses addresses of other segments
        mapping = self._spills.get(address.epoch)
        if mapping is None:
            mapping = self._spills[address.epoch] = Mapping.of_spill(ring, epoch)
        return mapping

    async def acquire(self, address: Address, kind: messages.LeaseKind) -> Lease:
        """Lease the content of ``address``; raises StaleAddress where it is gone."""
        self.mapping_of(address).check(address)
        sent_at = time.monotonic()
        slot, generation = address.slot, address.generation
        answer = await self._call(lambda call: messages.Acquire(call, slot, generation, kind))
        return Lease(self, answer.lease, sent_at)

    async def upgrade(self, lease_id: bytes, kind: messages.LeaseKind) -> None:
        """Make a lease a view, which is never revoked while this process lives, or a copy again; raises LeaseLost."""
        await self._call(lambda call: messages.Upgrade(call, lease_id, kind))

    async def renew(self, lease_ids: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Prolong leases from now and return those that are over."""
        sent_at = time.monotonic()
        answer = await self._call(lambda call: messages.Renew(call, lease_ids))
        for lease_id in lease_ids:
            if lease_id in answer.lost:
                self._leases.pop(lease_id, None)
                self._lost.add(lease_id)
            elif lease_id in self._leases:
                self._leases[lease_id] = sent_at + answer.lease_ms / 1000
        return tuple(answer.lost)

    # --- behind the scenes ----------------------------------------------------------------------------------------

    async def _call(self, make: Any) -> Any:
        number, future = self._calls.open()
        try:
            self._link.send([pack(make(number))])
            async with asyncio.timeout(max(5.0, self.lease_seconds)):
                return await future
        except TimeoutError:
            raise ServiceUnavailable("the writer did not answer") from None
        finally:
            self._calls.forget(number)

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_RELEASE_EVERY)
            if not self._up.is_set() or self._refused is not None:
                continue
            self._flush_released()
            soon = time.monotonic() + self.lease_seconds * 2 / 3
            due = tuple(lease for lease, deadline in tuple(self._leases.items()) if deadline < soon)[:_BATCH]
            if due:
                with contextlib.suppress(MmprepError):
                    await self.renew(due)

    def _flush_released(self) -> None:
        while self._dropped:
            batch = tuple(self._dropped.popleft() for _ in range(min(len(self._dropped), _BATCH)))
            for lease_id in batch:
                self._leases.pop(lease_id, None)
                self._lost.discard(lease_id)
            self._link.send([pack(messages.Release(0, batch))])

    def _greeting(self) -> list[bytes]:
        return [pack(messages.Hello(PROTOCOL, mmprep.__version__, "backend", self.id, os.getpid()))]

    def _on_down(self) -> None:
        self._up.clear()
        self._calls.fail_all(ServiceUnavailable, "the writer went away; try again")

    def _on_message(self, frames: list[Any]) -> None:
        message = unpack(frames[0], messages.FromWriter)
        match message:
            case messages.WriterWelcome():
                self._welcomed(message)
            case messages.Refused():
                self._refused = message.fault.error()
                self._up.set()
            case messages.Failed():
                self._calls.resolve(message.call, message.fault.error())
            case messages.Done() | messages.Renewed() | messages.Acquired():
                self._calls.resolve(message.call, message)
            case _:
                pass

    def _welcomed(self, welcome: messages.WriterWelcome) -> None:
        self.lease_seconds = welcome.lease_ms / 1000
        if self.mapping is None or self.mapping.epoch != welcome.segment.epoch.hex():
            previous, self.mapping = self.mapping, None
            try:
                self.mapping = Mapping(welcome.segment)
            except (MmprepError, ValueError, msgspec.MsgspecError) as error:
                self._refused = ServiceUnavailable(f"the segment cannot be mapped: {error}")
            if previous is not None:
                self._lost.update(self._leases)
                self._leases.clear()
                previous.segment.close()
        self._up.set()
