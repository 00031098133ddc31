"""The native door: requests of clients over ZeroMQ, on a socket of this frontend's own in the runtime directory.

A request is JSON, its media may be further frames; a chat's answer is a packed head and, where tensors travel inline, one
frame an item.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

import mmprep
from mmprep.errors import InternalError, MmprepError, ProtocolError, ServiceUnavailable
from mmprep.logs import event
from mmprep.result import Head, HeadItem, Place, ids_to_bytes
from mmprep.wire import messages
from mmprep.wire.codec import MAX_FRAMES, PROTOCOL, pack, unpack
from mmprep.wire.configured import router
from mmprep.wire.messages import LeaseKind
from mmprep.wire.sockets import Pump
from mmprep_frontend.caller import ANONYMOUS
from mmprep_frontend.injection.service import Injecting
from mmprep_frontend.posting import once, post, request_of
from mmprep_frontend.render.answer import CHAT_PREFIX, COMPLETION_PREFIX, new_request_id
from mmprep_frontend.rendered import RenderedChat, RenderedItem
from mmprep_frontend.resets import Resets
from mmprep_frontend.room import Held, Room
from mmprep_frontend.service import Service
from mmprep_frontend.texts import Texts
from mmprep_frontend.tracing.context import read_parent
from mmprep_frontend.tracing.spans import Exporter, tracing

_log = logging.getLogger("mmprep.native")
_requests = logging.getLogger("mmprep.requests")

_OUTBOX_BYTES = 1 << 30
#: Bytes of tensors from which on they are copied off the loop.
_LARGE_COPY = 1 << 20
#: Bytes of JSON that count as held until the client has read them; smaller answers are copied into ZeroMQ's queue.
_TRACKED = 64 * 1024
#: Clients that may wait for their welcome; more have to come again.
_MOST_WAITING = 4096


class NativeDoor:
    """Serves clients of one socket.

    A client is welcomed once requests are taken, and turns to other frontends until then: one that has just been started
    again would else be the one with the fewest calls, and refuse them all.

    Parameters
    ----------
    endpoint:
        Where to bind; the caller owns the path.
    service, texts:
        What answers: chats, and what has no media.
    resets, injecting:
        What answers the operator.
    max_body_size:
        Of one frame of a request, in bytes.
    room:
        Bounds the requests under way, together with the other doors.
    refusal:
        Returns why the service takes no requests, or ``None``.
    exporter:
        Of traces; ``None``: requests are not traced.
    job_expiry:
        Seconds in which a queued job must be taken.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        service: Service,
        texts: Texts,
        *,
        resets: Resets,
        injecting: Injecting,
        max_body_size: int,
        room: Room,
        refusal: Callable[[], str | None],
        exporter: Exporter | None = None,
        job_expiry: float = 300.0,
    ) -> None:
        self._exporter = exporter
        self._service = service
        self._job_expiry = job_expiry
        self._texts = texts
        self._resets = resets
        self._injecting = injecting
        self._room = room
        self._max_frame = max_body_size
        self._refusal = refusal
        self._tasks: dict[tuple[bytes, int], asyncio.Task[None]] = {}
        self._open = False
        self._waiting: list[bytes] = []
        self._pump = Pump(
            router(context, endpoint, frame_limit=max_body_size),
            self._on_message,
            outbox_bytes=_OUTBOX_BYTES,
            copy=False,
        )

    def open(self) -> None:
        """Requests are taken from now on."""
        self._open = True
        for peer in self._waiting:
            self._welcome(peer)
        self._waiting.clear()

    async def close(self, seconds: float) -> None:
        """Let what is under way end, for at most ``seconds``, then close."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=seconds)
        for task in list(self._tasks.values()):
            task.cancel()
        self._pump.close()

    # --- in -------------------------------------------------------------------------------------------------------

    def _on_message(self, frames: list[zmq.Frame]) -> None:
        peer = frames[0].bytes
        try:
            if not 2 <= len(frames) <= MAX_FRAMES:
                raise ProtocolError(f"a message has a header and at most {MAX_FRAMES - 2} frames behind it")
            message = unpack(frames[1].buffer, messages.ToFrontend)
            match message:
                case messages.Hello():
                    self._hello(peer, message)
                case messages.Request():
                    self._start(peer, message, [frame.buffer for frame in frames[2:]])
                case messages.Cancel():
                    task = self._tasks.get((peer, message.call))
                    if task is not None:
                        task.cancel()
        except ProtocolError as error:
            self._service.metrics.count("mmprep_refused_total", link="native", error="ProtocolError")
            self._send(peer, messages.Refused(messages.Fault.of(error)))

    def _hello(self, peer: bytes, hello: messages.Hello) -> None:
        if hello.protocol != PROTOCOL:
            raise ProtocolError(
                f"this service speaks protocol {PROTOCOL}, the client {hello.protocol}; use one version"
            )
        if self._open:
            self._welcome(peer)
        elif len(self._waiting) < _MOST_WAITING:
            self._waiting.append(peer)
        else:
            raise ProtocolError("too many clients wait for this service to start; connect again later")

    def _welcome(self, peer: bytes) -> None:
        self._send(peer, messages.FrontendWelcome(PROTOCOL, mmprep.__version__, self._max_frame))

    def _start(self, peer: bytes, request: messages.Request, frames: list[memoryview]) -> None:
        if not frames or (peer, request.call) in self._tasks:
            raise ProtocolError("a request without a body, or with the number of another one")
        try:
            held = self._room.enter()
        except MmprepError as error:
            self._failed(peer, request, error)
            return
        task = asyncio.create_task(self._serve(peer, request, frames, held))
        self._tasks[peer, request.call] = task
        task.add_done_callback(lambda _: self._done(peer, request.call, held))

    def _done(self, peer: bytes, call: int, held: Held) -> None:
        self._tasks.pop((peer, call), None)
        held.leave()

    # --- out ------------------------------------------------------------------------------------------------------

    async def _serve(self, peer: bytes, request: messages.Request, frames: list[memoryview], held: Held) -> None:
        service = self._service
        started = time.monotonic()
        outcome = "ok"
        service.inflight += 1
        try:
            reason = self._refusal()
            if reason is not None:
                raise ServiceUnavailable(reason, retry_after=1.0)
            held.hold_body(sum(map(len, frames)))
            with self._tracing(request):
                await self._operations[request.operation](self, peer, request, held, frames[0], frames[1:])
        except MmprepError as failure:
            outcome = failure.type
            self._send(peer, messages.Failed(request.call, messages.Fault.of(failure)))
        except asyncio.CancelledError:
            outcome = "cancelled"
        except Exception:  # noqa: BLE001 -- whatever breaks one request must not end the door
            outcome = "InternalServerError"
            _log.exception("a native request failed")
            fault = messages.Fault.of(InternalError("the request failed in the service; its log says why"))
            self._send(peer, messages.Failed(request.call, fault))
        finally:
            service.inflight -= 1
            path = f"native/{request.operation}"
            service.metrics.count("mmprep_requests_total", path=path, outcome=outcome)
            seconds = time.monotonic() - started
            service.metrics.observe("mmprep_request_seconds", seconds, path=path)
            event(_requests, logging.INFO, "request", path=path, outcome=outcome, ms=round(seconds * 1000, 3))

    def _tracing(self, request: messages.Request) -> contextlib.AbstractContextManager[None]:
        if self._exporter is None:
            return contextlib.nullcontext()
        parent = read_parent(_headers(request.traceparent), _headers(request.tracestate))
        about = {"rpc.system": "mmprep", "rpc.method": request.operation}
        return tracing(self._exporter, parent, f"native {request.operation}", about)

    def _failed(self, peer: bytes, request: messages.Request, error: MmprepError) -> None:
        """Answer a request that is not let in."""
        self._send(peer, messages.Failed(request.call, messages.Fault.of(error)))
        self._service.metrics.count("mmprep_requests_total", path=f"native/{request.operation}", outcome=error.type)

    async def _chat(
        self, peer: bytes, request: messages.Request, held: Held, body: memoryview, attachments: list[memoryview]
    ) -> None:
        chat = await self._service.chat(body, attachments)
        if chat.request.queue is not None:
            await self._post(chat, peer, request, [body, *attachments], CHAT_PREFIX)
            return
        try:
            nbytes = chat.inline_bytes()
            held.hold_answer(nbytes)
            regions: list[NDArray[np.uint8]] = []
            with self._service.timed("serialize"):
                if nbytes > _LARGE_COPY:
                    regions = await self._service.on_thread(_kept_regions, chat)
                elif nbytes:
                    regions = _kept_regions(chat)
                head = self._head(chat)
            delivered = self._send(peer, messages.Rendered(request.call), head, *_tracked(held, regions))
        except BaseException:
            chat.give_back()
            raise
        if delivered:
            chat.release()
        else:
            chat.give_back()

    async def _post(
        self, chat: RenderedChat, peer: bytes, request: messages.Request, body: Sequence[memoryview], prefix: str
    ) -> None:
        """Post a chat to its queue. Each client takes turns of its own, and its keys are its own."""
        sender = peer.decode("latin-1").rpartition(":")[0]
        try:
            same = await once(self._service, sender, request.once, body)
        except BaseException:
            chat.give_back()
            raise
        posted = await post(self._service, chat, prefix=prefix, sender=sender, same=same, expiry=self._job_expiry)
        self._send(peer, messages.Response(request.call), posted)

    def _head(self, chat: RenderedChat) -> bytes:
        model = self._service.served()
        frames = 0
        items = []
        for item, placed in zip(chat.in_order(), chat.expanded.ranges, strict=True):
            travels = chat.travels(item)
            frames += travels
            frame = frames if travels else -1
            items.append(_head_item(item, placed.offset, placed.length, frame, chat.request.lease_kind or "copy"))
        if chat.request.payload == "tensors" and chat.offered is not None:
            chat.offered.check()
        mapping = chat.offered.mapping if chat.offered is not None else None
        head = Head(
            request=request_of(chat, model, new_request_id(CHAT_PREFIX)),
            token_ids=ids_to_bytes(chat.expanded.token_ids),
            unexpanded_token_ids=ids_to_bytes(chat.prompt.token_ids),
            items=tuple(items),
            lease_ms=chat.offered.lease_ms if chat.offered is not None else 0,
            segment=mapping.name if mapping is not None else "",
            epoch=bytes.fromhex(mapping.epoch) if mapping is not None else bytes(16),
        )
        return head.pack()

    async def _completions(
        self, peer: bytes, request: messages.Request, held: Held, body: memoryview, _: list[memoryview]
    ) -> None:
        completions = await self._texts.completions(body)
        if completions.request.queue is not None:
            job = completions.job(self._service.served().max_model_len)
            await self._post(job, peer, request, [body], COMPLETION_PREFIX)
            return
        self._json(peer, request.call, held, await self._texts.answer(completions, new_request_id(COMPLETION_PREFIX)))

    async def _tokenize(
        self, peer: bytes, request: messages.Request, held: Held, body: memoryview, attachments: list[memoryview]
    ) -> None:
        self._json(peer, request.call, held, await self._texts.tokenize(body, attachments))

    async def _detokenize(
        self, peer: bytes, request: messages.Request, held: Held, body: memoryview, _: list[memoryview]
    ) -> None:
        self._json(peer, request.call, held, await self._texts.detokenize(body))

    async def _inject(
        self, peer: bytes, request: messages.Request, held: Held, body: memoryview, _: list[memoryview]
    ) -> None:
        self._json(peer, request.call, held, await self._injecting.inject(body, principal=ANONYMOUS, held=held))

    async def _reset_mm_cache(self, peer: bytes, request: messages.Request, held: Held, *_: object) -> None:
        self._json(peer, request.call, held, await self._resets.mm_cache())

    async def _reset_media_cache(self, peer: bytes, request: messages.Request, held: Held, *_: object) -> None:
        self._json(peer, request.call, held, await self._resets.media_cache())

    def _json(self, peer: bytes, call: int, held: Held, encoded: bytes) -> None:
        held.hold_answer(len(encoded))
        if len(encoded) < _TRACKED:
            self._send(peer, messages.Response(call), encoded)
        else:
            self._send(peer, messages.Response(call), *_tracked(held, [np.frombuffer(encoded, np.uint8)]))

    def _send(self, peer: bytes, message: msgspec.Struct, *frames: Any) -> bool:
        """Send, and return whether there is somebody to send to."""
        try:
            self._pump.send([peer, pack(message), *frames])
        except (zmq.ZMQError, MmprepError):
            _log.debug("an answer could not be delivered: the client is gone or does not read")
            return False
        return True

    _operations: ClassVar[dict[str, Callable[..., Awaitable[None]]]] = {
        "chat": _chat,
        "completions": _completions,
        "tokenize": _tokenize,
        "detokenize": _detokenize,
        "inject": _inject,
        "reset_mm_cache": _reset_mm_cache,
        "reset_media_cache": _reset_media_cache,
    }


def _headers(value: str | None) -> tuple[str, ...]:
    return () if value is None else (value,)


def _kept_regions(chat: RenderedChat) -> list[NDArray[np.uint8]]:
    """Return the tensors that travel, in order, as memory that outlives the pins."""
    return [np.frombuffer(chat.kept_region(item), np.uint8) for item in filter(chat.travels, chat.in_order())]


def _tracked(held: Held, arrays: list[NDArray[np.uint8]]) -> list[zmq.Frame]:
    """Return frames over arrays, whose bytes count as held until ZeroMQ has passed them on, or dropped them."""
    loop = asyncio.get_running_loop()
    frames = []
    for array in arrays:
        # The frame keeps the array, and is not copied; pyzmq lets go of it on a thread of its own.
        weakref.finalize(array, _soon, loop, held.hand_over(array.nbytes)).atexit = False
        frames.append(zmq.Frame(array, copy=False))
    return frames


def _soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(callback)


def _head_item(item: RenderedItem, offset: int, length: int, frame: int, lease_kind: LeaseKind) -> HeadItem:
    answer = item.answer
    place = None
    if answer.lease is not None:
        place = Place(
            answer.slot, answer.offset, answer.length, answer.generation, answer.lease, lease_kind, answer.spill
        )
    return HeadItem(
        modality=item.part.modality,
        hash=item.key,
        offset=offset,
        length=length,
        cached=answer.outcome == "hit",
        meta=answer.meta,
        place=place,
        frame=frame,
    )
