"""An HTTP/1.1 client that costs as little as a load generator's must: kept connections, one request at a time on each.

It sends bytes that were encoded before, and calls back when the answer is whole; no task, stream or timer is made for a
request. Redirects, cookies and proxies are not followed: a load test means the server that was named.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias, cast
from urllib.parse import urlsplit

from mmprep.errors import InvalidRequest, MmprepError, ServiceUnavailable
from mmprep.loadtest.answer import Answer

#: Bytes of an answer's body that are kept: what an error says; and what a GET gives.
_ERROR: Final = 64 << 10
_GOT: Final = 64 << 20
#: Bytes that the system may hold of a request, so that one of a picture is sent in one go.
_SENT: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its status and body, or the beginning of that."""

    status: int
    body: bytes


#: Called with what became of a request.
Ended: TypeAlias = Callable[[Reply | MmprepError], None]


class HttpClient:
    """The connections to one server. To be used within one event loop.

    Parameters
    ----------
    url:
        ``http://host:port`` or ``https://…``, without a path.

    Attributes
    ----------
    host: for ``Host:``.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            raise InvalidRequest(f"{url} has no port that is a number") from None
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise InvalidRequest(f"{url} is not the URL of a server; it looks like http://127.0.0.1:8000")
        if parts.path not in {"", "/"} or parts.query or parts.fragment or parts.username is not None:
            raise InvalidRequest("the server's URL ends with its port; --path names the path")
        self.host = parts.netloc
        self._at = parts.hostname, port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._idle: list[_Connection] = []
        self._closing: set[asyncio.Future[None]] = set()

    def start(self, request: Sequence[bytes], ended: Ended, *, keep: int = _ERROR) -> Callable[[], None]:
        """Send a request.

        A kept connection that the server has closed meanwhile is replaced.

        Parameters
        ----------
        request:
            All of its bytes.
        ended:
            Called once, not before this has returned: with the reply, or with ServiceUnavailable where there is no
            connection, it broke, or what came is not HTTP.
        keep:
            Bytes of the answer's body that the reply has, at most.

        Returns
        -------
        What gives the request up; then ``ended`` is not called.
        """
        exchange = _Exchange(request, ended, keep)
        self.send(exchange)
        return exchange.give_up

    async def get(self, path: str, **headers: str) -> Reply:
        """Return what a GET of ``path`` gives; raises ServiceUnavailable as :meth:`start` tells it."""
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        request = f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n{lines}\r\n".encode()
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        give_up = self.start([request], partial(_settle, reply), keep=_GOT)
        try:
            return await reply
        finally:
            give_up()

    async def close(self) -> None:
        """Close the connections that are kept."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        if self._closing:
            await asyncio.wait(self._closing)

    def send(self, exchange: _Exchange) -> None:
        """Send a request on a kept connection, or on a new one."""
        if self._idle:
            self._idle.pop().take(exchange)
        else:
            exchange.connecting = asyncio.get_running_loop().create_task(self._connect(exchange))

    async def _connect(self, exchange: _Exchange) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(partial(_Connection, self), *self._at, ssl=self._tls)
        except OSError:
            exchange.end(ServiceUnavailable("the server cannot be reached"))
            return
        exchange.connecting = None
        connection.fresh = True
        connection.take(exchange)

    def opened(self, connection: _Connection) -> None:
        """There is another connection; its end will be waited for."""
        self._closing.add(connection.gone)
        connection.gone.add_done_callback(self._closing.discard)

    def idle(self, connection: _Connection) -> None:
        """A connection can be used again."""
        self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        """A connection has ended."""
        if connection in self._idle:
            self._idle.remove(connection)


def _settle(reply: asyncio.Future[Reply], outcome: Reply | MmprepError) -> None:
    if reply.done():
        return
    if isinstance(outcome, MmprepError):
        reply.set_exception(outcome)
    else:
        reply.set_result(outcome)


class _Exchange:
    """A request, until its end is told."""

    __slots__ = ("_ended", "connecting", "connection", "keep", "request")

    def __init__(self, request: Sequence[bytes], ended: Ended, keep: int) -> None:
        self.request = request
        self.keep = keep
        self.connection: _Connection | None = None
        self.connecting: asyncio.Task[None] | None = None
        self._ended: Ended | None = ended

    def end(self, outcome: Reply | MmprepError) -> None:
        """Tell what became of it, unless it was given up."""
        ended, self._ended, self.connection = self._ended, None, None
        if ended is not None:
            ended(outcome)

    def give_up(self) -> None:
        """Nobody waits for it any more; again is no error."""
        self._ended = None
        if self.connecting is not None:
            self.connecting.cancel()
        if self.connection is not None:
            self.connection.close()


class _Connection(asyncio.Protocol):
    """One connection.

    Attributes
    ----------
    fresh: whether it has not been used yet.
    gone: done when it has ended.
    """

    _transport: asyncio.Transport

    def __init__(self, client: HttpClient) -> None:
        self.fresh = False
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._client = client
        self._exchange: _Exchange | None = None
        self._answer = Answer(0)

    def take(self, exchange: _Exchange) -> None:
        """Send a request."""
        self._exchange, exchange.connection = exchange, self
        self._answer = Answer(exchange.keep)
        self._transport.writelines(exchange.request)

    def close(self) -> None:
        """End it, whatever is under way."""
        self._exchange = None
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not of the class
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SENT)
        self._client.opened(self)

    def data_received(self, data: bytes) -> None:
        exchange, answer = self._exchange, self._answer
        if exchange is None:  # nothing was asked
            self.close()
            return
        try:
            if not answer.feed(data):
                return
        except ServiceUnavailable as error:
            self.close()
            exchange.end(error)
            return
        self._finish(exchange)

    def connection_lost(self, _: Exception | None) -> None:
        self.gone.set_result(None)
        self._client.lost(self)
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        if not self._answer.begun:
            if self.fresh:
                exchange.end(ServiceUnavailable("the server closed the connection without an answer"))
            else:  # it met a connection that the server was closing
                exchange.connection = None
                self._client.send(exchange)
            return
        try:
            self._answer.end()
        except ServiceUnavailable as broke:
            exchange.end(broke)
        else:
            exchange.end(Reply(self._answer.status, self._answer.body))

    def _finish(self, exchange: _Exchange) -> None:
        self._exchange, self.fresh = None, False
        reply = Reply(self._answer.status, self._answer.body)
        if self._answer.reusable:
            self._client.idle(self)
        else:
            self._transport.abort()
        exchange.end(reply)
