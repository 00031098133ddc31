"""The frontend's link to the writer: offers keys, sends wanted media, receives the one answer.

An offer outlives the writer: when the connection is lost, it is made again to the next writer, within its deadline. What
an answer pinned stays pinned until :meth:`Offered.release`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import msgspec
import zmq

import mmprep
from mmprep.card import ModelCard
from mmprep.errors import DeadlineExceeded, MmprepError, ProtocolError, ServiceUnavailable, StaleAddress
from mmprep.process_lock import ProcessLock
from mmprep.registration import Mapping
from mmprep.runtime import RuntimeDir
from mmprep.wire import messages
from mmprep.wire.calls import CallTable
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.sockets import Link, Pump, configure
from mmprep_frontend.tensors import TensorLink, Tensors

_log = logging.getLogger("mmprep.dispatch")

_BULK_OUTBOX = 256 << 20


@dataclass(frozen=True, slots=True)
class OfferItem:
    """One medium of a request, as the writer must know it.

    Attributes
    ----------
    key: of the item, 32 bytes.
    medium: the encoded bytes.
    digest: of them, 32 bytes.
    options: packed ItemOptions for the lane.
    cost: estimated pixels.
    """

    key: bytes
    modality: str
    medium: bytes | memoryview
    digest: bytes
    options: bytes
    cost: int


class Offered:
    """An offer's answer; a context manager that lets go of what it pinned.

    Attributes
    ----------
    items: one answer an item, in the offer's order.
    mapping: the ring, in which the places of this answer lie that are not in a spill.
    tensors: of the items, until :meth:`release`.
    lease_ms: how long granted leases hold.
    """

    def __init__(
        self,
        items: list[messages.ItemAnswer],
        lease_ms: int,
        mapping: Mapping,
        tensors: Tensors,
        unpin: Callable[[], None] | None,
    ) -> None:
        self.items = items
        self.lease_ms = lease_ms
        self.mapping = mapping
        self.tensors = tensors
        self._unpin = unpin

    def release(self) -> None:
        """Let go; again is no error."""
        self.tensors.close()
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class _WriterLostError(ServiceUnavailable):
    """The writer went away while a call was under way."""


class WriterLink:
    """One frontend's connection to the writer, on the running loop.

    Parameters
    ----------
    index:
        The frontend's number; its process lock proves to the writer that it lives.
    hasher:
        Name of the content hash.
    inline_size:
        Bytes of tensors that may travel inline.
    on_card:
        Called with the model card when the lanes are warm, after every (re)connection.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        runtime: RuntimeDir,
        index: int,
        *,
        hasher: Any,
        inline_size: int,
        on_card: Callable[[ModelCard], None],
    ) -> None:
        self._id = str(index)
        self._hasher = hasher
        self._on_card = on_card
        self._calls = CallTable()
        self._offers: dict[int, Sequence[OfferItem]] = {}
        self._up = asyncio.Event()
        self._mapping: Mapping | None = None
        self._lock = ProcessLock(runtime.lock_path("frontend", self._id))
        if not self._lock.acquire():
            raise ServiceUnavailable("another frontend process has this number")
        bulk = context.socket(zmq.PUSH)
        configure(bulk)
        bulk.sndhwm = 16
        bulk.connect(runtime.writer_bulk)
        self._bulk = Pump(bulk, lambda _: None, outbox_bytes=_BULK_OUTBOX, copy=False)
        self._tensors = TensorLink(context, runtime, self._id, largest=inline_size)
        self._link = Link(
            context,
            runtime.writer,
            f"frontend:{self._id}",
            greeting=self._greeting,
            on_message=self._on_message,
            on_down=self._on_down,
        )

    @property
    def connected(self) -> bool:
        """Whether the writer has welcomed this frontend."""
        return self._up.is_set()

    def close(self) -> None:
        """Disconnect; calls under way fail."""
        self._link.close()
        self._bulk.close()
        self._tensors.close()
        if self._mapping is not None:
            self._mapping.segment.close()
        self._lock.remove()

    # --- calls ----------------------------------------------------------------------------------------------------

    async def offer(
        self,
        items: Sequence[OfferItem],
        *,
        need: messages.Need,
        deadline: float,
        priority: int,
        lease: messages.LeaseTo | None = None,
    ) -> Offered:
        """Get a request's items from the cache, computing what is missing.

        Parameters
        ----------
        items:
            At least one.
        need:
            ``"plan"``: only plans; nothing is computed or evicted for tensors.
        deadline:
            By the loop's clock.
        priority:
            Lower is more urgent.
        lease:
            Where the places are to be leased to a backend; else they are pinned until the answer is released.

        Raises
        ------
        MmprepError
            The whole offer failed. A single item's failure is in its answer.
        """
        loop = asyncio.get_running_loop()
        while True:
            left = deadline - loop.time()
            try:
                async with asyncio.timeout(max(0.0, left)):
                    await self._up.wait()
                    return await self._offer_once(items, need, max(1, int(left * 1000)), priority, lease)
            except TimeoutError:
                raise DeadlineExceeded("the request's time was over before its media were processed") from None
            except _WriterLostError:
                continue

    async def _offer_once(
        self,
        items: Sequence[OfferItem],
        need: messages.Need,
        deadline_ms: int,
        priority: int,
        lease: messages.LeaseTo | None,
    ) -> Offered:
        mapping = self._mapping
        assert mapping is not None
        number, future = self._calls.open()
        offered = tuple(messages.Offered(i.key, i.modality, i.cost, len(i.medium)) for i in items)
        self._offers[number] = items
        try:
            self._link.send([pack(messages.Offer(number, need, deadline_ms, priority, offered, lease))])
            answer, answers = await future
            fetched = await self._fetch(answer, answers)
        except BaseException:
            if self._up.is_set():
                self._link.send([pack(messages.Cancel(number))])
            raise
        finally:
            self._calls.forget(number)
            del self._offers[number]
        pinned = lease is None and need == "tensors"
        unpin = (lambda: self._link.send([pack(messages.Unpin(number))])) if pinned else None
        return Offered(answers, answer.lease_ms, mapping, Tensors(mapping, fetched), unpin)

    async def _fetch(self, answer: messages.Answer, answers: list[messages.ItemAnswer]) -> dict[int, memoryview]:
        """Get the tensors that found no shared memory, and let the writer forget them where nothing else is held."""
        if any(item.fault is not None for item in answers):
            return {}  # the writer keeps nothing for a call that has failed
        try:
            fetched = await self._tensors.fetch(answers)
        except BaseException as error:
            self._give_back(answer, answers)
            if isinstance(error, ServiceUnavailable | StaleAddress):  # they went with their writer
                raise _WriterLostError("the writer went away; try again") from None
            raise
        if fetched and answer.leased_to is not None:
            self._link.send([pack(messages.Unpin(answer.call))])
        return fetched

    def release_soon(self, backend: str, leases: tuple[bytes, ...]) -> None:
        """End leases in the name of a backend, without waiting for the answer."""
        self._link.send([pack(messages.Release(0, leases, backend))])

    async def release(self, backend: str, leases: tuple[bytes, ...]) -> None:
        """End leases in the name of a backend."""
        await self._call(lambda number: messages.Release(number, leases, backend))

    async def renew(self, backend: str, leases: tuple[bytes, ...]) -> messages.Renewed:
        """Prolong leases in the name of a backend."""
        renewed: messages.Renewed = await self._call(lambda number: messages.Renew(number, leases, backend))
        return renewed

    async def _call(self, make: Callable[[int], msgspec.Struct]) -> Any:
        number, future = self._calls.open()
        try:
            self._link.send([pack(make(number))])
            async with asyncio.timeout(10.0):
                return await future
        except TimeoutError:
            raise ServiceUnavailable("the writer did not answer") from None
        finally:
            self._calls.forget(number)

    # --- messages -------------------------------------------------------------------------------------------------

    def _greeting(self) -> list[bytes]:
        return [pack(messages.Hello(PROTOCOL, mmprep.__version__, "frontend", self._id, os.getpid()))]

    def _on_down(self) -> None:
        self._up.clear()
        if self._mapping is not None:
            self._mapping.segment.close()  # the next writer may need the memory; answers under way keep their views
            self._mapping = None
        self._calls.fail_all(_WriterLostError, "the writer went away; try again")

    def _on_message(self, frames: list[Any]) -> None:
        message = unpack(frames[0], messages.FromWriter)
        match message:
            case messages.Answer():
                self._answered(message, frames[1:])
            case messages.Wants():
                self._put(message)
            case messages.Failed():
                self._calls.resolve(message.call, message.fault.error())
            case messages.Done() | messages.Renewed():
                self._calls.resolve(message.call, message)
            case messages.Refused():
                _log.error("the writer refuses this frontend: %s", message.fault.message)
                self._calls.fail_all(ServiceUnavailable, "the preprocessing worker refuses this frontend")
            case messages.WriterWelcome():
                self._welcomed(message)
            case messages.Card():
                self._on_card(msgspec.msgpack.decode(message.card, type=ModelCard))
            case _:
                pass

    def _answered(self, answer: messages.Answer, frames: list[bytes]) -> None:
        items = self._offers.get(answer.call)
        try:
            answers: list[messages.ItemAnswer] = [unpack(frame, messages.ItemAnswer) for frame in frames]
            if items is None:
                self._give_back(answer, answers)
                return
            if len(answers) != len(items):
                raise ProtocolError("the writer answered for another number of items")
        except MmprepError as error:
            self._calls.resolve(answer.call, error)
            return
        self._calls.resolve(answer.call, (answer, answers))

    def _give_back(self, answer: messages.Answer, answers: list[messages.ItemAnswer]) -> None:
        """Let go of an answer whose call was cancelled while it was on its way."""
        if answer.leased_to is None or any(item.inline for item in answers):
            self._link.send([pack(messages.Unpin(answer.call))])
        if answer.leased_to is None:
            return
        self.release_soon(answer.leased_to, tuple(item.lease for item in answers if item.lease is not None))

    def _put(self, wants: messages.Wants) -> None:
        items = self._offers.get(wants.call)
        if items is None:
            return
        for want in wants.wants:
            item = items[want.index]
            header = messages.Put(self._id, want.flight, self._hasher, item.digest, item.options)
            try:
                self._bulk.send([pack(header), item.medium])
            except MmprepError as error:
                self._calls.resolve(wants.call, error)

    def _welcomed(self, welcome: messages.WriterWelcome) -> None:
        if self._mapping is None:
            self._mapping = Mapping(welcome.segment)
        self._up.set()
        if welcome.card:
            self._on_card(msgspec.msgpack.decode(welcome.card, type=ModelCard))
