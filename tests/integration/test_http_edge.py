"""The HTTP edge over real connections to 127.0.0.1, before a service that is as small as its protocol allows."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import Any

import aiohttp
import pytest

from mmprep.api_keys import ApiKey, digest_of
from mmprep.errors import Busy, DecodeError, InvalidRequest, MmprepError, ServiceUnavailable, StartupError
from mmprep_frontend.caller import Caller
from mmprep_frontend.http import sending
from mmprep_frontend.http.app import make_app
from mmprep_frontend.http.exposition import expose
from mmprep_frontend.http.keyring import Keyring
from mmprep_frontend.http.ports import Rendered
from mmprep_frontend.http.server import HttpServer, reserve_port, serve_http
from mmprep_frontend.render.written import Base64, Encoded, Packed, written
from mmprep_frontend.room import Room

try:
    import uvloop

    LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, uvloop.new_event_loop]
except ImportError:
    LOOPS = [asyncio.new_event_loop]

CHAT = "/v1/chat/completions/render"
COMPLETIONS = "/v1/completions/render"
MESSAGES = "/v1/messages/render"
RESPONSES = "/v1/responses/render"
NEED_MODEL = [CHAT, COMPLETIONS, MESSAGES, RESPONSES, "/tokenize", "/detokenize"]
POSTS = [*NEED_MODEL, "/leases/renew", "/leases/release"]
GETS = ["/v1/models", "/health", "/ready", "/metrics", "/version"]

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=LOOPS, ids=lambda factory: factory.__module__)
def run(request: pytest.FixtureRequest) -> Run:
    def run_in_loop(main: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main)

    return run_in_loop


class Echo:
    """A service that answers with what it was asked, or does what a test tells it to."""

    def __init__(self) -> None:
        self.why_not: str | None = None
        self.act: Callable[[bytes], Awaitable[bytes]] | None = None
        self.began = asyncio.Event()
        self.cancelled = asyncio.Event()
        #: What the next chats are answered with.
        self.pieces: list[bytes | Packed] = []
        self.kept: Keeping | None = None
        #: Whether something hangs on the next chats' answers, and the numbers of those that were left unread.
        self.leased = False
        self.unread: list[int] = []
        self.answered = 0

    async def _answer(self, route: str, body: bytes, **more: str) -> bytes:
        self.began.set()
        if self.act is not None:
            try:
                return await self.act(body)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        return json.dumps({"route": route, "size": len(body), **more}).encode()

    async def render_chat(self, body: bytes, caller: Caller) -> Rendered:
        answer = await self._answer("chat", body, request_id=caller.request_id)
        self.answered += 1
        unread = partial(self.unread.append, self.answered) if self.leased else None
        return Rendered(self.pieces or [answer], unread, kept=self.kept)

    async def render_messages(self, body: bytes, caller: Caller) -> bytes:
        return await self._answer("messages", body, request_id=caller.request_id)

    async def render_responses(self, body: bytes, caller: Caller) -> bytes:
        return await self._answer("responses", body, request_id=caller.request_id)

    async def render_completions(self, body: bytes, caller: Caller) -> bytes:
        return await self._answer("completions", body, request_id=caller.request_id)

    async def tokenize(self, body: bytes, caller: Caller) -> bytes:
        return await self._answer("tokenize", body, principal=caller.principal)

    async def detokenize(self, body: bytes, caller: Caller) -> bytes:
        return await self._answer("detokenize", body, principal=caller.principal)

    async def renew_leases(self, body: bytes, caller: Caller) -> bytes:
        return await self._answer("renew", body, principal=caller.principal)

    async def release_leases(self, body: bytes, caller: Caller) -> bytes:
        return await self._answer("release", body, principal=caller.principal)

    async def inject(self, body: bytes, caller: Caller) -> bytes:
        return await self._answer("inject", body, principal=caller.principal)

    async def reset_mm_cache(self, body: bytes, caller: Caller) -> bytes:
        return await self._answer("reset_mm_cache", body, principal=caller.principal)

    async def reset_media_cache(self, body: bytes, caller: Caller) -> bytes:
        return await self._answer("reset_media_cache", body, principal=caller.principal)

    async def metrics(self) -> bytes:
        return expose({"counters": {("mmprep_singleflight_joins_total", ()): 3}, "gauges": {}, "histograms": {}})

    async def status(self) -> bytes:
        return b"{}"

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": []}

    def ready(self) -> str | None:
        return self.why_not

    def refusal(self) -> str | None:
        return self.why_not


class Served:
    """A served edge, and a client for it."""

    def __init__(self, service: Echo, server: HttpServer, client: aiohttp.ClientSession) -> None:
        self.service = service
        self.server = server
        self.client = client

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any, Any]:
        async with self.client.request(method, path, **options) as answer:
            return answer.status, answer.headers, json.loads(await answer.read() or b"null")

    async def error(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any], Any]:
        status, headers, body = await self.ask(method, path, **options)
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "code", "param"}
        assert body["error"]["code"] == status
        assert headers["Content-Type"].startswith("application/json")
        return status, body["error"], headers

    async def raw(self, sent: bytes) -> bytes:
        """Send bytes, and return what the server says until it hangs up."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        writer.write(sent)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Served]:
    service = Echo()
    server = await serve_http(make_app(service, version="1.2.3", **options), "127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as client:
            yield Served(service, server, client)
    finally:
        await server.close(grace=0)


def raises(error: BaseException) -> Callable[[bytes], Awaitable[bytes]]:
    async def act(_body: bytes) -> bytes:
        raise error

    return act


async def never(_body: bytes) -> bytes:
    await asyncio.Event().wait()
    raise AssertionError


def test_each_route_hands_its_body_on_and_answers_in_json(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            routes = []
            for path in POSTS:
                status, headers, body = await edge.ask("POST", path, data=b"x" * 1000)
                assert (status, headers["Content-Type"], body["size"]) == (200, "application/json", 1000)
                routes.append(body["route"])
            assert routes == [
                "chat",
                "completions",
                "messages",
                "responses",
                "tokenize",
                "detokenize",
                "renew",
                "release",
            ]
            assert (await edge.ask("GET", "/v1/models"))[2] == {"object": "list", "data": []}
            assert (await edge.ask("GET", "/version"))[2] == {"version": "1.2.3"}
            assert (await edge.ask("GET", "/health"))[0] == (await edge.ask("GET", "/ready"))[0] == 200
            async with edge.client.get("/metrics") as answer:
                assert answer.content_type == "text/plain"
                assert "mmprep_singleflight_joins_total 3.0" in await answer.text()

    run(main())


@pytest.mark.parametrize(
    ("path", "prefix"), [(CHAT, "chatcmpl-"), (COMPLETIONS, "cmpl-"), (MESSAGES, "chatcmpl-"), (RESPONSES, "resp_")]
)
def test_the_clients_request_id_goes_in_behind_a_prefix_and_comes_back(run: Run, path: str, prefix: str) -> None:
    async def main() -> None:
        async with serving() as edge:
            for chosen in ("a", "!~" * 64):
                _, headers, body = await edge.ask("POST", path, headers={"X-Request-Id": chosen})
                assert (body["request_id"], headers["X-Request-Id"]) == (prefix + chosen, chosen)

    run(main())


@pytest.mark.parametrize("chosen", [None, "", "a b", "x" * 129, "\u00e9"])
def test_without_a_proper_request_id_a_fresh_one_is_made(run: Run, chosen: str | None) -> None:
    async def main() -> None:
        async with serving() as edge:
            options = {} if chosen is None else {"headers": {"X-Request-Id": chosen}}
            seen = set()
            for _ in range(2):
                _, headers, body = await edge.ask("POST", CHAT, **options)
                assert re.fullmatch(r"[0-9a-f]{32}", headers["X-Request-Id"])
                assert body["request_id"] == "chatcmpl-" + headers["X-Request-Id"]
                seen.add(body["request_id"])
            assert len(seen) == 2

    run(main())


def test_until_it_is_ready_only_what_needs_no_model_answers(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            edge.service.why_not = "the model is being loaded"
            for method, path in [("GET", "/ready"), *(("POST", path) for path in NEED_MODEL)]:
                status, error, headers = await edge.error(method, path)
                assert (status, error["type"]) == (503, "ServiceUnavailableError")
                assert error["message"] == "the model is being loaded"
                assert int(headers["Retry-After"]) >= 1
            for method, path in [("GET", "/health"), ("GET", "/version"), ("POST", "/leases/release")]:
                assert (await edge.ask(method, path))[0] == 200
            assert not edge.service.cancelled.is_set()
            edge.service.why_not = None
            assert (await edge.ask("POST", CHAT))[0] == (await edge.ask("GET", "/ready"))[0] == 200

    run(main())


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (InvalidRequest("wrong", param="messages"), 400, "BadRequestError", None),
        (DecodeError("broken", param="messages[0].content[1].image_url"), 422, "UnprocessableEntityError", None),
        (Busy("full", retry_after=2.5), 429, "OverloadedError", "3"),
        (Busy("full", retry_after=0.01), 429, "OverloadedError", "1"),
        (Busy("full"), 429, "OverloadedError", "1"),
        (ServiceUnavailable("gone"), 503, "ServiceUnavailableError", "1"),
        (InvalidRequest("wrong", retry_after=2.0), 400, "BadRequestError", None),
    ],
)
def test_an_error_of_the_tree_becomes_its_status_and_body(
    run: Run, error: MmprepError, status: int, kind: str, retry_after: str | None
) -> None:
    async def main() -> None:
        async with serving() as edge:
            edge.service.act = raises(error)
            got, body, headers = await edge.error("POST", CHAT, headers={"X-Request-Id": "mine"})
            assert got == status
            assert body == {"message": error.message, "type": kind, "code": status, "param": error.param}
            assert headers.get("Retry-After") == retry_after
            assert headers["X-Request-Id"] == "mine"

    run(main())


@pytest.mark.parametrize("error", [RuntimeError("/secret/path"), ConnectionResetError(), asyncio.CancelledError()])
def test_any_other_fault_tells_nothing_is_logged_and_leaves_the_connection_usable(
    run: Run, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving() as edge:
            edge.service.act = raises(error)
            reader, writer = await asyncio.open_connection("127.0.0.1", edge.server.port)
            request = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\nContent-Length: 2\r\n\r\n{{}}".encode()
            statuses, bodies = [], []
            for act in (edge.service.act, None):
                edge.service.act = act
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"Content-Length: (\d+)", head)
                assert length
                statuses.append(head.split()[1])
                bodies.append(await reader.readexactly(int(length[1])))
            writer.close()
            await writer.wait_closed()
            assert statuses == [b"500", b"200"]
            assert json.loads(bodies[0])["error"]["type"] == "InternalServerError"
            assert b"secret" not in bodies[0]

    with caplog.at_level(logging.ERROR):
        run(main())
    (record,) = caplog.records
    assert record.exc_info
    assert "mine" in record.getMessage()


def test_an_unknown_path_is_told_in_json(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            for method, path in [("GET", "/"), ("POST", "/v1/none"), ("GET", "/health/"), ("GET", "/%2e%2e/etc")]:
                status, error, headers = await edge.error(method, path, headers={"X-Request-Id": "mine"})
                assert (status, error["type"]) == (404, "NotFoundError")
                assert headers["X-Request-Id"] == "mine"

    run(main())


def test_a_wrong_method_is_told_with_those_that_are_allowed(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            for path in POSTS:
                status, error, headers = await edge.error("GET", path)
                assert (status, error["type"], headers["Allow"]) == (405, "BadRequestError", "POST")
            for path in GETS:
                status, _, headers = await edge.error("DELETE", path)
                assert (status, headers["Allow"]) == (405, "GET, HEAD")

    run(main())


def test_a_body_that_is_announced_too_large_is_refused_unread(run: Run) -> None:
    async def main() -> None:
        async with serving(max_body=1000) as edge:
            reader, writer = await asyncio.open_connection("127.0.0.1", edge.server.port)
            writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 413 ")
            writer.close()
            await writer.wait_closed()
            assert (await edge.ask("POST", CHAT, data=b"x" * 1000))[0] == 200
            status, error, _ = await edge.error("POST", CHAT, data=b"x" * 1001)
            assert (status, error["type"]) == (413, "PayloadTooLargeError")
            assert "1,000 bytes" in error["message"]

    run(main())


def test_a_body_without_announced_length_is_cut_off_at_the_limit(run: Run) -> None:
    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 100

    async def main() -> None:
        async with serving(max_body=1000) as edge:
            assert (await edge.ask("POST", CHAT, data=chunks(10)))[2]["size"] == 1000
            assert (await edge.error("POST", CHAT, data=chunks(11)))[0] == 413

    run(main())


def test_a_compressed_body_is_refused(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            status, error, _ = await edge.error("POST", CHAT, data=b"x", headers={"Content-Encoding": "gzip"})
            assert status == 400
            assert "Content-Encoding" in error["message"]

    run(main())


def test_large_bodies_and_answers_pass_whole(run: Run) -> None:
    async def same(body: bytes) -> bytes:
        return body

    async def main() -> None:
        async with serving() as edge:
            edge.service.act = same
            sent = json.dumps("x" * 8_000_000).encode()
            # From a file: the client warns of large bodies in memory.
            async with edge.client.post(CHAT, data=io.BytesIO(sent)) as answer:
                assert await answer.read() == sent

    run(main())


def test_the_bodies_of_all_requests_share_a_budget(run: Run) -> None:
    async def main() -> None:
        async with serving(max_body=1000, room=Room(max_body_bytes=1500)) as edge:
            edge.service.act = never
            first = asyncio.create_task(edge.ask("POST", CHAT, data=b"x" * 1000))
            await edge.service.began.wait()
            status, error, headers = await edge.error("POST", CHAT, data=b"x" * 501)
            assert (status, error["type"], headers["Retry-After"]) == (429, "OverloadedError", "1")
            assert (await edge.ask("GET", "/health"))[0] == 200
            first.cancel()
            await edge.service.cancelled.wait()
            edge.service.act = None
            assert (await edge.ask("POST", CHAT, data=b"x" * 501))[0] == 200

    run(main())


def test_the_number_of_requests_under_way_is_bounded(run: Run) -> None:
    async def main() -> None:
        async with serving(room=Room(max_requests=1)) as edge:
            edge.service.act = never
            first = asyncio.create_task(edge.ask("POST", CHAT))
            await edge.service.began.wait()
            assert (await edge.error("POST", CHAT))[0] == 429
            assert (await edge.ask("GET", "/health"))[0] == 200
            first.cancel()
            await edge.service.cancelled.wait()

    run(main())


LARGE = 8_000_000


async def large(_body: bytes) -> bytes:
    return b"x" * LARGE


@asynccontextmanager
async def asking(edge: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Ask for an answer that no socket's buffer holds, and read its first piece only."""
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.server.port, limit=1024)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what sends no event; the watchdog bounds it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def test_an_answer_counts_as_held_until_its_client_has_read_it(run: Run) -> None:
    async def main() -> None:
        room = Room(max_answer_bytes=LARGE)
        async with serving(room=room) as edge:
            edge.service.act = large
            async with asking(edge) as (reader, _):
                assert (room.requests, room.answer_bytes) == (1, LARGE)
                status, error, headers = await edge.error("POST", CHAT)
                assert (status, error["type"], headers["Retry-After"]) == (429, "OverloadedError", "1")
                assert await reader.readexactly(LARGE) == b"x" * LARGE
                await until(lambda: room.requests == 0)
            assert room.answer_bytes == 0
            async with asking(edge):
                assert room.answer_bytes == LARGE
            await until(lambda: room.requests == 0)
            assert room.answer_bytes == 0

    run(main())


def test_of_tensors_that_become_base64_their_own_bytes_count_as_held(run: Run) -> None:
    async def main() -> None:
        room = Room(max_answer_bytes=LARGE)
        async with serving(room=room) as edge:
            edge.service.pieces = [Base64(Packed([b"x" * LARGE]))]
            async with asking(edge) as (reader, _):
                assert room.answer_bytes == LARGE
                assert len(await reader.readexactly(LARGE * 4 // 3)) == LARGE * 4 // 3
            await until(lambda: room.answer_bytes == 0)

    run(main())


def test_an_answer_of_many_pieces_arrives_as_they_stand_one_behind_the_other(run: Run) -> None:
    async def main() -> None:
        room = Room()
        async with serving(room=room) as edge:
            whole = [b"head", b"x" * 200_000, b"", b"y" * 3, b"tail" * 50_000]
            edge.service.pieces = [whole[0], Packed([memoryview(whole[1]), *whole[2:4]]), whole[4]]
            async with edge.client.post(CHAT, headers={"Accept": "application/msgpack"}) as answer:
                assert answer.headers["Content-Type"] == "application/msgpack"
                assert int(answer.headers["Content-Length"]) == 400_007
                assert await answer.read() == b"".join(whole)
            await until(lambda: room.answer_bytes == 0)
            edge.service.pieces = [b"a", b"b"]
            assert await (await edge.client.post(CHAT)).read() == b"ab"

    run(main())


class Keeping:
    """Keeps an answer's memory, which fails from a piece on, and notes what it is told."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.told: list[str] = []
        self._fails_at = fails_at

    def written(self, body: Encoded) -> Iterator[bytes]:
        for number, piece in enumerate(written(body)):
            if number == self._fails_at:
                raise ServiceUnavailable("the memory is gone")
            yield piece

    async def detach(self) -> None:
        self.told.append("detach")

    def end(self) -> None:
        self.told.append("end")


def test_what_keeps_an_answer_is_told_of_its_end_and_a_fault_before_the_first_byte_is_an_answer(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            for size in (10, LARGE):
                edge.service.pieces = [Packed([b"x" * size])]
                edge.service.kept = kept = Keeping()
                async with edge.client.post(CHAT) as answer:
                    assert await answer.read() == b"x" * size
                await until(lambda kept=kept: kept.told == ["end"])
                edge.service.kept = kept = Keeping(fails_at=0)
                status, error, _ = await edge.error("POST", CHAT)
                assert (status, error["message"]) == (503, "the memory is gone")
                assert kept.told == ["end"]

    run(main())


def test_an_answer_whose_memory_is_lost_halfway_is_broken_off(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        room = Room()
        async with serving(room=room) as edge:
            edge.service.pieces = [b"x" * LARGE]
            edge.service.leased = True
            edge.service.kept = kept = Keeping(fails_at=2)
            async with asking(edge) as (reader, _):
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await reader.readexactly(LARGE)
            await until(lambda: room.requests == 0)
            assert (kept.told, edge.service.unread, room.answer_bytes) == (["end"], [1], 0)
            assert (await edge.client.get("/health")).status == 200

    run(main())
    assert "broken off: the memory is gone" in caplog.text


class SlowToEnd(Keeping):
    """Takes its time once all is sent."""

    async def detach(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)


def test_a_client_that_leaves_as_soon_as_it_has_the_answer_has_read_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "_KEPT_SECONDS", 0.0)

    async def main() -> None:
        async with serving() as edge:
            edge.service.leased = True
            for pieces in ([b"x" * 10], [b"x" * LARGE]):
                edge.service.pieces, edge.service.kept = pieces, SlowToEnd()
                async with asking(edge) as (reader, writer):
                    assert await reader.readexactly(len(pieces[0])) == pieces[0]
                    writer.close()
                    await writer.wait_closed()
                kept = edge.service.kept
                await until(lambda kept=kept: kept.told == ["end"])
            assert edge.service.unread == []

    run(main())


def test_who_reads_slowly_is_copied_for_and_still_gets_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_KEPT_SECONDS", 0.01)

    async def main() -> None:
        async with serving() as edge:
            edge.service.pieces = [b"x" * LARGE]
            edge.service.kept = kept = Keeping()
            async with asking(edge) as (reader, _):
                await until(lambda: kept.told == ["detach"])
                assert await reader.readexactly(LARGE) == b"x" * LARGE
            await until(lambda: kept.told == ["detach", "end"])

    run(main())


def test_answers_are_in_the_encoding_that_is_asked_for_and_errors_always_in_json(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            both = {"Accept": "application/json;q=0.5, application/msgpack"}
            for path in POSTS:
                async with edge.client.post(path, headers=both) as answer:
                    assert answer.headers["Content-Type"] == "application/msgpack"
            edge.service.act = raises(InvalidRequest("no"))
            for path in POSTS:
                await edge.error("POST", path, headers=both)
            assert (await edge.ask("GET", "/v1/models", headers=both))[2] == {"object": "list", "data": []}

    run(main())


def test_a_client_that_does_not_read_its_answer_is_hung_up_on(run: Run) -> None:
    async def main() -> None:
        room = Room()
        async with serving(room=room, answer_seconds=0.05) as edge:
            edge.service.act = large
            async with asking(edge) as (reader, _):
                await until(lambda: room.requests == 0)
                assert room.answer_bytes == 0
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await reader.readexactly(LARGE)

    run(main())


def test_closing_hangs_up_on_who_does_not_read_an_answer_to_its_end(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving() as edge:
            edge.service.act = large
            async with asking(edge) as (reader, _):
                await edge.server.close(grace=0.05)
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await reader.readexactly(LARGE)

    run(main())
    assert not caplog.records


def test_a_large_answer_has_the_headers_of_a_small_one(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            names = set()
            for act in (None, large):
                edge.service.act = act
                async with edge.client.post(CHAT, headers={"X-Request-Id": "mine"}) as answer:
                    names.add(tuple(sorted(answer.headers)))
                    assert answer.headers["X-Request-Id"] == "mine"
                    assert answer.headers["Content-Type"].startswith("application/json")
                    assert int(answer.headers["Content-Length"]) == len(await answer.read())
            assert len(names) == 1

    run(main())


def test_a_body_that_does_not_arrive_meets_a_deadline(run: Run) -> None:
    async def main() -> None:
        async with serving(body_seconds=0.05) as edge:
            reader, writer = await asyncio.open_connection("127.0.0.1", edge.server.port)
            writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc".encode())
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 408 ")
            writer.close()
            await writer.wait_closed()
            assert not edge.service.began.is_set()

    run(main())


def test_a_client_that_hangs_up_cancels_what_runs_for_it(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            edge.service.act = never
            _, writer = await asyncio.open_connection("127.0.0.1", edge.server.port)
            writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            await edge.service.began.wait()
            writer.close()
            await writer.wait_closed()
            await edge.service.cancelled.wait()

    run(main())


ASK = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode()


class Unreading:
    """A client that does not read by itself."""

    def __init__(self, edge: Served) -> None:
        self._edge = edge
        self._socket = socket.create_connection(("127.0.0.1", edge.server.port))
        self._socket.setblocking(False)

    async def ask(self) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, ASK)

    async def answered(self) -> bytes:
        """Wait until something of an answer is there, and return it; it is still to be read."""
        await until(lambda: bool(select.select([self._socket], [], [], 0)[0]))
        return self._socket.recv(1 << 20, socket.MSG_PEEK)

    async def read(self) -> None:
        """Read all of a small answer."""
        head, body = b"", b""
        while not head.endswith(b"\r\n\r\n"):
            head += await asyncio.get_running_loop().sock_recv(self._socket, 1)
        size = int(re.search(rb"Content-Length: ([0-9]+)", head)[1])
        while len(body) < size:
            body += await asyncio.get_running_loop().sock_recv(self._socket, size - len(body))

    async def hang_up(self) -> None:
        """Close, and wait until the server has seen it."""
        self._socket.close()
        server = self._edge.server._runner.server
        assert server is not None
        await until(lambda: not server.connections)


def test_a_client_that_has_read_its_answer_and_hangs_up_leaves_nothing_unread(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            edge.service.leased = True
            caller = Unreading(edge)
            for _ in range(2):
                await caller.ask()
                await caller.read()
            await caller.hang_up()
            assert edge.service.unread == []

    run(main())


def test_a_client_that_hangs_up_on_an_answer_that_lies_there_leaves_it_unread(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            edge.service.leased = True
            caller = Unreading(edge)
            await caller.ask()
            await caller.read()
            await caller.ask()
            assert (await caller.answered()).startswith(b"HTTP/1.1 200 ")
            await caller.hang_up()
            assert edge.service.unread == [2]

    run(main())


def test_a_client_that_is_gone_before_its_answer_leaves_it_unread(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            edge.service.leased = True
            caller = Unreading(edge)

            async def act(_body: bytes) -> bytes:
                caller._socket.close()  # the answer follows before the loop hears of it
                return b"{}"

            edge.service.act = act
            await caller.ask()
            await until(lambda: edge.service.answered == 1)
            await caller.hang_up()
            assert edge.service.unread == [1]

    run(main())


def test_of_answers_to_requests_at_once_all_are_unread_where_the_client_hangs_up(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            edge.service.leased = True
            caller = Unreading(edge)
            await asyncio.get_running_loop().sock_sendall(caller._socket, 3 * ASK)
            await until(lambda: edge.service.answered == 3)
            await caller.answered()
            await caller.hang_up()
            assert edge.service.unread == [1, 2, 3]

    run(main())


@pytest.mark.parametrize("how", ["hangs up", "does not read"])
def test_a_large_answer_that_does_not_get_through_is_left_unread(run: Run, how: str) -> None:
    async def main() -> None:
        async with serving(answer_seconds=0.05 if how == "does not read" else 60.0) as edge:
            edge.service.leased = True
            edge.service.act = large
            caller = Unreading(edge)
            await caller.ask()
            await caller.answered()
            if how == "hangs up":
                await caller.hang_up()
            await until(lambda: bool(edge.service.unread))
            assert edge.service.unread == [1]
            caller._socket.close()

    run(main())


def test_a_client_may_ask_before_it_sends_a_body(run: Run) -> None:
    async def main() -> None:
        async with serving(max_body=1000) as edge:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: "
            reader, writer = await asyncio.open_connection("127.0.0.1", edge.server.port)
            writer.write(f"{head}2\r\n\r\n".encode())
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"{}")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await writer.wait_closed()
            reader, writer = await asyncio.open_connection("127.0.0.1", edge.server.port)
            writer.write(f"{head}1001\r\n\r\n".encode())
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
            writer.close()
            await writer.wait_closed()

    run(main())


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 10_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-A: a\r\n" * 200 + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header: a\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_told_so_in_json_and_hung_up_on(
    run: Run, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving() as edge:
            head, _, body = (await edge.raw(sent)).partition(b"\r\n\r\n")
            assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
            error = json.loads(body)["error"]
            assert (error["type"], error["code"]) == ("BadRequestError", 400)
            assert b"\r\nX-Request-Id: " in head
            assert b"\r\nServer: mmprep\r\n" in head + b"\r\n"
            assert not edge.service.began.is_set()
            assert (await edge.ask("GET", "/health"))[0] == 200

    run(main())
    assert not caplog.records


def test_pipelined_requests_are_answered_in_order(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            one = b"GET /version HTTP/1.1\r\nHost: x\r\nX-Request-Id: %d\r\n\r\n"
            last = b"GET /version HTTP/1.1\r\nHost: x\r\nX-Request-Id: 50\r\nConnection: close\r\n\r\n"
            answer = await edge.raw(b"".join(one % number for number in range(50)) + last)
            assert re.findall(rb"X-Request-Id: (\d+)", answer) == [b"%d" % number for number in range(51)]

    run(main())


def test_health_answers_while_requests_wait(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            edge.service.act = never
            waiting = [asyncio.create_task(edge.ask("POST", CHAT)) for _ in range(50)]
            await edge.service.began.wait()
            assert (await edge.ask("GET", "/health"))[0] == 200
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    run(main())


def test_closing_lets_requests_under_way_end_and_takes_no_new_ones(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            release = asyncio.Event()

            async def slow(_body: bytes) -> bytes:
                await release.wait()
                return b'"done"'

            edge.service.act = slow
            under_way = asyncio.create_task(edge.ask("POST", CHAT))
            await edge.service.began.wait()
            closing_down = asyncio.create_task(edge.server.close(grace=60))
            await asyncio.sleep(0)
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", edge.server.port)
            assert not closing_down.done()
            release.set()
            assert (await under_way)[2] == "done"
            await closing_down

    run(main())


def test_closing_answers_what_does_not_end_within_the_grace_with_503(run: Run) -> None:
    async def main() -> None:
        async with serving() as edge:
            edge.service.act = never
            under_way = asyncio.create_task(edge.error("POST", CHAT))
            await edge.service.began.wait()
            await edge.server.close(grace=0.05)
            await edge.service.cancelled.wait()
            status, error, _ = await under_way
            assert (status, error["type"]) == (503, "ServiceUnavailableError")

    run(main())


def test_several_servers_share_a_port_that_a_silent_socket_keeps(run: Run) -> None:
    async def main() -> None:
        with closing(reserve_port("127.0.0.1", 0)) as kept:
            port = kept.getsockname()[1]
            servers = [await serve_http(make_app(Echo(), version=str(n)), "127.0.0.1", port) for n in range(2)]
            assert {server.port for server in servers} == {port}
            seen = set()
            while len(seen) < 2:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                seen.add((await reader.read())[-5:])
                writer.close()
                await writer.wait_closed()
            for server in servers:
                await server.close(grace=0)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)

    run(main())


def test_a_port_that_another_program_has_is_a_start_error_that_names_the_options(run: Run) -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(StartupError, match="--port"):
                await serve_http(make_app(Echo(), version="1"), "127.0.0.1", taken.getsockname()[1])

    run(main())


def test_a_host_that_is_not_this_machines_is_a_start_error() -> None:
    for host in ("192.0.2.1", "x" * 64):
        with pytest.raises(StartupError, match="--host"):
            reserve_port(host, 0)


def test_the_metrics_text_holds_cumulated_buckets_and_the_names_that_boards_know() -> None:
    text = expose(
        {
            "counters": {("mmprep_mm_cache_hits_total", ("image",)): 5.0},
            "gauges": {("mmprep_ring_bytes", ("free",)): 4096.0},
            "histograms": {
                ("mmprep_stage_seconds", ("decode",)): {"buckets": [0.001, 0.1], "counts": [1, 2, 4], "sum": 3.5}
            },
        }
    ).decode()
    for line in (
        "# TYPE mmprep_mm_cache_hits_total counter",
        'mmprep_mm_cache_hits_total{modality="image"} 5.0',
        'vllm:mm_cache_hits_total{modality="image"} 5.0',
        'mmprep_ring_bytes{state="free"} 4096.0',
        'mmprep_stage_seconds_bucket{le="0.001",stage="decode"} 1.0',
        'mmprep_stage_seconds_bucket{le="0.1",stage="decode"} 3.0',
        'mmprep_stage_seconds_bucket{le="+Inf",stage="decode"} 7.0',
        'mmprep_stage_seconds_count{stage="decode"} 7.0',
        'mmprep_stage_seconds_sum{stage="decode"} 3.5',
        "# TYPE mmprep_lanes gauge",
        "mmprep_singleflight_joins_total 0.0",
        "mmprep_lane_restarts_total 0.0",
    ):
        assert line in text.splitlines(), line


@pytest.mark.parametrize(
    "numbers",
    [
        {"counters": {("mmprep_unknown_total", ()): 1}},
        {"gauges": {("mmprep_mm_cache_hits_total", ("image",)): 1}},
        {"counters": {("mmprep_mm_cache_hits_total", ()): 1}},
        {"histograms": {("mmprep_request_seconds", ("/x",)): {"buckets": [1.0], "counts": [1], "sum": 1.0}}},
    ],
)
def test_numbers_that_the_table_of_metrics_does_not_know_are_refused(numbers: Any) -> None:
    with pytest.raises(ValueError, match="mmprep_"):
        expose({"counters": {}, "gauges": {}, "histograms": {}, **numbers})


# --- keys ---------------------------------------------------------------------------------------------------------


def key_of(name: str) -> str:
    return f"{name}-0123456789abcdef"


def keyring(*names: str, admins: tuple[str, ...] = ()) -> Keyring:
    return Keyring(
        [ApiKey(name, digest_of(key_of(name))) for name in names],
        [ApiKey(name, digest_of(key_of(name))) for name in admins],
    )


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_with_keys_every_request_needs_one_and_probes_do_not(run):
    async def main() -> None:
        async with serving(keyring=keyring("a")) as served:
            for method, path in [*(("POST", path) for path in POSTS), ("GET", "/v1/models")]:
                for headers in ({}, bearer("wrong-0123456789abcdef"), {"Authorization": "Basic YTpi"}, bearer("")):
                    status, error, answered = await served.error(method, path, headers=headers)
                    assert (status, error["type"]) == (401, "AuthenticationError")
                    assert answered["WWW-Authenticate"] == "Bearer"
                    assert key_of("a") not in error["message"]
                status, _, _ = await served.ask(method, path, headers=bearer(key_of("a")))
                assert status == 200
            for path in ("/health", "/ready", "/metrics", "/version"):
                async with served.client.get(path) as answer:
                    assert answer.status == 200

    run(main())


def test_a_key_comes_in_either_header_and_names_its_principal(run):
    async def main() -> None:
        async with serving(keyring=keyring("a", "b", admins=("root",))) as served:
            for headers, principal in (
                (bearer(key_of("a")), "a"),
                ({"authorization": f"bEARER  {key_of('b')} "}, "b"),
                ({"X-Api-Key": key_of("b")}, "b"),
                (bearer(key_of("root")), "root"),
            ):
                status, _, answer = await served.ask("POST", "/tokenize", headers=headers)
                assert (status, answer["principal"]) == (200, principal)

    run(main())


def test_a_body_of_somebody_without_a_key_is_not_read(run):
    async def main() -> None:
        async with serving(keyring=keyring("a")) as served:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
            writer.write(head.encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 401")
            writer.close()
            await writer.wait_closed()

    run(main())


def test_nothing_is_allowed_across_origins(run):
    async def main() -> None:
        async with serving() as served:
            headers = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
            status, _, answered = await served.error("OPTIONS", CHAT, headers=headers)
            assert status == 405
            _, more, _ = await served.ask("POST", CHAT, headers=headers)
            assert not [name for name in (*answered, *more) if name.lower().startswith("access-control")]

    run(main())


def test_the_dashboard_is_the_operators_and_a_browser_may_ask_for_the_key(run):
    async def main() -> None:
        async with serving(keyring=keyring("a", admins=("root",))) as served:
            for path in ("/dashboard", "/dashboard/status"):
                for wrong in ({}, bearer(key_of("a")), basic(key_of("a")), {"Authorization": "Basic ???"}):
                    status, _, answered = await served.error("GET", path, headers=wrong)
                    assert (status, answered["WWW-Authenticate"]) == (401, 'Basic realm="mmprep"')
                for right in (bearer(key_of("root")), basic(key_of("root"))):
                    async with served.client.get(path, headers=right) as answer:
                        assert answer.status == 200
            # A password that the browser sends by itself opens nothing that changes something.
            status, _, _ = await served.error("POST", "/tokenize", headers=basic(key_of("root")))
            assert status == 401

    run(main())


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()}
