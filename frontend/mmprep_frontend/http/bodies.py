"""Reading request bodies within bounds: bytes of one body, bytes and number of all that are held, and time.

A body is refused by its announced length before any of it is read. What is held counts until the request is answered,
because whoever renders it works on the same bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from mmprep.errors import Busy, DeadlineExceeded, InvalidRequest, TooLarge

#: Seconds after which a client that was told that all is full may try again.
RETRY_AFTER: Final = 1.0


class Bodies:
    """Reads bodies.

    Parameters
    ----------
    max_body:
        Largest body, in bytes.
    max_held:
        Bytes of all bodies that are being read or answered; at least ``max_body``.
    max_requests:
        How many requests with a body may be under way.
    seconds:
        How long a body may take to arrive.
    """

    def __init__(self, *, max_body: int, max_held: int, max_requests: int, seconds: float) -> None:
        self.max_body = max_body
        self._max_held = max(max_held, max_body)
        self._max_requests = max_requests
        self._seconds = seconds
        self._held = 0
        self._requests = 0

    @asynccontextmanager
    async def body(self, request: web.Request) -> AsyncIterator[bytes]:
        """Give the body of ``request``, which counts as held until the block ends.

        Raises
        ------
        mmprep.errors.TooLarge
            Above ``max_body``, announced or while reading.
        mmprep.errors.Busy
            Too many bytes or requests are held.
        mmprep.errors.InvalidRequest
            Encoded, or broken off within its framing.
        mmprep.errors.DeadlineExceeded
            It did not arrive in time.
        """
        announced = request.content_length or 0
        if announced > self.max_body:
            raise self.too_large()
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise InvalidRequest("this service takes no compressed bodies: leave Content-Encoding out")
        if self._requests >= self._max_requests:
            raise Busy("too many requests are under way; try again", retry_after=RETRY_AFTER)
        holding = _Holding(self)
        self._requests += 1
        try:
            holding.grow_to(announced)
            yield await self._read(request, holding)
        finally:
            self._requests -= 1
            holding.grow_to(0)

    def too_large(self) -> TooLarge:
        """Return the error for a body above ``max_body``."""
        return TooLarge(
            f"the body is larger than {self.max_body:,} bytes, this service's limit; give large media as URLs"
        )

    def resize(self, old: int, new: int) -> None:
        """Count ``new`` instead of ``old`` held bytes.

        Raises
        ------
        mmprep.errors.Busy
            That would be more than all may hold.
        """
        if new > old and self._held + new - old > self._max_held:
            raise Busy("the bodies of other requests fill this service's memory; try again", retry_after=RETRY_AFTER)
        self._held += new - old

    async def _read(self, request: web.Request, holding: _Holding) -> bytes:
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._seconds):
                async for chunk in request.content.iter_any():
                    size += len(chunk)
                    if size > self.max_body:
                        raise self.too_large()
                    holding.grow_to(max(size, holding.size))
                    chunks.append(chunk)
        except TimeoutError:
            raise DeadlineExceeded(f"the body did not arrive within {self._seconds:g} seconds") from None
        except web.RequestPayloadError:
            raise InvalidRequest("the body's transfer encoding is broken") from None
        return b"".join(chunks)


class _Holding:
    """The bytes that one request holds."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.size = 0

    def grow_to(self, size: int) -> None:
        self._bodies.resize(self.size, size)
        self.size = size
