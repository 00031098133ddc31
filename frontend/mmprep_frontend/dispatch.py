"""The frontend's link to the writer: offers keys, sends wanted media, receives the one answer.

:mod:`mmprep_frontend.offers` is the state machine; here are the sockets, the segment and the futures around it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

import mmprep
from mmprep import failpoints
from mmprep.card import ModelCard
from mmprep.errors import DeadlineExceeded, MmprepError, NotFound, ServiceUnavailable
from mmprep.holdings import Life
from mmprep.process_lock import ProcessLock, holder
from mmprep.registration import Mapping
from mmprep.runtime import RuntimeDir
from mmprep.wire import messages
from mmprep.wire.calls import CallTable, WriterLostError, succeeded
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.configured import configure
from mmprep.wire.frames import Frames
from mmprep.wire.sockets import Link, Pump
from mmprep_frontend.offered import Offered, Wanted
from mmprep_frontend.offers import MOST_RESENDS, Action, Offers, Put, Say, Settle, Terms
from mmprep_frontend.post_link import PostLink
from mmprep_frontend.tensors import TensorLink, TensorsLostError

_log = logging.getLogger("mmprep.dispatch")

_BULK_OUTBOX = 256 << 20
#: Seconds for a word about leases, the writer's replacement included.
_CALL_SECONDS = 10.0
#: Numbers of these calls are above those of offers, which have the same connection.
_FIRST_CALL = 1 << 47
_REFUSED = "the preprocessing worker has refused a message of this frontend"
#: Seconds until a writer that does not know a living backend is asked again.
_REGISTERS_SECONDS = 0.02


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
    queue_size:
        Bytes of posted jobs that are kept until they have ended.
    on_card:
        Called with the model card when the lanes are warm, after every (re)connection.

    Attributes
    ----------
    mapping: the ring's segment, ``None`` before the first welcome.
    warm: the present writer's lanes can work: it has sent its card.
    cold: why they do not get warm, if it has said so.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        runtime: RuntimeDir,
        index: int,
        *,
        hasher: Any,
        inline_size: int,
        queue_size: int,
        on_card: Callable[[ModelCard], None],
    ) -> None:
        self.mapping: Mapping | None = None
        self.warm = False
        self.cold: str | None = None
        self._id = str(index)
        self._instance = os.urandom(8)
        self._connections = 0
        self._runtime = runtime
        self._hasher = hasher
        self._on_card = on_card
        self._offers = Offers()
        #: Its jobs for queues.
        self.jobs = PostLink(self._send, self._offers, queue_size)
        self._waiting: dict[int, tuple[Sequence[Wanted], asyncio.Future[Offered]]] = {}
        self._calls = CallTable(first=_FIRST_CALL)
        self._back = asyncio.Event()
        self._lock = ProcessLock(runtime.lock_path("frontend", self._id))
        if not self._lock.acquire():
            raise ServiceUnavailable("another frontend process has this number")
        self._lock.note(self._instance)
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

    def close(self) -> None:
        """Disconnect; calls under way fail."""
        self._link.close()
        self._bulk.close()
        self._tensors.close()
        self._carry_out(self._offers.fail_all(ServiceUnavailable("the service is stopping")))
        self.jobs.close(ServiceUnavailable("the service is stopping"))
        self._calls.fail_all(ServiceUnavailable, "the service is stopping")
        if self.mapping is not None:
            self.mapping.segment.close()
        self._lock.remove()

    # --- calls ----------------------------------------------------------------------------------------------------

    async def offer(
        self,
        items: Sequence[Wanted],
        *,
        need: messages.Need,
        deadline: float,
        priority: int,
        lease: messages.LeaseTo | None = None,
        traced: bool = False,
    ) -> Offered:
        """Get a request's items from the cache, computing what is missing.

        Parameters
        ----------
        items:
            At least one; recalled are those whose media are not at hand.
        need:
            ``"plan"``: only plans; nothing is computed or evicted for tensors.
        deadline:
            By the loop's clock.
        priority:
            Lower is more urgent.
        lease:
            Where the places are to be leased to a backend; else they are pinned until the answer is released. A new
            writer may hear of the offer before it hears of the backend: one whose process lives is waited for.
        traced:
            The answers are to say when what they are about was computed.

        Raises
        ------
        MmprepError
            The whole offer failed. A single item's failure is in its answer.
        """
        loop = asyncio.get_running_loop()
        offered = tuple(item if isinstance(item, messages.Recalled) else item.offered() for item in items)
        terms = Terms(offered, need, priority, lease, deadline, traced)
        resends_left = MOST_RESENDS
        while True:
            try:
                return await self._offer_once(items, terms)
            except TensorsLostError:
                if not resends_left:
                    raise
                resends_left -= 1
            except NotFound:
                if lease is None or holder(self._runtime.lock_path("backend", lease.backend)) is None:
                    raise
                # It lives, and this writer is too young to know it.
                await asyncio.sleep(min(_REGISTERS_SECONDS, max(0.0, deadline - loop.time())))

    async def _offer_once(self, items: Sequence[Wanted], terms: Terms) -> Offered:
        try:
            async with asyncio.timeout_at(terms.deadline):
                offered = await self._answer(items, terms)
                try:
                    await offered.fetch(self._tensors)
                except BaseException:
                    offered.give_back()
                    raise
                return offered
        except TimeoutError:
            raise DeadlineExceeded("the request's time was over before its media were processed") from None

    async def _answer(self, items: Sequence[Wanted], terms: Terms) -> Offered:
        loop = asyncio.get_running_loop()
        token, actions = self._offers.offer(terms, loop.time())
        future: asyncio.Future[Offered] = loop.create_future()
        self._waiting[token] = items, future
        try:
            self._carry_out(actions)
            failpoints.reach("frontend.offer.sent")
            return await future
        except BaseException:
            if succeeded(future):
                future.result().give_back()
            self._carry_out(self._offers.cancel(token))
            raise
        finally:
            del self._waiting[token]

    def unpin(self, token: int) -> None:
        """Let go of what an offer's answer pinned."""
        self._carry_out(self._offers.release(token))

    def release_soon(self, backend: str, leases: tuple[bytes, ...]) -> None:
        """End leases that a backend has not taken up, without waiting for it."""
        self._carry_out(self._offers.give_back(backend, leases))

    async def release(self, backend: str, leases: tuple[bytes, ...]) -> None:
        """End leases that a backend has not taken up; it is being asked when this returns."""
        await self._call(lambda number: messages.Release(number, leases, backend))

    async def renew(self, backend: str, leases: tuple[bytes, ...]) -> messages.Renewed:
        """Prolong leases in the name of a backend."""
        renewed: messages.Renewed = await self._call(lambda number: messages.Renew(number, leases, backend))
        return renewed

    async def clear(self) -> messages.Cleared:
        """Drop every entry of the cache; what somebody holds goes when it is let go."""
        cleared: messages.Cleared = await self._call(messages.Clear)
        return cleared

    async def _call(self, make: Callable[[int], msgspec.Struct]) -> Any:
        """Ask the writer, and its successor where it goes away before it answers: every call may be made twice."""
        return await self._calls.ask(
            lambda number: self._link.send([pack(make(number))]),
            self._connected,
            seconds=_CALL_SECONDS,
            silence="the writer did not answer",
        )

    async def _connected(self) -> None:
        while not self._offers.up:
            self._back.clear()
            await self._back.wait()

    # --- messages -------------------------------------------------------------------------------------------------

    def _greeting(self) -> list[bytes]:
        self._connections += 1
        return [
            pack(
                messages.Hello(
                    PROTOCOL, mmprep.__version__, "frontend", self._id, os.getpid(), self._instance, self._connections
                )
            )
        ]

    def _on_down(self) -> None:
        self.warm, self.cold = False, None
        self._offers.down()
        self.jobs.down()
        self._calls.fail_all(WriterLostError, "the writer went away; try again")

    def _on_message(self, frames: list[Any]) -> None:
        message = unpack(frames[0], messages.FromWriter)
        match message:
            case messages.Answer():
                self._answered(message, frames[1:])
            case messages.Wants():
                failpoints.reach("frontend.wants.received")
                self._carry_out(self._offers.wanted(message))
            case messages.Failed():
                self._failed(message.call, message.fault.error())
            case messages.Done() | messages.Renewed() | messages.Cleared():
                self._calls.resolve(message.call, message)
                self._offers.heard(message.call)
            case messages.Posted() | messages.Unlike() | messages.Finished():
                self.jobs.heard(message)
            case messages.Refused():
                self._refused(message)
            case messages.WriterWelcome():
                self._welcomed(message)
            case messages.Card():
                self._got_card(message.card)
            case messages.NotWarm():
                self.cold = message.why

    def _failed(self, call: int, error: MmprepError) -> None:
        self._calls.resolve(call, error)
        self._carry_out(self._offers.failed(call, error))
        self.jobs.failed(call, error)

    def _answered(self, answer: messages.Answer, frames: list[bytes]) -> None:
        failpoints.reach("frontend.answer.received")
        try:
            items: list[messages.ItemAnswer] = [unpack(frame, messages.ItemAnswer) for frame in frames]
        except MmprepError as error:
            self._carry_out(self._offers.failed(answer.call, error))
            return
        self._carry_out(self._offers.answered(answer, items))

    def _refused(self, refused: messages.Refused) -> None:
        """The writer has ended this connection over something that it could not take: go on with another one.

        What is under way fails: it may be what the writer does not take.
        """
        _log.error("the writer has refused a message of this frontend: %s", refused.fault.message)
        self._carry_out(self._offers.fail_all(ServiceUnavailable(_REFUSED)))
        self.jobs.refused(ServiceUnavailable(_REFUSED))
        self._calls.fail_all(ServiceUnavailable, _REFUSED)
        self._link.reopen()

    def _welcomed(self, welcome: messages.WriterWelcome) -> None:
        life = Life(welcome.segment.epoch.hex(), welcome.incarnation)
        if self.mapping is None or self.mapping.epoch != life.epoch:
            try:
                self.mapping = Mapping(welcome.segment)  # answers under way keep theirs
            except (MmprepError, ValueError, OSError) as error:
                _log.error("the segment cannot be mapped; trying again: %s", error)
                self._link.reopen()
                return
        self._calls.fail_all(WriterLostError, "the writer has begun anew; try again")
        # Before the word that this was all: what the jobs hold is pinned before anything is granted.
        self.jobs.welcomed()
        self._carry_out(self._offers.welcomed(life, asyncio.get_running_loop().time()))
        self._back.set()
        if welcome.card:
            self._got_card(welcome.card)

    def _got_card(self, packed: bytes) -> None:
        self.warm, self.cold = True, None
        self._on_card(msgspec.msgpack.decode(packed, type=ModelCard))

    def _send(self, frames: Frames) -> None:
        self._link.send(frames)

    # --- actions --------------------------------------------------------------------------------------------------

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Say():
                    self._link.send([pack(action.message)])
                case Put():
                    self._put(action)
                case Settle():
                    self._settle(action)

    def _put(self, put: Put) -> None:
        waiting = self._waiting.get(put.token)
        if waiting is None:
            return
        item = waiting[0][put.position]
        assert not isinstance(item, messages.Recalled), "the bytes of a recalled item are put"
        header = messages.Put(self._id, put.flight, self._hasher, item.digest, item.options)
        try:
            self._bulk.send([pack(header), item.medium])
            failpoints.reach("frontend.put.sent")
        except MmprepError as error:
            self._settle(Settle(put.token, error))

    def _settle(self, settle: Settle) -> None:
        _, future = self._waiting.get(settle.token, (None, None))
        if future is None:
            return
        if isinstance(settle.outcome, MmprepError):
            if not future.done():
                future.set_exception(settle.outcome)
            return
        # Now, because the answer's places lie in the segment of this moment.
        offered = Offered(self, settle.token, *settle.outcome)
        if future.done():  # whoever waited was cancelled in this moment, and has not run since
            offered.give_back()
        else:
            future.set_result(offered)
