"""An HTTP/1.1 client that costs as little as a load generator's must: kept connections, one request at a time on each.

It sends a head and a body that were encoded before, and reads an answer of known length, in chunks, or to the end of the
connection. Redirects, cookies and proxies are not followed: a load test means the server that was named.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from mmprep.errors import InvalidRequest, ServiceUnavailable

#: Bytes of an answer's head, and of an answer, at most.
_MOST_HEAD: Final = 64 << 10
_MOST_BODY: Final = 1 << 30
#: What is read at a time.
_LIMIT: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its status and body."""

    status: int
    body: bytes


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
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, head: bytes, body: bytes) -> Reply:
        """Send one request; ``head`` ends with the empty line.

        A kept connection that the server has closed meanwhile is replaced once.

        Raises
        ------
        mmprep.errors.ServiceUnavailable
            There is no connection, it broke, or what came is not HTTP.
        """
        while self._idle:
            connection = self._idle.pop()
            try:
                return await self._exchange(connection, head, body)
            except _Gone:
                continue
        try:
            opened = await asyncio.open_connection(*self._at, ssl=self._tls, limit=_LIMIT)
        except OSError:
            raise ServiceUnavailable("the server cannot be reached") from None
        try:
            return await self._exchange(opened, head, body)
        except _Gone:
            raise ServiceUnavailable("the server closed the connection without an answer") from None

    async def get(self, path: str, **headers: str) -> Reply:
        """Return what a GET of ``path`` gives."""
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        return await self.send(f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n{lines}\r\n".encode(), b"")

    async def close(self) -> None:
        """Close the connections that are kept."""
        for _, writer in self._idle:
            writer.close()
        for _, writer in self._idle:
            try:
                await writer.wait_closed()
            except OSError:
                continue
        self._idle.clear()

    async def _exchange(
        self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], head: bytes, body: bytes
    ) -> Reply:
        reader, writer = connection
        keep = False
        try:
            writer.writelines((head, body))
            await writer.drain()
            reply, keep = await _read(reader)
        except OSError:
            raise _Gone from None
        finally:
            if keep:
                self._idle.append(connection)
            else:
                writer.close()
        return reply


class _Gone(Exception):
    """The connection ended before an answer began."""


async def _read(reader: asyncio.StreamReader) -> tuple[Reply, bool]:
    """Return an answer, and whether the connection can be kept."""
    while True:
        version, status, fields = await _read_head(reader)
        if status >= 200:
            break
    keep = version == b"HTTP/1.1" and b"close" not in fields.get(b"connection", b"").lower()
    if status in {204, 304}:
        return Reply(status, b""), keep
    try:
        if b"chunked" in fields.get(b"transfer-encoding", b"").lower():
            return Reply(status, await _read_chunks(reader)), keep
        if b"content-length" in fields:
            return Reply(status, await reader.readexactly(_size(fields[b"content-length"], 10))), keep
        return Reply(status, await _read_rest(reader)), False
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        raise ServiceUnavailable("the connection broke before the answer was complete") from None


async def _read_head(reader: asyncio.StreamReader) -> tuple[bytes, int, dict[bytes, bytes]]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise ServiceUnavailable("the connection broke before the answer was complete") from None
        raise _Gone from None
    except asyncio.LimitOverrunError:
        raise _not_http() from None
    first, *lines = head[:-4].split(b"\r\n")
    version, _, rest = first.partition(b" ")
    if len(head) > _MOST_HEAD or not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise _not_http()
    fields = (line.partition(b":") for line in lines)
    return version, int(rest[:3]), {name.lower(): value.strip() for name, _, value in fields}


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    chunks, total = [], 0
    while True:
        line = await reader.readuntil(b"\r\n")
        size = _size(line.partition(b";")[0].strip(), 16)
        total += size
        if total > _MOST_BODY:
            raise _too_long()
        if not size:
            break
        chunks.append(await reader.readexactly(size))
        await reader.readexactly(2)
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass
    return b"".join(chunks)


async def _read_rest(reader: asyncio.StreamReader) -> bytes:
    pieces, total = [], 0
    while piece := await reader.read(_LIMIT):
        pieces.append(piece)
        total += len(piece)
        if total > _MOST_BODY:
            raise _too_long()
    return b"".join(pieces)


def _size(digits: bytes, base: int) -> int:
    try:
        size = int(digits, base)
    except ValueError:
        raise _not_http() from None
    if not 0 <= size <= _MOST_BODY:
        raise _too_long()
    return size


def _not_http() -> ServiceUnavailable:
    return ServiceUnavailable("the server's answer is not HTTP")


def _too_long() -> ServiceUnavailable:
    return ServiceUnavailable(f"the server's answer is longer than {_MOST_BODY:,} bytes")
