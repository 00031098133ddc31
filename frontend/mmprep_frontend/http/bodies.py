"""Reading request bodies within bounds: bytes of one body, what all may hold (:mod:`mmprep_frontend.room`), and time.

A body is refused by its announced length before any of it is read. What is held counts until the request is answered,
because whoever renders it works on the same bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from mmprep.errors import DeadlineExceeded, InvalidRequest, TooLarge
from mmprep_frontend.room import Held, Room


class Bodies:
    """Reads bodies.

    Parameters
    ----------
    max_body:
        Largest body, in bytes.
    room:
        Bounds the bodies and answers of all requests.
    seconds:
        How long a body may take to arrive.
    """

    def __init__(self, *, max_body: int, room: Room, seconds: float) -> None:
        self.max_body = max_body
        self._room = room
        self._seconds = seconds

    @asynccontextmanager
    async def body(self, request: web.Request) -> AsyncIterator[tuple[bytes, Held]]:
        """Give the body of ``request``, and what it holds until the block ends.

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
        with self._room.enter() as held:
            held.hold_body(announced)
            yield await self._read(request, held), held

    def too_large(self) -> TooLarge:
        """Return the error for a body above ``max_body``."""
        return TooLarge(
            f"the body is larger than {self.max_body:,} bytes, this service's limit; give large media as URLs"
        )

    async def _read(self, request: web.Request, held: Held) -> bytes:
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._seconds):
                async for chunk in request.content.iter_any():
                    size += len(chunk)
                    if size > self.max_body:
                        raise self.too_large()
                    held.hold_body(max(size, held.body_bytes))
                    chunks.append(chunk)
        except TimeoutError:
            raise DeadlineExceeded(f"the body did not arrive within {self._seconds:g} seconds") from None
        except web.RequestPayloadError:
            raise InvalidRequest("the body's transfer encoding is broken") from None
        return b"".join(chunks)
