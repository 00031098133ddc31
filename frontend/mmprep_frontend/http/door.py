"""What stands behind the HTTP routes: the service, with bodies in and encoded answers out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

import msgspec

from mmprep.errors import MmprepError
from mmprep.logs import event
from mmprep.metrics import BUCKETS, Labels, Snapshot
from mmprep.wire.messages import Name
from mmprep_frontend.caller import Caller
from mmprep_frontend.http.answers import one_key
from mmprep_frontend.http.chat_answer import encode_chat_answer
from mmprep_frontend.http.exposition import METRICS, HistogramData, Numbers, Series, expose
from mmprep_frontend.http.pinned import Pinned
from mmprep_frontend.http.ports import Rendered
from mmprep_frontend.injection.service import Injecting
from mmprep_frontend.posting import once, post
from mmprep_frontend.render.answer import CHAT_PREFIX, COMPLETION_PREFIX, RESPONSE_PREFIX
from mmprep_frontend.render.encodings import JSON
from mmprep_frontend.render.schema import Schema
from mmprep_frontend.rendered import RenderedChat
from mmprep_frontend.resets import Resets
from mmprep_frontend.service import Form, Service
from mmprep_frontend.texts import Texts

_log = logging.getLogger("mmprep.requests")
T = TypeVar("T")


class LeaseRequest(msgspec.Struct):
    """What ``/leases/renew`` and ``/leases/release`` take."""

    backend_id: Name
    leases: Annotated[list[Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]], msgspec.Meta(max_length=1024)]


_LEASE_REQUEST = Schema(LeaseRequest)
#: What a queued job's id begins with.
_JOB_PREFIX: dict[Form, str] = {"chat": CHAT_PREFIX, "messages": CHAT_PREFIX, "responses": RESPONSE_PREFIX}


class HttpDoor:
    """Implements :class:`mmprep_frontend.http.ports.Service`.

    Parameters
    ----------
    service, texts:
        What answers: chats, and what has no media.
    resets, injecting:
        What answers the operator.
    not_ready:
        Returns why the service is not ready, or ``None``.
    refusal:
        Returns why the service takes no requests, or ``None``.
    collect:
        Returns the whole service's metrics.
    status:
        Returns its status, as JSON.
    job_expiry:
        Seconds in which a queued job must be taken.
    """

    def __init__(
        self,
        service: Service,
        texts: Texts,
        *,
        resets: Resets,
        injecting: Injecting,
        not_ready: Callable[[], str | None],
        refusal: Callable[[], str | None],
        collect: Callable[[], Awaitable[Snapshot]],
        status: Callable[[], Awaitable[bytes]],
        job_expiry: float = 300.0,
    ) -> None:
        self._service = service
        self._texts = texts
        self._resets = resets
        self._injecting = injecting
        self._not_ready = not_ready
        self._refusal = refusal
        self._collect = collect
        self._status = status
        self._job_expiry = job_expiry
        self._started = int(time.time())

    async def render_chat(self, body: bytes, caller: Caller) -> Rendered:
        return await self._counted("/v1/chat/completions/render", self._render_chat(body, caller, "chat"))

    async def render_messages(self, body: bytes, caller: Caller) -> Rendered:
        return await self._counted("/v1/messages/render", self._render_chat(body, caller, "messages"))

    async def render_responses(self, body: bytes, caller: Caller) -> Rendered:
        return await self._counted("/v1/responses/render", self._render_chat(body, caller, "responses"))

    async def render_completions(self, body: bytes, caller: Caller) -> Rendered:
        return await self._counted("/v1/completions/render", self._render_completions(body, caller))

    async def tokenize(self, body: bytes, caller: Caller) -> bytes:
        answer = self._texts.tokenize(body, principal=caller.principal, encoding=caller.encoding)
        return await self._counted("/tokenize", answer)

    async def detokenize(self, body: bytes, caller: Caller) -> bytes:
        return await self._counted("/detokenize", self._texts.detokenize(body, caller.encoding))

    async def renew_leases(self, body: bytes, caller: Caller) -> bytes:
        request = _LEASE_REQUEST.decode(body)
        renewed = await self._service.writer.renew(request.backend_id, _ids(request))
        lost = [lease.hex() for lease in renewed.lost]
        return caller.encoding.encode({"lost": lost, "lease_seconds": renewed.lease_ms // 1000})

    async def release_leases(self, body: bytes, caller: Caller) -> bytes:
        request = _LEASE_REQUEST.decode(body)
        await self._service.writer.release(request.backend_id, _ids(request))
        return caller.encoding.encode({"released": True})

    async def inject(self, body: bytes, caller: Caller) -> bytes:
        work = self._injecting.inject(body, principal=caller.principal, held=caller.held)
        return _encoded(await self._counted("/inject", work), caller)

    async def reset_mm_cache(self, body: bytes, caller: Caller) -> bytes:  # noqa: ARG002, the seam
        return _encoded(await self._counted("/reset_mm_cache", self._resets.mm_cache()), caller)

    async def reset_media_cache(self, body: bytes, caller: Caller) -> bytes:  # noqa: ARG002, the seam
        return _encoded(await self._counted("/reset_media_cache", self._resets.media_cache()), caller)

    async def metrics(self) -> bytes:
        return expose(_numbers(await self._collect()))

    async def status(self) -> bytes:
        return await self._status()

    def models(self) -> dict[str, Any]:
        model = self._service.model
        if model is None:
            return {"object": "list", "data": []}
        entry = {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "mmprep",
            "root": model.name,
            "parent": None,
            "max_model_len": model.max_model_len,
        }
        return {"object": "list", "data": [entry]}

    def ready(self) -> str | None:
        return self._not_ready()

    def refusal(self) -> str | None:
        return self._refusal()

    async def _render_chat(self, body: bytes, caller: Caller, form: Form) -> Rendered:
        chat, held = await self._service.chat(body, form=form, principal=caller.principal), caller.held
        if chat.request.queue is not None:
            return await self._post(chat, body, caller, _JOB_PREFIX[form])
        pinned = Pinned(self._service, chat)
        try:
            work = partial(encode_chat_answer, chat, self._service.served(), caller.request_id, caller.encoding)
            with pinned.timed():
                answer = await self._service.encode(len(chat.expanded.token_ids), work)
            travels = any(map(chat.travels, chat.items))
            rendered = Rendered(answer, chat.lease_return(), kept=pinned if travels else None)
            held.hold_answer(rendered.nbytes)
        except BaseException:
            chat.give_back()
            raise
        if not travels:
            pinned.end()
        return rendered

    async def _render_completions(self, body: bytes, caller: Caller) -> Rendered:
        completions = await self._texts.completions(body)
        if completions.request.queue is not None:
            job = completions.job(self._service.served().max_model_len)
            return await self._post(job, body, caller, COMPLETION_PREFIX)
        return Rendered([await self._texts.answer(completions, caller.request_id, caller.encoding)])

    async def _post(self, chat: RenderedChat, body: bytes, caller: Caller, prefix: str) -> Rendered:
        """Post a chat to its queue; who hangs up has posted it all the same, if it was accepted in this moment."""
        try:
            same = await once(self._service, caller.sender, one_key(caller.keys), [body])
        except BaseException:
            chat.give_back()
            raise
        posted = await post(
            self._service, chat, prefix=prefix, sender=caller.sender, same=same, expiry=self._job_expiry
        )
        return Rendered([_encoded(posted, caller)], status=HTTPStatus.ACCEPTED)

    async def _counted(self, path: str, work: Awaitable[T]) -> T:
        service, started, outcome = self._service, time.monotonic(), "ok"
        service.inflight += 1
        try:
            return await work
        except MmprepError as error:
            outcome = error.type
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception:
            outcome = "InternalServerError"
            raise
        finally:
            service.inflight -= 1
            service.metrics.count("mmprep_requests_total", path=path, outcome=outcome)
            seconds = time.monotonic() - started
            service.metrics.observe("mmprep_request_seconds", seconds, path=path)
            event(_log, logging.INFO, "request", path=path, outcome=outcome, ms=round(seconds * 1000, 3))


def _encoded(answer: bytes, caller: Caller) -> bytes:
    """Return a small answer, which is JSON for native clients, in the encoding that the caller wants."""
    return answer if caller.encoding is JSON else caller.encoding.encode(msgspec.json.decode(answer))


def _ids(request: LeaseRequest) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(lease) for lease in request.leases)


def _numbers(snapshot: Snapshot) -> Numbers:
    """Return a snapshot in the form that the exposition takes."""
    histograms: dict[Series, HistogramData] = {
        _series(name, labels): {"buckets": list(BUCKETS), "counts": histogram.counts, "sum": histogram.sum}
        for name, labels, histogram in snapshot.histograms
    }
    return {
        "counters": {_series(name, labels): value for name, labels, value in snapshot.counters},
        "gauges": {_series(name, labels): value for name, labels, value in snapshot.gauges},
        "histograms": histograms,
    }


def _series(name: str, labels: Labels) -> Series:
    values = dict(labels)
    return name, tuple(values[label] for label in METRICS[name].labels)
