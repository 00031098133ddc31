"""The pins of a chat whose tensors travel in its answer: they hold while it is written, for a while.

Nothing is copied for a client that reads. One that reads slowly gets a copy of what it has not read yet, so that it does not
keep the ring's memory from others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mmprep.errors import ServiceUnavailable
from mmprep_frontend.render.written import Encoded, written
from mmprep_frontend.rendered import RenderedChat
from mmprep_frontend.service import Service
from mmprep_frontend.tracing.spans import recording


class Pinned:
    """Implements :class:`mmprep_frontend.http.ports.Kept`.

    Parameters
    ----------
    service:
        What has rendered the chat.
    chat:
        Whose pins hold; they end with this.
    """

    def __init__(self, service: Service, chat: RenderedChat) -> None:
        self._service = service
        self._chat = chat
        self._body: Encoded = ()
        self._lost: ServiceUnavailable | None = None
        self._holds = True
        self._seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the block's time for encoding the answer."""
        started = time.monotonic()
        try:
            with recording("serialize"):
                yield
        finally:
            self._seconds += time.monotonic() - started

    def written(self, body: Encoded) -> Iterator[bytes]:
        """Yield the answer's bytes; each piece is checked after it was copied from the ring."""
        self._body = body
        pieces = written(body)
        while True:
            started = time.monotonic()
            piece = next(pieces, None)
            if piece is None:
                return
            if self._holds:
                self._check()
            if self._lost is not None:
                raise self._lost
            self._seconds += time.monotonic() - started
            yield piece

    async def detach(self) -> None:
        """Copy the tensors, and let go of the pins."""
        await self._service.on_thread(self._copy)
        try:
            self._check()
        except ServiceUnavailable as error:
            self._lost = error
        self._let_go()

    def end(self) -> None:
        """Let go of the pins; the answer is written, or nobody wants it any more."""
        self._let_go()
        self._service.observe("serialize", self._seconds)

    def _check(self) -> None:
        if self._chat.offered is not None:
            self._chat.offered.check()

    def _copy(self) -> None:
        for part in self._body:
            if not isinstance(part, bytes):
                part.detach()

    def _let_go(self) -> None:
        if self._holds:
            self._holds = False
            self._chat.release()
