"""The routes of the HTTP edge. It reads a body within bounds, hands it on, and tells the answer or the error.

Where keys are configured, requests and leases need one (:mod:`mmprep_frontend.http.keyring`), and are told so before
anything else. ``/health``, ``/ready``, ``/metrics`` and ``/version``, and the description of the interface, never do: probes and monitors have none.

``/health`` answers at once, always: it touches nothing. ``/ready`` and the routes that need the model answer 503 with
the reason until the service is warm, and again while it drains; leases can be renewed and released all the time, since
those who hold some must be able to give them back while the service drains.

Every answer carries ``X-Request-Id``: the client's own, or a fresh one. A client that hangs up cancels what runs for
it, and what hangs on an answer that it has not read is told of that. Whatever goes wrong, the connection stays usable for
the next request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import msgspec
from aiohttp import web

from mmprep import logs
from mmprep.errors import MmprepError, ServiceUnavailable
from mmprep_frontend.caller import Caller
from mmprep_frontend.http.answers import (
    error_answer,
    idempotency_keys,
    internal_error,
    json_answer,
    plain_answer,
    request_id_of,
    routing_error,
    sign,
)
from mmprep_frontend.http.bodies import Bodies
from mmprep_frontend.http.dashboard import HEADERS, PAGE
from mmprep_frontend.http.exposition import CONTENT_TYPE
from mmprep_frontend.http.keyring import Keyring, Need
from mmprep_frontend.http.negotiation import encoding_for
from mmprep_frontend.http.openapi import describe, page
from mmprep_frontend.http.ports import Rendered, Service
from mmprep_frontend.http.sending import Sender
from mmprep_frontend.render.answer import CHAT_PREFIX, COMPLETION_PREFIX, RESPONSE_PREFIX
from mmprep_frontend.room import RETRY_AFTER, Room
from mmprep_frontend.tracing.context import read_parent
from mmprep_frontend.tracing.spans import Exporter, tracing

_log = logging.getLogger(__name__)
_REQUEST_ID: Final = web.RequestKey("request_id", str)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Running:
    """The requests under way."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[object]] = set()
        self.ended = False

    def end(self) -> None:
        """Cancel them all; each is answered with 503."""
        self.ended = True
        for task in self.tasks:
            task.cancel()


RUNNING: Final = web.AppKey("running", Running)


def make_app(
    service: Service,
    *,
    version: str,
    max_body: int = 64 * 2**20,
    room: Room | None = None,
    keyring: Keyring | None = None,
    body_seconds: float = 60.0,
    answer_seconds: float = 60.0,
    exporter: Exporter | None = None,
) -> web.Application:
    """Return the application, to be served by :func:`mmprep_frontend.http.server.serve_http`.

    Parameters
    ----------
    service:
        What answers.
    version:
        What ``/version`` tells.
    max_body, body_seconds:
        As :class:`mmprep_frontend.http.bodies.Bodies` has them.
    room:
        Shared with other doors; ``None``: one of its own.
    keyring:
        Who may ask; ``None``: everybody.
    answer_seconds:
        How long a client may read nothing of a large answer before it is hung up on.
    exporter:
        Of traces; ``None``: requests are not traced.
    """
    bodies = Bodies(max_body=max_body, room=room or Room(), seconds=body_seconds)
    edge = _Edge(service, version, bodies, keyring or Keyring(), answer_seconds, exporter=exporter)
    app = web.Application(middlewares=[_tell])
    app[RUNNING] = Running()
    for path, handler in (
        ("/v1/chat/completions/render", edge.answering(service.render_chat, prefix=CHAT_PREFIX)),
        ("/v1/messages/render", edge.answering(service.render_messages, prefix=CHAT_PREFIX)),
        ("/v1/responses/render", edge.answering(service.render_responses, prefix=RESPONSE_PREFIX)),
        ("/v1/completions/render", edge.answering(service.render_completions, prefix=COMPLETION_PREFIX)),
        ("/tokenize", edge.answering(service.tokenize)),
        ("/detokenize", edge.answering(service.detokenize)),
        ("/leases/renew", edge.answering(service.renew_leases, needs_model=False)),
        ("/leases/release", edge.answering(service.release_leases, needs_model=False)),
        ("/inject", edge.answering(service.inject, needs="admin")),
        ("/reset_mm_cache", edge.answering(service.reset_mm_cache, needs="admin")),
        ("/reset_media_cache", edge.answering(service.reset_media_cache, needs="admin")),
    ):
        app.router.add_post(path, handler, expect_handler=edge.go_on)
    app.router.add_get("/v1/models", edge.models)
    app.router.add_get("/health", edge.health)
    app.router.add_get("/ready", edge.ready)
    app.router.add_get("/metrics", edge.metrics)
    app.router.add_get("/version", edge.version)
    app.router.add_get("/dashboard", edge.dashboard)
    app.router.add_get("/dashboard/status", edge.status)
    description = _Description(version)
    app.router.add_get("/openapi.json", description.data)
    app.router.add_get("/docs", description.page)
    return app


class _Description:
    """The description of the interface. It is made when somebody asks for it, once and on a thread."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._made: asyncio.Future[tuple[bytes, bytes]] | None = None

    async def data(self, _request: web.Request) -> web.StreamResponse:
        return json_answer((await self._texts())[0])

    async def page(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(body=(await self._texts())[1], content_type="text/html", charset="utf-8")

    async def _texts(self) -> tuple[bytes, bytes]:
        if self._made is None:
            self._made = asyncio.get_running_loop().run_in_executor(None, self._make)
        return await asyncio.shield(self._made)

    def _make(self) -> tuple[bytes, bytes]:
        described = describe(self._version)
        return msgspec.json.encode(described), page(described).encode()


class _Edge:
    """The handlers of one application."""

    def __init__(
        self,
        service: Service,
        version: str,
        bodies: Bodies,
        keyring: Keyring,
        answer_seconds: float,
        *,
        exporter: Exporter | None,
    ) -> None:
        self._exporter = exporter
        self._service = service
        self._version = version
        self._bodies = bodies
        self._keyring = keyring
        self._sender = Sender(_sign, seconds=answer_seconds)

    def answering(
        self,
        answer: Callable[[bytes, Caller], Awaitable[bytes] | Awaitable[Rendered]],
        *,
        prefix: str = "",
        needs_model: bool = True,
        needs: Need = "key",
    ) -> Handler:
        """Return a handler that answers a body.

        Parameters
        ----------
        prefix:
            Before the request's id.
        needs_model:
            Whether it answers only while the service is ready.
        needs:
            Whose key it asks for.
        """

        async def handler(request: web.Request) -> web.StreamResponse:
            with self._tracing(request):
                return await answered(request)

        async def answered(request: web.Request) -> web.StreamResponse:
            principal = self._keyring.admit(request.headers, needs)
            if needs_model:
                self._check_ready()
            async with self._bodies.body(request) as (body, held):
                caller = Caller(
                    prefix + request[_REQUEST_ID],
                    principal,
                    held,
                    encoding_for(",".join(request.headers.getall("Accept", ()))),
                    self._keyring.sender(request.headers),
                    idempotency_keys(request),
                )
                made = await answer(body, caller)
                rendered = made if isinstance(made, Rendered) else Rendered([made])
                return await self._sender.send(request, rendered, caller)

        return handler

    def _tracing(self, request: web.Request) -> AbstractContextManager[None]:
        if self._exporter is None:
            return nullcontext()
        headers = request.headers
        parent = read_parent(headers.getall("traceparent", ()), headers.getall("tracestate", ()))
        about = {
            "http.request.method": request.method,
            "http.route": request.path,
            "mmprep.request_id": request[_REQUEST_ID],
        }
        return tracing(self._exporter, parent, f"{request.method} {request.path}", about)

    async def go_on(self, request: web.Request) -> None:
        """Tell a client that asks whether to send its body to do so, unless its length or its key speaks against it."""
        expected = request.headers.get("Expect", "").lower() == "100-continue"
        if (
            expected
            and self._keyring.admits(request.headers)
            and (request.content_length or 0) <= self._bodies.max_body
        ):
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            # The answer itself has not begun.
            request.writer.output_size = 0

    async def health(self, _request: web.Request) -> web.StreamResponse:
        return json_answer(b'{"status":"ok"}')

    async def ready(self, _request: web.Request) -> web.StreamResponse:
        _refuse(self._service.ready())
        return json_answer(b'{"status":"ready"}')

    async def models(self, request: web.Request) -> web.StreamResponse:
        self._keyring.admit(request.headers, "key")
        return plain_answer(self._service.models())

    async def version(self, _request: web.Request) -> web.StreamResponse:
        return plain_answer({"version": self._version})

    async def dashboard(self, request: web.Request) -> web.StreamResponse:
        self._keyring.admit(request.headers, "page")
        return web.Response(body=PAGE, content_type="text/html", charset="utf-8", headers=HEADERS)

    async def status(self, request: web.Request) -> web.StreamResponse:
        self._keyring.admit(request.headers, "page")
        return json_answer(await self._service.status())

    async def metrics(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(body=await self._service.metrics(), headers={"Content-Type": CONTENT_TYPE})

    def _check_ready(self) -> None:
        _refuse(self._service.refusal())


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ServiceUnavailable(reason, retry_after=RETRY_AFTER)


@web.middleware
async def _tell(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id, and turn whatever is raised for it into an answer."""
    request[_REQUEST_ID] = request_id = request_id_of(request)
    logs.request_id.set(request_id)
    running, task = request.app[RUNNING], asyncio.current_task()
    assert task is not None
    running.tasks.add(task)
    try:
        answer = await handler(request)
    except MmprepError as error:
        answer = error_answer(error)
    except web.HTTPException as error:
        answer = routing_error(error, request.path)
    except asyncio.CancelledError:
        if running.ended:
            task.uncancel()
            answer = error_answer(ServiceUnavailable("the service has stopped; send the request again"))
            answer.force_close()
        elif task.cancelling():
            raise
        else:  # something inside was cancelled, not this request: the client is still there and waits
            answer = _fault(request, request_id)
    except Exception:  # noqa: BLE001
        answer = _fault(request, request_id)
    finally:
        running.tasks.discard(task)
    if not answer.prepared:
        _sign(request, answer)
    return answer


def _sign(request: web.Request, answer: web.StreamResponse) -> None:
    sign(answer, request[_REQUEST_ID])


def _fault(request: web.Request, request_id: str) -> web.Response:
    _log.exception("request %s failed: %s %s", request_id, request.method, request.rel_url.raw_path)
    return internal_error()
