"""The load generator's HTTP client and its HTTP target, against a server on loopback that says what a test wants."""

import asyncio
import base64
import json

import pytest

from mmprep.errors import InvalidRequest, ServiceUnavailable
from mmprep.loadtest.answer import Answer
from mmprep.loadtest.http import HttpClient, Reply
from mmprep.loadtest.targets import HttpTarget
from mmprep.loadtest.workloads import Ask, Picture, Turn

ANSWERS = {
    "of known length": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", Reply(200, b"hello"), True),
    "in chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nTrailer: x\r\n\r\n",
        Reply(200, b"hello"),
        True,
    ),
    "to the end": (b"HTTP/1.1 200 OK\r\n\r\nhello", Reply(200, b"hello"), False),
    "empty": (b"HTTP/1.1 204 No Content\r\n\r\n", Reply(204, b""), True),
    "behind a first word": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        Reply(404, b""),
        True,
    ),
    "of a server that closes": (
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
        Reply(200, b"hello"),
        False,
    ),
    "of an old server": (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", Reply(200, b"hello"), False),
}
BROKEN = {
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n\r\n", "not HTTP"),
    "a head that breaks off": (b"HTTP/1.1 200 OK\r\nContent-", "broke"),
    "a body that breaks off": (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello", "broke"),
    "chunks that break off": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", "broke"),
    "no length": (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "not HTTP"),
    "too long": (b"HTTP/1.1 200 OK\r\nContent-Length: 9000000000\r\n\r\n", "longer than"),
    "negative": (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "longer than"),
    "nothing": (b"", "without an answer"),
}


class Server:
    """Answers each request with the same bytes.

    Attributes
    ----------
    asked: heads and bodies.
    connections: how many were made.
    """

    def __init__(self, answer, *, keeps):
        self._answer, self._keeps = answer, keeps
        self.asked, self.connections, self.writers = [], 0, []

    async def serve(self, reader, writer):
        self.connections += 1
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.split(b": ") for line in head[:-4].split(b"\r\n")[1:])
                self.asked.append((head, await reader.readexactly(int(fields.get(b"Content-Length", 0)))))
                writer.write(self._answer)
                if not self._keeps:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


def with_server(answer, use, *, keeps=True):
    async def main():
        server = Server(answer, keeps=keeps)
        async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listening:
            client = HttpClient(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
            result = await use(client, server)
            await client.close()
            return result, server

    return asyncio.run(main())


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_read_however_it_ends_and_its_connection_kept_where_that_is_possible(name):
    answer, expected, kept = ANSWERS[name]

    async def ask(client, _server):
        return [await client.get("/x", X_Y="z") for _ in range(3)]

    replies, server = with_server(answer, ask, keeps=kept)
    assert replies == [expected] * 3
    assert server.connections == (1 if kept else 3)
    assert server.asked[0][0].startswith(b"GET /x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"X-Y: z\r\n" in server.asked[0][0]


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_answer_is_an_error_that_says_so(name):
    answer, words = BROKEN[name]

    async def ask(client, _server):
        with pytest.raises(ServiceUnavailable, match=words):
            await client.get("/")

    with_server(answer, ask, keeps=False)


def test_a_kept_connection_that_the_server_has_closed_is_replaced():
    async def ask(client, server):
        first = await client.get("/")
        server.writers[0].close()
        await server.writers[0].wait_closed()
        return first, await client.get("/")

    (first, second), server = with_server(ANSWERS["of known length"][0], ask)
    assert first == second
    assert server.connections == 2


def test_many_at_once_have_a_connection_each():
    async def ask(client, _server):
        return await asyncio.gather(*(client.get("/") for _ in range(8)))

    _, server = with_server(ANSWERS["of known length"][0], ask)
    assert server.connections == 8


@pytest.mark.parametrize(
    "url", ["here", "ftp://here", "http://", "http://here:port", "http://here/path", "http://a:b@here", "http://here?x"]
)
def test_what_is_no_servers_url_is_told(url):
    with pytest.raises(InvalidRequest):
        HttpClient(url)


def test_a_server_that_is_not_there_is_told():
    async def main():
        async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as closed:
            port = closed.sockets[0].getsockname()[1]
        with pytest.raises(ServiceUnavailable, match="cannot be reached"):
            await HttpClient(f"http://127.0.0.1:{port}").get("/")

    asyncio.run(main())


ASK = Ask((Turn("user", "look", (Picture("a", b"\xff\xd8a"),)), Turn("assistant", "seen"), Turn("user", "again")))


def outcome(answer, *, keeps=True):
    async def ask(client, _server):
        target = HttpTarget(f"http://{client.host}", path="/render", fields={"mm_payload": "none"}, key="secret")
        ended = asyncio.get_running_loop().create_future()
        target.start(target.prepare(ASK).request, ended.set_result)
        result = await ended
        await target.close()
        return result

    return with_server(answer, ask, keeps=keeps)


def test_a_chat_is_sent_as_json_with_its_pictures_in_data_urls():
    result, server = outcome(ANSWERS["of known length"][0])
    assert result == "ok"
    ((head, body),) = server.asked
    assert head.startswith(b"POST /render HTTP/1.1\r\n")
    assert b"Authorization: Bearer secret\r\n" in head
    url = "data:image/jpeg;base64," + base64.b64encode(b"\xff\xd8a").decode()
    assert json.loads(body) == {
        "mm_payload": "none",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "look"}],
            },
            {"role": "assistant", "content": "seen"},
            {"role": "user", "content": "again"},
        ],
    }


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        ("429 X", b'{"error": {"type": "OverloadedError"}}', "429 OverloadedError"),
        ("500 X", b"<html>", "500"),
        ("400 X", b'{"error": {"type": "<script>"}}', "400"),
        ("400 X", b'{"error": 5}', "400"),
        ("302 X", b"", "302"),
    ],
)
def test_an_error_is_named_by_its_status_and_type(status, body, expected):
    result, _ = outcome(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert result == expected


def test_a_server_that_breaks_off_is_an_error_of_the_request_and_not_of_the_run():
    assert outcome(b"", keeps=False)[0] == "ServiceUnavailableError"


@pytest.mark.parametrize("connected", [False, True])
def test_a_request_that_is_given_up_is_told_nothing_and_its_connection_is_not_used_again(connected):
    async def ask(client, _server):
        if connected:
            await client.get("/")
        give_up = client.start([b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n"], pytest.fail)
        give_up()
        give_up()
        return await client.get("/")

    reply, server = with_server(ANSWERS["of known length"][0], ask)
    assert reply.body == b"hello"
    assert server.connections == 1 + connected


@pytest.mark.parametrize("name", ["of known length", "in chunks", "behind a first word"])
def test_an_answer_is_the_same_in_whatever_pieces_it_comes(name):
    data, expected, _ = ANSWERS[name]
    for size in range(1, len(data)):
        answer = Answer(100)
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        whole = [answer.feed(piece) for piece in pieces]
        assert whole == [False] * (len(pieces) - 1) + [True]
        assert (answer.status, answer.body, answer.reusable) == (expected.status, expected.body, True)


def test_of_a_long_answer_only_the_beginning_is_kept_and_all_of_it_is_awaited():
    answer = Answer(3)
    assert not answer.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabcdef")
    assert not answer.feed(b"x" * 993)
    assert answer.feed(b"y")
    assert answer.body == b"abc"
    assert answer.reusable
