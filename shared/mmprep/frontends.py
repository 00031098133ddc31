"""A native client's connections to all frontends of a service: each call goes to the one with the fewest, and to another one where
its frontend goes away.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import zmq

import mmprep
from mmprep.errors import CLOSED, DeadlineExceeded, InvalidRequest, MmprepError, ServiceUnavailable, TooLarge
from mmprep.runtime import RuntimeDir
from mmprep.wire import messages
from mmprep.wire.calls import CallTable, succeeded
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.sockets import Link

#: What a request says beside its body: ``traceparent``, ``tracestate``, and its key for being sent again.
Beside: TypeAlias = tuple[str | None, str | None, str | None]

_FRAME_LIMIT = 1 << 32
#: How often a call is sent again because its frontend went away: one that brings them down must not take them all.
_MOST_RESENDS = 2
#: Seconds between two looks for frontends that have come or gone.
_LOOK_SECONDS = 1.0
#: Milliseconds for which closing waits at most until a frontend's socket has taken what it was told last.
_LAST_WORDS_MS = 200


class _Frames(NamedTuple):
    """An answer as it came: what it is, and the frames behind that."""

    message: messages.Response | messages.Rendered
    frames: list[zmq.Frame]


class _FrontendLink:
    """The connection to one frontend.

    Parameters
    ----------
    on_unwanted:
        Called with the frames of an answer that nobody waits for any more.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        client_id: str,
        changed: asyncio.Event,
        on_unwanted: Callable[[list[zmq.Frame]], None],
    ) -> None:
        self.endpoint = endpoint
        self._client_id = client_id
        self._changed = changed
        self._on_unwanted = on_unwanted
        self.calls = CallTable()
        self.up = False
        self.max_frame = 0
        self.refused: MmprepError | None = None
        self.link = Link(
            context,
            endpoint,
            f"client:{client_id}",
            greeting=self._greeting,
            on_message=self._on_message,
            on_down=self._on_down,
            frame_limit=_FRAME_LIMIT,
            copy=False,
        )

    def close(self) -> None:
        """Disconnect; calls under way fail, and the frontend is told that nobody waits for them."""
        if self.up:
            for number in self.calls:
                self.link.send([pack(messages.Cancel(number))])
        self.link.close(linger_ms=_LAST_WORDS_MS)
        self.up = False
        self.calls.fail_all(InvalidRequest, CLOSED)

    def _greeting(self) -> list[bytes]:
        return [pack(messages.Hello(PROTOCOL, mmprep.__version__, "client", self._client_id, os.getpid()))]

    def _on_down(self) -> None:
        self.up = False
        self.calls.fail_all(_FrontendLost, "the frontend went away")

    def _on_message(self, frames: list[zmq.Frame]) -> None:
        message = unpack(frames[0].buffer, messages.FromFrontend)
        match message:
            case messages.FrontendWelcome():
                self.up, self.refused, self.max_frame = True, None, message.max_frame
                self._changed.set()
            case messages.Refused():
                self.refused = message.fault.error()
                self.link.reopen()
                self._changed.set()
            case messages.Failed():
                self.calls.resolve(message.call, message.fault.error())
            case messages.Response() | messages.Rendered():
                answer = _Frames(message, frames[1:])
                if not self.calls.resolve(message.call, answer):
                    self.unwanted(answer)

    def unwanted(self, answer: _Frames) -> None:
        """An answer has come that nobody waits for any more."""
        if isinstance(answer.message, messages.Rendered):
            self._on_unwanted(answer.frames)


class _FrontendLost(ServiceUnavailable):
    """The call was under way at a frontend that is gone."""


class Frontends:
    """The connections.

    Parameters
    ----------
    context:
        Of the sockets.
    runtime:
        Where frontends are found.
    client_id:
        The name under which this client is greeted.
    on_unwanted:
        Called with the frames of an answer that nobody waits for any more.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        runtime: RuntimeDir,
        client_id: str,
        on_unwanted: Callable[[list[zmq.Frame]], None],
    ) -> None:
        self._context = context
        self._runtime = runtime
        self._id = client_id
        self._on_unwanted = on_unwanted
        self._links: list[_FrontendLink] = []
        self._changed = asyncio.Event()
        self._closed = False
        self._look()

    async def ready(self, seconds: float) -> None:
        """Wait until one can be asked; raises ServiceUnavailable where there is none, or none answers in so many seconds."""
        if not self._links:
            raise ServiceUnavailable("no service runs in this runtime directory; start it with: mmprep serve")
        try:
            async with asyncio.timeout(seconds):
                await self._any_up()
        except TimeoutError:
            raise ServiceUnavailable(
                "no frontend answers; is the service running? start it with: mmprep serve"
            ) from None

    def close(self) -> None:
        """Disconnect; calls under way fail, and their work ends."""
        self._closed = True
        for link in self._links:
            link.close()
        self._links = []
        self._changed.set()

    def _look(self) -> None:
        """Connect to frontends that have come, and forget those that have gone for good."""
        self._looked_at = time.monotonic()
        there = self._runtime.frontends()
        for frontend in [one for one in self._links if not one.up and one.endpoint not in there]:
            frontend.close()
            self._links.remove(frontend)
        known = {frontend.endpoint for frontend in self._links}
        for endpoint in there:
            if endpoint not in known:
                link = _FrontendLink(self._context, endpoint, self._id, self._changed, self._on_unwanted)
                self._links.append(link)

    async def send(
        self,
        operation: messages.Operation,
        encoded: bytes,
        attachments: list[Any],
        seconds: float,
        beside: Beside,
    ) -> list[zmq.Frame]:
        """Send a call and return the frames behind its answer's header.

        Parameters
        ----------
        operation, encoded, attachments:
            What is asked, its body, and the frames behind that.
        seconds:
            Until the answer is there, further tries included.

        Raises
        ------
        DeadlineExceeded
            No answer has come in time.
        ServiceUnavailable
            Frontends went away each time.
        TooLarge
            A frame is larger than the service takes.
        MmprepError
            What the service answered.
        """
        try:
            async with asyncio.timeout(seconds):
                for resends_left in reversed(range(_MOST_RESENDS + 1)):
                    try:
                        return await self._request_once(operation, encoded, attachments, beside)
                    except _FrontendLost:
                        if not resends_left:
                            raise ServiceUnavailable("the frontends went away while they had this request") from None
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {seconds:g} s") from None
        raise AssertionError

    async def _request_once(
        self, operation: messages.Operation, encoded: bytes, attachments: list[Any], beside: Beside
    ) -> list[zmq.Frame]:
        frontend = await self._any_up()
        for number, frame in enumerate((encoded, *attachments)):
            if (size := memoryview(frame).nbytes) > frontend.max_frame:
                injects = operation == "inject"
                what = f"medium {number} has" if number else "the request without its media has"
                raise TooLarge(
                    f"{'the item has' if injects else what} {size:,} bytes, above the limit of {frontend.max_frame:,} "
                    "(--max-body-size)",
                    param="fields" if injects else "messages",
                )
        number, future = frontend.calls.open()
        try:
            frontend.link.send([pack(messages.Request(number, operation, *beside)), encoded, *attachments])
            answer: _Frames = await future
        except asyncio.CancelledError:
            if succeeded(future):
                frontend.unwanted(future.result())
            frontend.link.send([pack(messages.Cancel(number))])
            raise
        finally:
            frontend.calls.forget(number)
        return answer.frames

    async def _any_up(self) -> _FrontendLink:
        """Wait for a frontend and return the one with the fewest calls."""
        while True:
            if self._closed:
                raise InvalidRequest(CLOSED)
            if time.monotonic() - self._looked_at > _LOOK_SECONDS:
                self._look()
            up = [frontend for frontend in self._links if frontend.up]
            if up:
                return min(up, key=lambda frontend: len(frontend.calls))
            for frontend in self._links:
                if frontend.refused is not None:
                    raise frontend.refused
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._changed.wait()
