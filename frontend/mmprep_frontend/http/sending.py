"""Sending an answer within bounds: a client that does not read is hung up on, and one that reads slowly is copied for.

A small answer is left to the library. Of a larger one, a piece at a time is made and written, while what is not written yet
counts as held. In one turn of the loop only one piece is made, of all answers: what else the loop has to do comes between.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from mmprep.errors import ServiceUnavailable
from mmprep_frontend.caller import Caller
from mmprep_frontend.http.connection import Connection
from mmprep_frontend.http.ports import Kept, Rendered
from mmprep_frontend.pace import Pace

_log = logging.getLogger(__name__)
#: Bytes of an answer up to which it is left to the library.
_SMALL: Final = 64 * 1024
#: Seconds that an answer may keep the memory of others while it is written.
_KEPT_SECONDS: Final = 2.0


class Sender:
    """Sends answers.

    Parameters
    ----------
    sign:
        Puts on an answer what every answer has.
    seconds:
        How long a client may read nothing of a large answer before it is hung up on.
    """

    def __init__(self, sign: Callable[[web.Request, web.StreamResponse], None], *, seconds: float) -> None:
        self._sign = sign
        self._seconds = seconds
        self._pace = Pace(1)

    async def send(self, request: web.Request, rendered: Rendered, caller: Caller) -> web.StreamResponse:
        """Return the answer; it is sent already if it is large, or if somebody has to know who read it.

        Raises
        ------
        Busy
            Answers on their way hold all the memory that they may.
        ServiceUnavailable
            As :meth:`mmprep_frontend.http.ports.Kept.written`, and nothing is sent.
        """
        try:
            caller.held.hold_answer(rendered.nbytes)
            return await self._sent(request, rendered, caller.encoding.media_type)
        finally:
            if rendered.kept is not None:
                rendered.kept.end()

    async def _sent(self, request: web.Request, rendered: Rendered, media_type: str) -> web.StreamResponse:
        size, unread = rendered.size, rendered.unread
        if size <= _SMALL and unread is None:
            body = b"".join(rendered.pieces())
            return web.Response(body=body, status=rendered.status, content_type=media_type)
        answer = web.StreamResponse(status=rendered.status, headers={"Content-Type": media_type})
        answer.content_length = size
        self._sign(request, answer)
        sent = False
        async with _keeping(rendered.kept):
            try:
                pieces = rendered.pieces()
                # Before the status: an error that comes with the first piece can still be told.
                first = await self._next(pieces)
                sent = await self._write(request, answer, first, pieces)
            finally:
                if unread is not None:
                    _watch(request, unread) if sent else unread()
        return answer

    async def _next(self, pieces: Iterator[bytes]) -> bytes | None:
        await self._pace.step()
        return next(pieces, None)

    async def _write(
        self, request: web.Request, answer: web.StreamResponse, piece: bytes | None, more: Iterator[bytes]
    ) -> bool:
        """Return whether all was sent. Where half of an answer was, no other can follow it on this connection."""
        try:
            await answer.prepare(request)
            left = answer.content_length or 0
            while piece is not None:
                async with asyncio.timeout(self._seconds):
                    await answer.write(piece)
                left -= len(piece)
                # Nothing waits behind the last one: a client that has it may go, and must not seem to have left early.
                piece = await self._next(more) if left else None
            async with asyncio.timeout(self._seconds):
                await answer.write_eof()
        except ConnectionError:  # nobody is there any more
            return False
        except (TimeoutError, ServiceUnavailable) as why:
            if isinstance(why, ServiceUnavailable):
                _log.warning("an answer was broken off: %s", why.message)
            _hang_up(request)
            return False
        except asyncio.CancelledError:
            _hang_up(request)
            raise
        return True


def _hang_up(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _watch(request: web.Request, unread: Callable[[], None]) -> None:
    assert isinstance(request.protocol, Connection)
    request.protocol.watch(unread)


@asynccontextmanager
async def _keeping(kept: Kept | None) -> AsyncIterator[None]:
    """Detach from what is kept where the block takes long."""
    if kept is None:
        yield
        return
    loop = asyncio.get_running_loop()
    detaching: list[asyncio.Task[None]] = []
    timer = loop.call_later(_KEPT_SECONDS, lambda: detaching.append(loop.create_task(kept.detach())))
    try:
        yield
    finally:
        timer.cancel()
        if detaching:  # else nothing is waited for: a client that has its answer may go
            detaching[0].cancel()
            await asyncio.gather(*detaching, return_exceptions=True)
