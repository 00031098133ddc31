"""Where requests go: a server over HTTP, or the service of a runtime directory, through its native client or a queue.

What became of a request is a word: ``ok``, or the kind of error. A target never raises for what a server answers.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import msgspec

from mmprep.backend import AsyncBackend
from mmprep.client import AsyncClient, Payload
from mmprep.errors import MmprepError
from mmprep.job import AsyncJob
from mmprep.loadtest.http import HttpClient, Reply
from mmprep.loadtest.workloads import Ask, Picture, Turn

OK: Final = "ok"
TIMEOUT: Final = "client timeout"
#: Bytes of memory that a message takes, roughly.
_MESSAGE: Final = 1024
#: Bytes of encoded pictures that are kept because they may be sent again.
_KEPT: Final = 256 << 20
#: Ends of jobs that are remembered for those who may still learn that they posted them.
_EARLY: Final = 4096


#: Called with what became of a request.
Ended: TypeAlias = Callable[[str | BaseException], None]


class Prepared(NamedTuple):
    """A request as it is sent, and the bytes of memory that it takes beside what others have too."""

    request: Any
    nbytes: int


class Target(Protocol):
    """Something that answers requests."""

    def prepare(self, ask: Ask) -> Prepared:
        """Return the request as it is sent; done before it is due, so that its encoding is not measured."""

    def start(self, request: Any, ended: Ended) -> Callable[[], object]:
        """Send it; return what gives it up.

        ``ended`` is called once when the whole answer is there, with what became of it, but not before this has returned
        nor after the request was given up. An exception in place of a word is a fault of the load generator.
        """

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
        #: Stands for a picture while its request is encoded.
        self._mark = os.urandom(16).hex()
        more = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: {self.client.host}\r\nContent-Type: application/json\r\nAccept: {accept}\r\n{more}"
            "Content-Length: "
        ).encode()
        self._urls = _Kept(lambda picture: b'"data:image/jpeg;base64,' + base64.b64encode(picture.data) + b'"')

    def prepare(self, ask: Ask) -> Prepared:
        """Return head and body in pieces: pictures that come again are the same bytes."""
        pictures: list[Picture] = []

        def place(picture: Picture) -> dict[str, Any]:
            pictures.append(picture)
            return {"url": self._mark}

        messages = [{"role": turn.role, "content": _content(turn, place)} for turn in ask.turns]
        first, *texts = msgspec.json.encode({**self._fields, "messages": messages}).split(b'"%s"' % self._mark.encode())
        made = self._urls.nbytes_made
        pieces = [piece for both in zip(map(self._urls.get, pictures), texts, strict=True) for piece in both]
        length = len(first) + sum(map(len, pieces))
        head = self._head + b"%d\r\n\r\n" % length + first
        own = len(head) + sum(map(len, texts)) + self._urls.nbytes_made - made
        return Prepared((head, *pieces), own)

    def start(self, request: Sequence[bytes], ended: Ended) -> Callable[[], object]:
        """Send it; an answer with a status from 300 on is named by its error's type, or by the status."""
        return self.client.start(request, partial(_tell, ended))

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()


class _Chats:
    """Asks as chats of the native client, each of which is a task."""

    def __init__(self) -> None:
        self._pictures = _Kept(lambda picture: picture.data)

    async def send(self, request: list[dict[str, Any]]) -> str:
        """Send it, wait for the whole answer, and return what became of it."""
        raise NotImplementedError

    def start(self, request: list[dict[str, Any]], ended: Ended) -> Callable[[], object]:
        """Send it."""
        task = asyncio.get_running_loop().create_task(self.send(request))
        task.add_done_callback(partial(_tell_of, ended))
        return task.cancel

    def prepare(self, ask: Ask) -> Prepared:
        """Return the messages."""
        made = self._pictures.nbytes_made
        messages = [
            {"role": turn.role, "content": _content(turn, lambda picture: {"url": self._pictures.get(picture)})}
            for turn in ask.turns
        ]
        own = sum(len(turn.text) + _MESSAGE for turn in ask.turns)
        return Prepared(messages, own + self._pictures.nbytes_made - made)


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
        super().__init__()
        self._client = client
        self._payload: Payload = payload
        self._fields = dict(fields or {})

    async def send(self, request: list[dict[str, Any]]) -> str:
        """Send it."""
        try:
            result = await self._client.chat(request, payload=self._payload, **self._fields)
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
        super().__init__()
        self._client = client
        self._backend = backend
        self._mapped = payload != "none"
        self._queue = queue
        self._fields = {**(fields or {}), **({} if self._mapped else {"mm_payload": payload})}
        self._waiting: dict[str, asyncio.Future[str]] = {}
        #: What became of jobs, by id, that were done before the word that they were accepted, or that nobody waits for.
        self._early: OrderedDict[str, str] = OrderedDict()
        self._pulling = asyncio.create_task(self._pull())

    async def send(self, request: list[dict[str, Any]]) -> str:
        """Post it, and wait until its job was pulled and acknowledged."""
        try:
            job_id = await self._client.post(request, queue=self._queue, **self._fields)
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


def _tell(ended: Ended, outcome: Reply | MmprepError) -> None:
    if isinstance(outcome, MmprepError):
        ended(outcome.type)
    else:
        ended(OK if 200 <= outcome.status < 300 else _kind(outcome))


def _tell_of(ended: Ended, task: asyncio.Task[str]) -> None:
    if not task.cancelled():
        ended(task.exception() or task.result())


def _kind(reply: Reply) -> str:
    try:
        kind = json.loads(reply.body)["error"]["type"]
    except (ValueError, KeyError, TypeError):
        kind = None
    return f"{reply.status} {kind}" if isinstance(kind, str) and kind.isidentifier() else str(reply.status)


class _Kept:
    """What was made of pictures, the least recently used first to go; ``nbytes_made``: of all that ever was."""

    def __init__(self, make: Callable[[Picture], bytes]) -> None:
        self._make = make
        self._made: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self.nbytes_made = 0

    def get(self, picture: Picture) -> bytes:
        made = self._made.get(picture.name)
        if made is None:
            made = self._made[picture.name] = self._make(picture)
            self._bytes += len(made)
            self.nbytes_made += len(made)
            while self._bytes > _KEPT and len(self._made) > 1:
                self._bytes -= len(self._made.popitem(last=False)[1])
        else:
            self._made.move_to_end(picture.name)
        return made
