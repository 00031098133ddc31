"""Where requests go: a server over HTTP, or the service of a runtime directory, through its native client or a queue.

What became of a request is a word: ``ok``, or the kind of error. A target never raises for what a server answers.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec

from mmprep.backend import AsyncBackend
from mmprep.client import AsyncClient, Payload
from mmprep.errors import MmprepError
from mmprep.job import AsyncJob
from mmprep.loadtest.http import HttpClient, Reply
from mmprep.loadtest.workloads import Ask, Picture, Turn

OK: Final = "ok"
TIMEOUT: Final = "client timeout"
#: Bytes of encoded pictures that are kept because they may be sent again.
_KEPT: Final = 256 << 20
#: Ends of jobs that are remembered for those who may still learn that they posted them.
_EARLY: Final = 4096


class Target(Protocol):
    """Something that answers requests."""

    def prepare(self, ask: Ask) -> Any:
        """Return the request as it is sent; done before it is due, so that its encoding is not measured."""

    async def send(self, prepared: Any) -> str:
        """Send it, wait for the whole answer, and return what became of it."""

    async def close(self) -> None:
        """Let go of the connections."""


class HttpTarget:
    """A server with one of the render paths, or with any other that takes a chat.

    Parameters
    ----------
    url:
        Of the server, without a path.
    path:
        That takes the requests.
    fields:
        Beside ``messages``, as they stand in every request: ``mm_payload``, ``model``, ….
    key:
        For ``Authorization: Bearer``, where the server wants one.
    accept:
        The media type that is asked for.
    """

    def __init__(
        self,
        url: str,
        *,
        path: str = "/v1/chat/completions/render",
        fields: Mapping[str, Any] | None = None,
        key: str | None = None,
        accept: str = "application/json",
    ) -> None:
        self.client = HttpClient(url)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._fields = dict(fields or {})
        more = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: {self.client.host}\r\nContent-Type: application/json\r\nAccept: {accept}\r\n{more}"
            "Content-Length: "
        ).encode()
        self._urls = _Kept(lambda picture: "data:image/jpeg;base64," + base64.b64encode(picture.data).decode())

    def prepare(self, ask: Ask) -> tuple[bytes, bytes]:
        """Return head and body."""
        messages = [
            {"role": turn.role, "content": _content(turn, lambda picture: {"url": self._urls.get(picture)})}
            for turn in ask.turns
        ]
        body = msgspec.json.encode({**self._fields, "messages": messages})
        return self._head + b"%d\r\n\r\n" % len(body), body

    async def send(self, prepared: tuple[bytes, bytes]) -> str:
        """Send it; an answer with a status from 400 on is named by its error's type, or by the status."""
        try:
            reply = await self.client.send(*prepared)
        except MmprepError as error:
            return error.type
        return OK if 200 <= reply.status < 300 else _kind(reply)

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()


class _Chats:
    """Asks as chats of the native client."""

    def prepare(self, ask: Ask) -> list[dict[str, Any]]:
        """Return the messages."""
        return [
            {"role": turn.role, "content": _content(turn, lambda picture: {"url": picture.data})} for turn in ask.turns
        ]


class NativeTarget(_Chats):
    """The service of a runtime directory; tensors in shared memory are released as soon as they are known.

    Parameters
    ----------
    client:
        Open.
    payload:
        What is asked for.
    """

    def __init__(
        self, client: AsyncClient, *, payload: Payload = "shm", fields: Mapping[str, Any] | None = None
    ) -> None:
        self._client = client
        self._payload: Payload = payload
        self._fields = dict(fields or {})

    async def send(self, prepared: list[dict[str, Any]]) -> str:
        """Send it."""
        try:
            result = await self._client.chat(prepared, payload=self._payload, **self._fields)
        except MmprepError as error:
            return error.type
        result.release()
        return OK

    async def close(self) -> None:
        """Close the client."""
        await self._client.close()


class QueueTarget(_Chats):
    """A queue of its own: posts each request as a job, pulls it as a backend, maps its tensors and acknowledges it.

    Parameters
    ----------
    client, backend:
        Open; the backend pulls from the queue, and from no other, and nobody else does.
    queue:
        Its name.
    payload:
        ``none``: jobs without tensors.
    """

    def __init__(
        self,
        client: AsyncClient,
        backend: AsyncBackend,
        queue: str,
        *,
        payload: Payload = "shm",
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        self._client = client
        self._backend = backend
        self._mapped = payload != "none"
        self._queue = queue
        self._fields = {**(fields or {}), **({} if self._mapped else {"mm_payload": payload})}
        self._waiting: dict[str, asyncio.Future[str]] = {}
        #: What became of jobs, by id, that were done before the word that they were accepted, or that nobody waits for.
        self._early: OrderedDict[str, str] = OrderedDict()
        self._pulling = asyncio.create_task(self._pull())

    async def send(self, prepared: list[dict[str, Any]]) -> str:
        """Post it, and wait until its job was pulled and acknowledged."""
        try:
            job_id = await self._client.post(prepared, queue=self._queue, **self._fields)
        except MmprepError as error:
            return error.type
        if (early := self._early.pop(job_id, None)) is not None:
            return early
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[job_id] = end
        try:
            return await end
        finally:
            del self._waiting[job_id]

    async def close(self) -> None:
        """Pull nothing any more, and close both."""
        self._pulling.cancel()
        await asyncio.gather(self._pulling, return_exceptions=True)
        await self._backend.close()
        await self._client.close()

    async def _pull(self) -> None:
        async with asyncio.TaskGroup() as group:
            async for job in self._backend:
                group.create_task(self._done(job))

    async def _done(self, job: AsyncJob) -> None:
        outcome = OK
        try:
            if job.error is not None:
                outcome = job.error.type
            elif self._mapped:
                async with job.view():
                    pass
            await job.ack()
        except MmprepError as error:
            outcome = error.type
        end = self._waiting.get(job.id)
        if end is None:
            self._early[job.id] = outcome
            if len(self._early) > _EARLY:
                self._early.popitem(last=False)
        elif not end.done():
            end.set_result(outcome)


def _content(turn: Turn, source: Callable[[Picture], dict[str, Any]]) -> str | list[dict[str, Any]]:
    if not turn.pictures:
        return turn.text
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": source(picture)} for picture in turn.pictures]
    return [*parts, {"type": "text", "text": turn.text}]


def _kind(reply: Reply) -> str:
    try:
        kind = json.loads(reply.body)["error"]["type"]
    except (ValueError, KeyError, TypeError):
        kind = None
    return f"{reply.status} {kind}" if isinstance(kind, str) and kind.isidentifier() else str(reply.status)


class _Kept:
    """What was made of pictures, the least recently used first to go."""

    def __init__(self, make: Callable[[Picture], str]) -> None:
        self._make = make
        self._made: OrderedDict[str, str] = OrderedDict()
        self._bytes = 0

    def get(self, picture: Picture) -> str:
        made = self._made.get(picture.name)
        if made is None:
            made = self._made[picture.name] = self._make(picture)
            self._bytes += len(made)
            while self._bytes > _KEPT and len(self._made) > 1:
                self._bytes -= len(self._made.popitem(last=False)[1])
        else:
            self._made.move_to_end(picture.name)
        return made


async def within(seconds: float, sending: Any) -> str:
    """Return what became of a request, :data:`TIMEOUT` where that is not known after so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            return str(await sending)
    except TimeoutError:
        return TIMEOUT
