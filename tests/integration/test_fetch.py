"""The fetcher against real servers on 127.0.0.1. No name is ever resolved and no other address ever dialled."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from mmprep.errors import (
    Busy,
    FetchBadGateway,
    FetchError,
    FetchTimeout,
    Forbidden,
    InvalidRequest,
    MmprepError,
    ServiceUnavailable,
    TooLarge,
)
from mmprep.metrics import Metrics
from mmprep_frontend.media.fetch import Fetcher
from mmprep_frontend.media.memory import MediaMemory
from mmprep_frontend.media.names import SystemResolver
from mmprep_frontend.media.policy import UrlPolicy
from mmprep_frontend.media.retry import RetryPolicy

try:
    import uvloop

    LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, uvloop.new_event_loop]
except ImportError:
    LOOPS = [asyncio.new_event_loop]

PARAM = "messages[0].content[1].image_url"
MEDIUM = bytes(range(256)) * 40
LIMIT = 100_000

Run = Callable[[Coroutine[Any, Any, None]], None]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Raw = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(params=LOOPS, ids=lambda factory: factory.__module__)
def run(request: pytest.FixtureRequest) -> Run:
    def run_in_loop(main: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main)

    return run_in_loop


class Table:
    """A resolver that knows only what it was told, and says what it was asked."""

    def __init__(self, **names: Sequence[str]) -> None:
        self.names = {name.replace("_", "."): addresses for name, addresses in names.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return self.names[host]

    def close(self) -> None:
        pass


class Dialled:
    """Opens sockets only for this machine, and remembers every address that was about to be dialled."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    def __call__(self, address_info: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, address = address_info
        self.addresses.append(str(address[0]))
        assert address[0] == "127.0.0.1", "a test was about to leave this machine"
        return socket.socket(family, kind, protocol)


class ThisMachineIsPublic(UrlPolicy):
    """The real policy, but for the one address that the tests' servers have."""

    def judge_address(self, address: Any) -> None:
        if str(address) != "127.0.0.1":
            super().judge_address(address)


PRIVATE = UrlPolicy(allow_private=True)
LOCAL = ThisMachineIsPublic()


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    runner = web.ServerRunner(web.Server(handler, handler_cancellation=True))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield site.port
    finally:
        await runner.cleanup()


@asynccontextmanager
async def serving_raw(handler: Raw) -> AsyncIterator[int]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def fetching(policy: UrlPolicy = PRIVATE, **options: Any) -> AsyncIterator[tuple[Fetcher, Table, Dialled]]:
    table = options.pop("resolver", Table(media_test=["127.0.0.1"]))
    dialled = Dialled()
    needed = {"max_bytes": LIMIT, "memory": MediaMemory(64 << 20), "metrics": Metrics()}
    options = {**needed, "retry": RetryPolicy(first=0.0), "recent": 0.0, **options}
    async with Fetcher(policy, **options, resolver=table, open_socket=dialled) as fetcher:
        yield fetcher, table, dialled


async def get(fetcher: Fetcher, url: str, **options: Any) -> bytes:
    data = (await fetcher.fetch(url, **options)).data
    assert data is not None
    return data


async def refused(fetcher: Fetcher, url: str, **options: Any) -> MmprepError:
    with pytest.raises(MmprepError) as caught:
        await fetcher.fetch(url, param=PARAM, **options)
    assert caught.value.param == PARAM
    assert "127.0.0" not in caught.value.message
    return caught.value


def answer(**options: Any) -> Handler:
    async def handler(_request: web.BaseRequest) -> web.Response:
        return web.Response(**options)

    return handler


async def drain_head(reader: asyncio.StreamReader) -> None:
    await reader.readuntil(b"\r\n\r\n")


def raw_answer(*chunks: bytes) -> Raw:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await drain_head(reader)
        writer.writelines(chunks)
        writer.close()
        await writer.wait_closed()

    return handler


def test_a_medium_is_fetched_with_plain_headers_and_the_next_one_over_the_same_connection(run: Run) -> None:
    async def main() -> None:
        seen: list[web.BaseRequest] = []

        async def handler(request: web.BaseRequest) -> web.Response:
            seen.append(request)
            response = web.Response(body=MEDIUM)
            response.set_cookie("a", "b")
            return response

        async with serving(handler) as port, fetching() as (fetcher, table, dialled):
            for _ in range(2):
                assert await get(fetcher, f"http://Media.TEST.:{port}/a%2Fb?x=%20y#z") == MEDIUM
            assert table.asked == ["media.test"]
            assert dialled.addresses == ["127.0.0.1"]
        assert len(seen) == 2
        assert seen[0].path_qs == "/a%2Fb?x=%20y"
        assert seen[0].headers["Host"] == f"media.test:{port}"
        assert seen[0].headers["Accept-Encoding"] == "identity"
        assert "Cookie" not in seen[1].headers

    run(main())


def test_a_literal_address_is_fetched_without_the_resolver(run: Run) -> None:
    async def main() -> None:
        async with serving(answer(body=MEDIUM)) as port, fetching(LOCAL) as (fetcher, table, dialled):
            assert await get(fetcher, f"http://127.0.0.1:{port}/") == MEDIUM
            assert table.asked == []
            assert dialled.addresses == ["127.0.0.1"]

    run(main())


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (404, FetchError, 422),
        (403, FetchError, 422),
        (206, FetchError, 422),
        (304, FetchError, 422),
        (500, FetchBadGateway, 502),
        (503, FetchBadGateway, 502),
    ],
)
def test_a_status_of_the_host_is_told_with_the_place(run: Run, status: int, kind: type, code: int) -> None:
    async def main() -> None:
        async with serving(answer(status=status)) as port, fetching() as (fetcher, _, _):
            error = await refused(fetcher, f"http://media.test:{port}/")
            assert type(error) is kind
            assert error.code == code
            assert str(status) in error.message

    run(main())


def test_an_answer_without_content_is_refused(run: Run) -> None:
    async def main() -> None:
        async with serving(answer(body=b"")) as port, fetching() as (fetcher, _, _):
            error = await refused(fetcher, f"http://media.test:{port}/")
            assert type(error) is FetchError

    run(main())


@pytest.mark.parametrize("url", ["ftp://media.test/", "http://user@media.test/", "http://media.test /"])
def test_a_bad_url_is_refused_before_anything_is_asked(run: Run, url: str) -> None:
    async def main() -> None:
        async with fetching() as (fetcher, table, dialled):
            assert (await refused(fetcher, url)).code == 400
            assert table.asked == dialled.addresses == []

    run(main())


@pytest.mark.parametrize(
    "addresses",
    [
        ["10.0.0.1"],
        ["127.0.0.1", "10.0.0.1"],
        ["8.8.8.8", "::1"],
        ["127.0.0.1", "::ffff:192.168.0.1"],
        ["127.0.0.1"] * 20 + ["169.254.169.254"],
    ],
)
def test_a_name_with_one_inner_address_is_never_dialled(run: Run, addresses: list[str]) -> None:
    async def main() -> None:
        async with fetching(LOCAL, resolver=Table(rebind_test=addresses)) as (fetcher, table, dialled):
            error = await refused(fetcher, "http://rebind.test/")
            assert type(error) is Forbidden
            assert not any(address in error.message for address in addresses)
            assert table.asked == ["rebind.test"]
            assert dialled.addresses == []

    run(main())


@pytest.mark.parametrize(
    "location", ["http://10.0.0.1/", "http://inner.test/", "http://[::1]/", "http://127.1/", "//u:p@media.test/"]
)
def test_a_redirect_to_a_forbidden_place_is_never_dialled(run: Run, location: str) -> None:
    async def main() -> None:
        table = Table(media_test=["127.0.0.1"], inner_test=["192.168.1.1"])
        async with (
            serving(answer(status=302, headers={"Location": location})) as port,
            fetching(LOCAL, resolver=table) as (fetcher, _, dialled),
        ):
            error = await refused(fetcher, f"http://media.test:{port}/")
            assert type(error) is Forbidden
            assert dialled.addresses == ["127.0.0.1"]

    run(main())


def test_a_redirect_out_of_the_allowed_domains_is_not_followed(run: Run) -> None:
    async def main() -> None:
        policy = UrlPolicy(allowed_domains=("media.test",), allow_private=True)
        table = Table(media_test=["127.0.0.1"], other_test=["127.0.0.1"])
        async with (
            serving(answer(status=307, headers={"Location": "http://other.test/"})) as port,
            fetching(policy, resolver=table) as (fetcher, _, dialled),
        ):
            assert type(await refused(fetcher, f"http://media.test:{port}/")) is Forbidden
            assert table.asked == ["media.test"]
            assert dialled.addresses == ["127.0.0.1"]

    run(main())


def test_the_last_check_stands_even_where_the_url_was_not_judged(run: Run) -> None:
    class BlindToLiterals(ThisMachineIsPublic):
        def judge_url(self, url: str) -> Any:
            return PRIVATE.judge_url(url)

    async def main() -> None:
        async with fetching(BlindToLiterals()) as (fetcher, _, dialled):
            for url in ("http://10.0.0.1/", "http://[::1]/"):
                assert type(await refused(fetcher, url)) is Forbidden
            assert dialled.addresses == []

    run(main())


@pytest.mark.parametrize(("hops", "arrives"), [(5, True), (6, False)])
def test_at_most_five_redirects_are_followed(run: Run, hops: int, arrives: bool) -> None:
    paths: list[int] = []

    async def handler(request: web.BaseRequest) -> web.Response:
        left = int(request.path[1:])
        paths.append(left)
        return web.Response(status=301, headers={"Location": f"/{left - 1}"}) if left else web.Response(body=MEDIUM)

    async def main() -> None:
        async with serving(handler) as port, fetching() as (fetcher, _, _):
            url = f"http://media.test:{port}/{hops}"
            if arrives:
                assert await get(fetcher, url) == MEDIUM
            else:
                assert type(await refused(fetcher, url)) is FetchError
            assert len(paths) == 6

    run(main())


@pytest.mark.parametrize("headers", [{}, {"Location": ""}, {"Location": "gopher://media.test/"}])
def test_a_redirect_to_nowhere_is_the_hosts_fault(run: Run, headers: dict[str, str]) -> None:
    async def main() -> None:
        async with serving(answer(status=302, headers=headers)) as port, fetching() as (fetcher, _, _):
            assert type(await refused(fetcher, f"http://media.test:{port}/")) is FetchError

    run(main())


@pytest.mark.parametrize("options", [{"timeout": 0.2}, {"read_timeout": 0.2}])
def test_a_host_that_stays_silent_times_out(run: Run, options: dict[str, float]) -> None:
    async def main() -> None:
        async def handler(_request: web.BaseRequest) -> web.Response:
            await asyncio.Event().wait()
            raise AssertionError

        async with serving(handler) as port, fetching(**options) as (fetcher, _, _):
            error = await refused(fetcher, f"http://media.test:{port}/")
            assert type(error) is FetchTimeout
            assert error.code == 504

    run(main())


def test_a_host_that_drips_for_ever_meets_the_deadline_of_the_call(run: Run) -> None:
    async def main() -> None:
        hung_up = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await drain_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n")
            at_end = asyncio.ensure_future(reader.read())
            while not at_end.done():
                writer.write(b"x")
                await asyncio.wait([at_end], timeout=0.02)
            at_end.exception()
            writer.close()
            hung_up.set()

        async with serving_raw(handler) as port, fetching(read_timeout=60, timeout=60) as (fetcher, _, _):
            error = await refused(fetcher, f"http://media.test:{port}/", timeout=0.2)
            assert type(error) is FetchTimeout
            await hung_up.wait()

    run(main())


def test_a_resolver_that_hangs_meets_the_deadline(run: Run) -> None:
    class Hanging(Table):
        async def resolve(self, host: str) -> Sequence[str]:
            await asyncio.Event().wait()
            return [host]

    async def main() -> None:
        async with fetching(resolver=Hanging(), timeout=0.05) as (fetcher, _, dialled):
            assert type(await refused(fetcher, "http://media.test/")) is FetchTimeout
            assert dialled.addresses == []

    run(main())


def test_a_medium_that_is_announced_too_large_is_not_read(run: Run) -> None:
    async def main() -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {LIMIT + 1}\r\n\r\n".encode()
        async with serving_raw(raw_answer(head)) as port, fetching() as (fetcher, _, _):
            error = await refused(fetcher, f"http://media.test:{port}/")
            assert type(error) is TooLarge
            assert "--max-media-size" in error.message

    run(main())


def test_an_endless_medium_is_cut_off_at_the_limit_and_the_host_is_hung_up_on(run: Run) -> None:
    async def main() -> None:
        hung_up = asyncio.Event()

        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                while True:
                    await response.write(b"x" * 10_000)
            finally:
                hung_up.set()

        async with serving(handler) as port, fetching() as (fetcher, _, _):
            assert type(await refused(fetcher, f"http://media.test:{port}/")) is TooLarge
            await hung_up.wait()

    run(main())


def test_a_medium_of_exactly_the_limit_is_fetched(run: Run) -> None:
    async def main() -> None:
        async with serving(answer(body=b"x" * LIMIT)) as port, fetching() as (fetcher, _, _):
            assert len(await get(fetcher, f"http://media.test:{port}/")) == LIMIT

    run(main())


@pytest.mark.parametrize(
    "chunks",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"short"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"zz\r\nhello\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello and more",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"hello"),
        (b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 1000 + b"\r\n", b"hello"),
        (b"HTTP/1.1 200 OK\r\nX-A: " + b"b" * 100_000 + b"\r\n\r\n", b"hello"),
        (b"SSH-2.0-server\r\n",),
        (),
    ],
)
def test_an_answer_that_is_cut_off_or_broken_is_a_bad_gateway(run: Run, chunks: tuple[bytes, ...]) -> None:
    async def main() -> None:
        async with serving_raw(raw_answer(*chunks)) as port, fetching() as (fetcher, _, _):
            error = await refused(fetcher, f"http://media.test:{port}/")
            assert type(error) is FetchBadGateway
            assert error.code == 502

    run(main())


@pytest.mark.parametrize(("coding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compression_that_was_not_asked_for_is_undone(run: Run, coding: str, compress: Any) -> None:
    async def main() -> None:
        for medium in (MEDIUM, b"a", bytes(LIMIT)):
            handler = answer(body=compress(medium), headers={"Content-Encoding": coding})
            async with serving(handler) as port, fetching() as (fetcher, _, _):
                assert await get(fetcher, f"http://media.test:{port}/") == medium

    run(main())


def test_a_compressed_medium_larger_than_one_step_arrives_whole(run: Run) -> None:
    async def main() -> None:
        medium = bytes(3 * 2**18)
        handler = answer(body=gzip.compress(medium), headers={"Content-Encoding": "gzip"})
        async with serving(handler) as port, fetching(max_bytes=2**20) as (fetcher, _, _):
            assert await get(fetcher, f"http://media.test:{port}/") == medium

    run(main())


def test_a_decompression_bomb_is_cut_off_at_the_limit(run: Run) -> None:
    async def main() -> None:
        bomb = gzip.compress(bytes(60_000_000))
        assert len(bomb) < LIMIT
        async with (
            serving(answer(body=bomb, headers={"Content-Encoding": "gzip"})) as port,
            fetching() as (fetcher, _, _),
        ):
            assert type(await refused(fetcher, f"http://media.test:{port}/")) is TooLarge

    run(main())


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", b"not gzip"),
        ("gzip", gzip.compress(MEDIUM)[:-10]),
        ("gzip", gzip.compress(MEDIUM) + b"more"),
        ("br", b"anything"),
        ("gzip, gzip", gzip.compress(gzip.compress(MEDIUM))),
    ],
)
def test_a_compression_that_cannot_be_undone_is_the_hosts_fault(run: Run, coding: str, body: bytes) -> None:
    async def main() -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        async with serving_raw(raw_answer(head, body)) as port, fetching() as (fetcher, _, _):
            assert type(await refused(fetcher, f"http://media.test:{port}/")) is FetchError

    run(main())


def test_an_unknown_name_is_a_bad_gateway(run: Run) -> None:
    async def main() -> None:
        for table in (Table(), Table(media_test=[])):
            async with fetching(resolver=table) as (fetcher, _, _):
                error = await refused(fetcher, "http://media.test/")
                assert type(error) is FetchBadGateway
                assert "name" in error.message

    run(main())


def test_a_host_that_refuses_connections_is_a_bad_gateway(run: Run) -> None:
    async def main() -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            async with fetching() as (fetcher, _, _):
                error = await refused(fetcher, f"http://media.test:{bound.getsockname()[1]}/")
                assert type(error) is FetchBadGateway

    run(main())


def test_a_host_that_does_not_speak_tls_is_a_bad_gateway(run: Run) -> None:
    async def main() -> None:
        async with serving(answer(body=MEDIUM)) as port, fetching() as (fetcher, _, _):
            error = await refused(fetcher, f"https://media.test:{port}/")
            assert type(error) is FetchBadGateway

    run(main())


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_host_that_takes_no_connection_times_out(run: Run, scheme: str) -> None:
    async def main() -> None:
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(socket.socket())
            listening.bind(("127.0.0.1", 0))
            listening.listen(0)
            # Nobody accepts: the kernel takes the first ones, and lets the next ones wait.
            for _ in range(4):
                filling = stack.enter_context(socket.socket())
                filling.setblocking(False)
                filling.connect_ex(listening.getsockname())
            async with fetching(connect_timeout=0.2) as (fetcher, _, dialled):
                error = await refused(fetcher, f"{scheme}://media.test:{listening.getsockname()[1]}/")
                assert type(error) is FetchTimeout
                assert dialled.addresses == ["127.0.0.1"]

    run(main())


def test_a_host_that_never_ends_its_tls_handshake_times_out(run: Run) -> None:
    async def main() -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async with serving_raw(handler) as port, fetching(connect_timeout=0.2) as (fetcher, _, _):
            error = await refused(fetcher, f"https://media.test:{port}/")
            assert (type(error), error.code) == (FetchTimeout, 504)

    run(main())


def test_cancelling_a_fetch_closes_its_connection_and_frees_its_slot(run: Run) -> None:
    async def main() -> None:
        asked, hung_up = asyncio.Event(), asyncio.Event()

        async def handler(request: web.BaseRequest) -> web.Response:
            if request.path == "/ok":
                return web.Response(body=MEDIUM)
            asked.set()
            try:
                await asyncio.Event().wait()
            finally:
                hung_up.set()
            raise AssertionError

        async with serving(handler) as port, fetching(connections=1, waiting=0) as (fetcher, _, _):
            task = asyncio.create_task(get(fetcher, f"http://media.test:{port}/"))
            await asked.wait()
            assert type(await refused(fetcher, f"http://media.test:{port}/ok")) is Busy
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await hung_up.wait()
            assert await get(fetcher, f"http://media.test:{port}/ok") == MEDIUM

    run(main())


class Gate:
    """A server whose answers wait to be let out, and which counts who waits."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.inside = 0
        self.changed = asyncio.Condition()

    async def __call__(self, _request: web.BaseRequest) -> web.Response:
        async with self.changed:
            self.inside += 1
            self.changed.notify_all()
        await self.open.wait()
        return web.Response(body=MEDIUM)

    async def until_inside(self, count: int) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.inside >= count)


def test_one_host_cannot_take_every_connection_and_the_rest_waits(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        table = Table(one_test=["127.0.0.1"], two_test=["127.0.0.1"])
        async with (
            serving(gate) as port,
            fetching(connections=3, connections_per_host=2, waiting=2, resolver=table) as (fetcher, _, dialled),
        ):
            first = [asyncio.create_task(get(fetcher, f"http://one.test:{port}/{n}")) for n in range(3)]
            await gate.until_inside(2)
            other = asyncio.create_task(get(fetcher, f"http://two.test:{port}/"))
            await gate.until_inside(3)
            assert table.asked == ["one.test", "one.test", "two.test"]
            fifth = asyncio.create_task(get(fetcher, f"http://two.test:{port}/5"))
            await asyncio.sleep(0)
            error = await refused(fetcher, f"http://two.test:{port}/6")
            assert type(error) is Busy
            assert error.code == 429
            assert error.retry_after
            gate.open.set()
            assert await asyncio.gather(*first, other, fifth) == [MEDIUM] * 5
            assert gate.inside == 5
            assert 3 <= len(dialled.addresses) <= 5

    run(main())


def test_who_waits_for_a_connection_can_give_up_or_run_out_of_time(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(gate) as port, fetching(connections=1, waiting=1) as (fetcher, _, _):
            url = f"http://media.test:{port}/"
            holder = asyncio.create_task(get(fetcher, url))
            await gate.until_inside(1)
            waiter = asyncio.create_task(get(fetcher, url + "2"))
            await asyncio.sleep(0)
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
            assert type(await refused(fetcher, url + "3", timeout=0.02)) is Busy
            gate.open.set()
            assert await holder == await get(fetcher, url + "2") == MEDIUM

    run(main())


def test_the_environment_has_no_say_in_where_a_fetch_goes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://10.0.0.1:3128")

    async def main() -> None:
        async with serving(answer(body=MEDIUM)) as port, fetching() as (fetcher, _, dialled):
            assert await get(fetcher, f"http://media.test:{port}/") == MEDIUM
            assert dialled.addresses == ["127.0.0.1"]

    run(main())


def test_the_systems_resolver_knows_this_machine_and_no_label_that_is_too_long(run: Run) -> None:
    async def main() -> None:
        resolver = SystemResolver()
        assert "127.0.0.1" in await resolver.resolve("localhost")
        with pytest.raises(OSError):
            await resolver.resolve("a" * 64)
        resolver.close()

    run(main())


def test_an_invalid_request_stays_one(run: Run) -> None:
    async def main() -> None:
        async with fetching() as (fetcher, _, _):
            assert type(await refused(fetcher, "")) is InvalidRequest

    run(main())


def test_connections_of_two_hosts_at_one_address_are_not_mixed(run: Run) -> None:
    async def main() -> None:
        hosts: list[str] = []

        async def handler(request: web.BaseRequest) -> web.Response:
            hosts.append(request.headers["Host"].partition(":")[0])
            return web.Response(body=MEDIUM)

        table = Table(one_test=["127.0.0.1"], two_test=["127.0.0.1"])
        async with serving(handler) as port, fetching(resolver=table) as (fetcher, _, dialled):
            for name in ("one.test", "two.test") * 2:
                await get(fetcher, f"http://{name}:{port}/")
            assert hosts == ["one.test", "two.test"] * 2
            assert table.asked == ["one.test", "two.test"]
            assert len(dialled.addresses) == 2

    run(main())


def test_a_name_that_means_something_else_by_now_is_judged_before_it_is_dialled_again(run: Run) -> None:
    async def main() -> None:
        table = Table(media_test=["127.0.0.1"])

        async def handler(_request: web.BaseRequest) -> web.Response:
            response = web.Response(body=MEDIUM)
            response.force_close()
            return response

        async with serving(handler) as port, fetching(LOCAL, resolver=table) as (fetcher, _, dialled):
            assert await get(fetcher, f"http://media.test:{port}/") == MEDIUM
            table.names["media.test"] = ["169.254.169.254"]
            assert type(await refused(fetcher, f"http://media.test:{port}/")) is Forbidden
            assert dialled.addresses == ["127.0.0.1"]

    run(main())


def test_idle_connections_do_not_pile_up(run: Run) -> None:
    async def main() -> None:
        opened = 0
        closed = asyncio.Condition()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal opened
            opened += 1
            await drain_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
            await reader.read()
            writer.close()
            async with closed:
                opened -= 1
                closed.notify_all()

        names = [f"h{number}_test" for number in range(8)]
        table = Table(**{name: ["127.0.0.1"] for name in names})
        async with serving_raw(handler) as port, fetching(connections=3, resolver=table) as (fetcher, _, _):
            for name in table.names:
                assert await get(fetcher, f"http://{name}:{port}/") == b"hello"
            async with closed:
                await closed.wait_for(lambda: opened == 6)
            await fetcher.close()
            async with closed:
                await closed.wait_for(lambda: opened == 0)

    run(main())


def test_a_hundred_fetches_of_one_url_are_one_download(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(gate) as port, fetching(connections=1, waiting=0) as (fetcher, _, dialled):
            spellings = (f"http://media.test:{port}/a%20b", f"HTTP://Media.Test.:{port}/a%20b#x")
            tasks = [asyncio.create_task(get(fetcher, spellings[number % 2])) for number in range(100)]
            await gate.until_inside(1)
            gate.open.set()
            assert await asyncio.gather(*tasks) == [MEDIUM] * 100
            assert (gate.inside, len(dialled.addresses)) == (1, 1)
            # Nothing is kept: who asks later starts a new download.
            assert await get(fetcher, spellings[0]) == MEDIUM
            assert gate.inside == 2

    run(main())


def test_downloads_count_once_however_many_wait_and_as_long_as_somebody_has_them(run: Run) -> None:
    async def main() -> None:
        memory, metrics = MediaMemory(LIMIT), Metrics()
        async with serving(answer(body=MEDIUM)) as port, fetching(memory=memory, metrics=metrics) as (fetcher, _, _):
            url = f"http://media.test:{port}/"
            replies = await asyncio.gather(*(fetcher.fetch(url) for _ in range(20)))
            assert memory.nbytes == len(MEDIUM)
            replies.clear()
            await asyncio.sleep(0)  # the loop lets go of the tasks
            assert memory.nbytes == 0
            replies.append(await fetcher.fetch(url))
            assert memory.nbytes == len(MEDIUM)
            assert {(name, *labels): value for name, labels, value in metrics.snapshot().counters} == {
                ("mmprep_fetch_joins_total",): 19,
                ("mmprep_fetches_total", ("outcome", "ok")): 2,
            }

    run(main())


def test_after_all_was_forgotten_nobody_joins_what_was_asked_for_before_and_who_waited_gets_it(run: Run) -> None:
    async def main() -> None:
        asked: asyncio.Queue[asyncio.Event] = asyncio.Queue()
        number = 0

        async def handler(_request: web.BaseRequest) -> web.Response:
            nonlocal number
            number += 1
            body, may_answer = bytes([number]) * 10, asyncio.Event()
            asked.put_nowait(may_answer)
            await may_answer.wait()
            return web.Response(body=body)

        async with serving(handler) as port, fetching(recent=60.0) as (fetcher, _, _):
            url = f"http://media.test:{port}/"
            former = asyncio.create_task(fetcher.fetch(url))
            let_former = await asked.get()
            fetcher.forget()
            newer = asyncio.create_task(fetcher.fetch(url))
            (await asked.get()).set()
            in_use = await newer
            let_former.set()
            assert ((await former).data, in_use.data) == (b"\1" * 10, b"\2" * 10)
            # That one landed later does not make it the newer one.
            assert await fetcher.fetch(url) is in_use
            fetcher.forget()
            newest = asyncio.create_task(fetcher.fetch(url))
            (await asked.get()).set()
            assert (await newest).data == b"\3" * 10

    run(main())


@pytest.mark.parametrize(
    ("control", "recent", "joins"),
    [("max-age=60", 60.0, True), ("max-age=60", 0.0, False), ("no-cache", 60.0, False), ("no-store", 60.0, False)],
)
def test_who_comes_a_moment_late_gets_what_is_in_use_where_its_host_lets_it_be_kept(
    run: Run, control: str, recent: float, joins: bool
) -> None:
    async def main() -> None:
        asked = 0

        async def handler(_request: web.BaseRequest) -> web.Response:
            nonlocal asked
            asked += 1
            return web.Response(body=MEDIUM, headers={"Cache-Control": control, "ETag": '"1"'})

        async with serving(handler) as port, fetching(recent=recent) as (fetcher, _, _):
            url = f"http://media.test:{port}/"
            in_use = await fetcher.fetch(url)
            late = await fetcher.fetch(url)
            assert (late is in_use, asked) == (joins, 1 if joins else 2)
            del in_use, late
            await fetcher.fetch(url)
            assert asked == (2 if joins else 3)

    run(main())


def test_what_downloads_take_together_is_bounded_and_who_comes_too_late_is_told_to_come_again(run: Run) -> None:
    async def main() -> None:
        on, gone = asyncio.Event(), asyncio.Event()

        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            if request.path == "/first":
                await response.write(MEDIUM)
                await on.wait()
                return response
            try:
                while True:
                    await response.write(MEDIUM)
            finally:
                gone.set()

        memory = MediaMemory(10 * LIMIT)
        async with serving(handler) as port, fetching(memory=memory, max_bytes=20 * LIMIT) as (fetcher, _, _):
            first = asyncio.create_task(get(fetcher, f"http://media.test:{port}/first"))
            while not memory.nbytes:
                await asyncio.wait([first], timeout=0.01)
            error = await refused(fetcher, f"http://media.test:{port}/endless")
            assert type(error) is Busy
            assert error.retry_after
            await gone.wait()
            on.set()
            assert await first == MEDIUM
            del first
            assert memory.nbytes == 0

    run(main())


def test_one_who_gives_up_takes_the_download_from_nobody_and_the_last_one_ends_it(run: Run) -> None:
    async def main() -> None:
        asked, out, hung_up = asyncio.Event(), asyncio.Event(), asyncio.Event()
        requests = 0

        async def handler(_request: web.BaseRequest) -> web.Response:
            nonlocal requests
            requests += 1
            asked.set()
            try:
                await (asyncio.Event() if requests == 2 else out).wait()
            except asyncio.CancelledError:
                hung_up.set()
                raise
            return web.Response(body=MEDIUM)

        async with serving(handler) as port, fetching() as (fetcher, _, _):
            url = f"http://media.test:{port}/"

            async def three() -> list[asyncio.Task[bytes]]:
                asked.clear()
                tasks = [asyncio.create_task(get(fetcher, url)) for _ in range(3)]
                await asked.wait()
                return tasks

            first, *others = await three()
            first.cancel()
            # One whose time is over has not more say than one who was cancelled.
            assert type(await refused(fetcher, url, timeout=0.01)) is FetchTimeout
            out.set()
            assert await asyncio.gather(*others) == [MEDIUM] * 2
            assert first.cancelled()
            assert not hung_up.is_set()

            tasks = await three()
            for task in tasks:
                task.cancel()
            # It comes while the old flight is still ending, and is not drawn into that.
            late = asyncio.create_task(get(fetcher, url))
            await asyncio.wait(tasks)
            assert await late == MEDIUM
            await hung_up.wait()
            assert requests == 3

    run(main())


def test_a_flight_outlives_the_deadline_of_the_one_who_started_it(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(gate) as port, fetching() as (fetcher, _, _):
            url = f"http://media.test:{port}/"
            hasty = asyncio.create_task(get(fetcher, url, timeout=0.1))
            patient = asyncio.create_task(get(fetcher, url))
            with pytest.raises(FetchTimeout):
                await hasty
            gate.open.set()
            assert await patient == MEDIUM
            assert gate.inside == 1

    run(main())


def at_most(limit: int, sizes: list[int] | None = None) -> Callable[[int], None]:
    """Return what lets a medium have so many bytes, and notes what it is told."""

    def hold(size: int) -> None:
        if sizes is not None:
            sizes.append(size)
        if size > limit:
            raise TooLarge(f"above {limit}", param=PARAM)

    return hold


def test_a_medium_that_is_announced_with_more_than_who_asks_may_have_is_not_read(run: Run) -> None:
    async def main() -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {LIMIT}\r\n\r\n".encode()
        async with serving_raw(raw_answer(head)) as port, fetching() as (fetcher, _, _):
            error = await refused(fetcher, f"http://media.test:{port}/", hold=at_most(LIMIT - 1))
            assert error.message == f"above {LIMIT - 1}"

    run(main())


def test_who_may_not_have_so_much_leaves_and_the_others_get_the_medium(run: Run) -> None:
    async def main() -> None:
        begun, out = asyncio.Event(), asyncio.Event()
        sizes: list[int] = []

        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(MEDIUM[:2000])
            begun.set()
            await out.wait()
            await response.write(MEDIUM[2000:])
            return response

        async with serving(handler) as port, fetching() as (fetcher, _, _):
            url = f"http://media.test:{port}/"
            free = asyncio.create_task(get(fetcher, url))
            told = asyncio.create_task(get(fetcher, url, hold=at_most(LIMIT, sizes)))
            bound = asyncio.create_task(refused(fetcher, url, hold=at_most(1500)))
            await begun.wait()
            assert type(await bound) is TooLarge
            # One who comes later is told at once what is known already.
            assert type(await refused(fetcher, url, hold=at_most(1999))) is TooLarge
            late = asyncio.create_task(refused(fetcher, url, hold=at_most(2500)))
            out.set()
            assert await asyncio.gather(free, told) == [MEDIUM] * 2
            assert type(await late) is TooLarge
            assert sizes == sorted(sizes)
            assert sizes[-1] == len(MEDIUM)

    run(main())


def test_where_the_last_who_waits_may_not_have_so_much_the_host_is_hung_up_on(run: Run) -> None:
    async def main() -> None:
        hung_up = asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                while True:
                    await response.write(b"x" * 1000)
            finally:
                hung_up.set()

        async with serving(handler) as port, fetching(max_bytes=1 << 40) as (fetcher, _, _):
            url = f"http://media.test:{port}/"
            limits = (3000, 50_000)
            errors = await asyncio.gather(*(refused(fetcher, url, hold=at_most(limit)) for limit in limits))
            assert [error.message for error in errors] == ["above 3000", "above 50000"]
            await hung_up.wait()

    run(main())


def test_another_try_is_counted_anew(run: Run) -> None:
    async def main() -> None:
        sizes: list[int] = []
        asked = 0

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            await drain_head(reader)
            asked += 1
            length = 5000 if asked == 1 else 700
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode() + bytes(700))
            writer.close()
            await writer.wait_closed()

        async with serving_raw(handler) as port, fetching() as (fetcher, _, _):
            assert await get(fetcher, f"http://media.test:{port}/", hold=at_most(5000, sizes)) == bytes(700)
            assert sizes[-1] == 700
            assert max(sizes) == 5000

    run(main())


def test_whether_another_try_fits_is_judged_by_the_latest_deadline(run: Run) -> None:
    async def main() -> None:
        host = Failing(1, status=503, headers={"Retry-After": "1"})
        async with serving(host) as port, fetching() as (fetcher, _, _):
            url = f"http://media.test:{port}/"
            hasty = asyncio.create_task(get(fetcher, url, timeout=0.9))
            patient = asyncio.create_task(get(fetcher, url))
            with pytest.raises(FetchBadGateway):
                await hasty
            assert await patient == MEDIUM

    run(main())


def test_all_who_wait_are_told_of_a_failure_each_with_the_place_in_its_own_request(run: Run) -> None:
    async def main() -> None:
        async with serving(answer(status=404)) as port, fetching() as (fetcher, _, _):
            fetches = (get(fetcher, f"http://media.test:{port}/", param=f"part {n}") for n in range(3))
            errors = await asyncio.gather(*fetches, return_exceptions=True)
            assert [(type(error), getattr(error, "param", "")) for error in errors] == [
                (FetchError, f"part {n}") for n in range(3)
            ]

    run(main())


def test_closing_ends_the_fetches_under_way(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(gate) as port, fetching() as (fetcher, _, _):
            task = asyncio.create_task(get(fetcher, f"http://media.test:{port}/"))
            await gate.until_inside(1)
            await fetcher.close()
            with pytest.raises(ServiceUnavailable):
                await task

    run(main())


class Failing:
    """A server that fails some times in its way, then serves."""

    def __init__(self, times: int, **failure: Any) -> None:
        self.times = times
        self.failure = failure
        self.asked = 0

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        self.asked += 1
        if self.asked > self.times:
            return web.Response(body=MEDIUM)
        if not self.failure:
            assert request.transport is not None
            request.transport.close()
        return web.Response(**self.failure)


@pytest.mark.parametrize("failure", [{"status": 500}, {"status": 503}, {"status": 429}, {}])
def test_a_host_that_fails_for_a_moment_is_asked_again(run: Run, failure: dict[str, int]) -> None:
    async def main() -> None:
        host = Failing(2, **failure)
        async with serving(host) as port, fetching() as (fetcher, _, _):
            assert await get(fetcher, f"http://media.test:{port}/") == MEDIUM
            assert host.asked == 3

    run(main())


@pytest.mark.parametrize(
    ("status", "tries", "code"), [(500, 3, 502), (429, 3, 422), (404, 1, 422), (403, 1, 422), (410, 1, 422)]
)
def test_what_does_not_pass_is_told_after_as_many_tries_as_make_sense(
    run: Run, status: int, tries: int, code: int
) -> None:
    async def main() -> None:
        host = Failing(9, status=status)
        async with serving(host) as port, fetching() as (fetcher, _, _):
            error = await refused(fetcher, f"http://media.test:{port}/")
            assert (error.code, host.asked) == (code, tries)
            assert str(status) in error.message

    run(main())


def test_a_host_that_asks_for_more_time_than_there_is_is_not_asked_again(run: Run) -> None:
    async def main() -> None:
        host = Failing(9, status=503, headers={"Retry-After": "3600"})
        async with serving(host) as port, fetching() as (fetcher, _, _):
            assert type(await refused(fetcher, f"http://media.test:{port}/")) is FetchBadGateway
            assert host.asked == 1

    run(main())


def test_a_host_is_left_alone_for_as_long_as_it_asks(run: Run) -> None:
    async def main() -> None:
        host = Failing(1, status=503, headers={"Retry-After": "1"})
        async with serving(host) as port, fetching() as (fetcher, _, _):
            started = asyncio.get_running_loop().time()
            assert await get(fetcher, f"http://media.test:{port}/") == MEDIUM
            assert asyncio.get_running_loop().time() - started >= 1.0

    run(main())


def test_whose_time_ends_between_two_tries_is_told_what_the_host_said(run: Run) -> None:
    async def main() -> None:
        host = Failing(1, status=503, headers={"Retry-After": "1"})
        async with serving(host) as port, fetching() as (fetcher, _, _):
            url = f"http://media.test:{port}/"
            patient = asyncio.create_task(get(fetcher, url))
            await asyncio.sleep(0)
            error = await refused(fetcher, url, timeout=0.5)
            assert type(error) is FetchBadGateway
            assert "503" in error.message
            assert await patient == MEDIUM

    run(main())


def test_a_fetch_between_two_tries_holds_no_connection_from_others(run: Run) -> None:
    async def main() -> None:
        host = Failing(1, status=503, headers={"Retry-After": "1"})
        async with serving(host) as port, fetching(connections=1, waiting=1) as (fetcher, _, _):
            pausing = asyncio.create_task(get(fetcher, f"http://media.test:{port}/"))
            other = asyncio.create_task(get(fetcher, f"http://media.test:{port}/other"))
            assert await other == MEDIUM
            assert not pausing.done()
            assert await pausing == MEDIUM

    run(main())


class Fickle:
    """A raw server that keeps connections, ends some of them when it is asked, and counts both.

    Parameters
    ----------
    lost:
        The numbers of the requests, from 0, that get no answer.
    """

    def __init__(self, lost: range) -> None:
        self.lost = lost
        self.asked = self.connections = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                await drain_head(reader)
                self.asked += 1
                if self.asked - 1 in self.lost:
                    break
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


def test_a_host_is_asked_and_dialled_no_more_often_than_there_are_tries_where_it_loses_kept_connections(
    run: Run,
) -> None:
    async def main() -> None:
        host = Fickle(lost=range(1, 99))
        async with serving_raw(host) as port, fetching() as (fetcher, _, dialled):
            url = f"http://media.test:{port}/"
            assert await get(fetcher, url) == b"hello"
            assert type(await refused(fetcher, url)) is FetchBadGateway
            # The first of the three tries went over the connection that was kept.
            assert (host.asked, host.connections, len(dialled.addresses)) == (1 + 3, 1 + 2, 1 + 2)
            assert type(await refused(fetcher, url)) is FetchBadGateway
            assert (host.asked, len(dialled.addresses)) == (1 + 3 + 3, 1 + 2 + 3)

    run(main())


def test_a_kept_connection_that_ends_when_it_is_used_costs_a_try_and_no_pause(run: Run) -> None:
    async def main() -> None:
        host = Fickle(lost=range(2, 3))
        async with (
            serving_raw(host) as port,
            # A pause would be longer than there is time.
            fetching(retry=RetryPolicy(tries=2, first=1e6, longest=1e6), chance=lambda: 0.9) as (fetcher, _, dialled),
        ):
            urls = [f"http://media.test:{port}/{number}" for number in range(2)]
            assert await asyncio.gather(*(get(fetcher, url) for url in urls)) == [b"hello"] * 2
            assert len(dialled.addresses) == 2
            # Of the two that are kept, one is lost; the other one might be, too, and is not tried.
            assert await get(fetcher, urls[0]) == b"hello"
            assert (host.asked, len(dialled.addresses)) == (4, 3)
            # What is lost anew is tried again after a pause only.
            host.lost = range(4, 99)
            assert type(await refused(fetcher, urls[0])) is FetchBadGateway
            assert (host.asked, len(dialled.addresses)) == (6, 4)

    run(main())
