"""One chat of a Dynamo frontend: rendered by the service, answered by the routed engine, its tokens turned into text.

Rules:

- The items of a chat are leased to the frontend from its rendering to the engine's first tokens: until then a worker takes
  leases of its own. However a chat ends before, those leases end with it.
- A caller that hangs up stops whatever is under way, also the work of the service for it.
- Nothing is awaited on the way out, and nothing that others wait for is held at a ``yield``: Dynamo drops an answer that nobody
  reads where it stands, and Python ends it only with Dynamo's next call, in a thread without a loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from mmprep.bridges.dynamo.requests import chat_fields, preprocessed
from mmprep.bridges.dynamo.text import AnswerText
from mmprep.client import AsyncClient
from mmprep.errors import MmprepError
from mmprep.rendered import Result

_T = TypeVar("_T")
#: What an engine calls the end of an answer, as OpenAI's clients know it.
_ENDS = {"length": "length", "content_filter": "content_filter"}
#: Statuses that Dynamo's server keeps; of other errors of a caller it keeps the message and says 400.
_KEPT = frozenset({404, 408, 429})

#: What Dynamo calls errors of a worker that had no status.
_KINDS = {"Unavailable": 503, "InvalidArgument": 400}

Decode = Callable[[int], str | None]


class _HungUp(Exception):
    """The caller has."""


class ChatEngine:
    """Answers the chats of one model.

    Parameters
    ----------
    connect:
        Returns the client of the service, which is the same for all chats.
    routed:
        Dynamo's engine behind its router.
    decoder:
        Returns, for one answer, what turns ids into text; its argument says whether special tokens are left out.
    eos_token_ids:
        Of the model.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[AsyncClient]],
        routed: Any,
        decoder: Callable[[bool], Decode],
        eos_token_ids: Sequence[int],
    ) -> None:
        self._connect = connect
        self._routed = routed
        self._decoder = decoder
        self._eos = tuple(eos_token_ids)

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        """Answer one chat completion request with chunks; Dynamo's server makes one answer of them where none are asked for.

        Raises
        ------
        InvalidArgument, HttpError
            Dynamo's, which its server answers.
        """
        with contextlib.ExitStack() as held:
            stopped = asyncio.ensure_future(context.async_killed_or_stopped())
            held.callback(stopped.cancel)
            try:
                fields = chat_fields(request)
                client = await _unless(stopped, self._connect())
                result = await _unless(stopped, client.chat(payload="shm", **fields, **_trace(context)))
                held.callback(result.release)
                prepared = preprocessed(result, request, self._eos)
                answer = _Answer(request, context.id(), result, self._text(prepared))
                stream = await _unless(stopped, self._routed.generate(prepared, context=context))
                while not answer.ended and (output := await _unless(stopped, _next(stream))) is not None:
                    given = _read(output)
                    chunk = answer.chunk(given)
                    if chunk is not None or given.get("token_ids"):
                        result.release()  # before the yield, where Dynamo may drop this
                    if chunk is not None:
                        yield chunk
                if answer.cut:
                    context.stop_generating()
            except _HungUp:
                return
            except Exception as error:
                raise answerable(error) from error

    def _text(self, prepared: Mapping[str, Any]) -> AnswerText:
        return AnswerText(
            self._decoder(prepared["output_options"]["skip_special_tokens"]),
            prepared["stop_conditions"].get("stop") or (),
            include_stop=bool(prepared["sampling_options"].get("include_stop_str_in_output")),
        )


def _trace(context: Any) -> dict[str, Any]:
    """Return the headers of the caller's trace as a client's call takes them."""
    headers = context.trace_headers() or {}
    return {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}


class _Answer:
    """Makes chunks of what the engine gives.

    Attributes
    ----------
    ended: the last chunk was made.
    cut: that is since a stop string came, so the engine still generates.
    """

    def __init__(self, request: Mapping[str, Any], request_id: str, result: Result, text: AnswerText) -> None:
        self._head = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": request["model"],
        }
        self._prompt = len(result.token_array)
        options = request.get("stream_options") or {}
        self._counts = not request.get("stream") or bool(options.get("include_usage"))
        self._tokens = 0
        self._text = text
        self._role: dict[str, str] = {"role": "assistant"}
        self.ended = False
        self.cut = False

    def chunk(self, given: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what one output of the engine adds, ``None`` for nothing."""
        ids, end = given.get("token_ids") or [], given.get("finish_reason")
        self._tokens += len(ids)
        words = self._text.feed(ids)
        if self._text.stopped:
            self.cut = end is None
            end = "stop"
        elif end is not None:
            words += self._text.end()
            end = _ENDS.get(end, "stop")
        if not words and end is None:
            return None
        self.ended = end is not None
        choice = {"index": 0, "delta": {**self._role, "content": words}, "finish_reason": end}
        self._role = {}
        chunk = {**self._head, "choices": [choice]}
        return {**chunk, "usage": self._usage()} if self.ended and self._counts else chunk

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt + self._tokens,
        }


async def _unless(stopped: asyncio.Future[Any], work: Awaitable[_T]) -> _T:
    """Return what comes of ``work``; raise _HungUp, and cancel it, where the caller hangs up before."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise _HungUp
    finally:
        task.cancel()


async def _next(stream: Any) -> Any:
    """Return the next output, ``None`` at the end."""
    return await anext(aiter(stream), None)


def _read(output: Any) -> Mapping[str, Any]:
    """Return what an output of the engine holds; raises HttpError where it tells of an error."""
    from dynamo.llm.exceptions import HttpError  # noqa: PLC0415 -- the engine's own

    if output.is_error():
        raise HttpError(500, "; ".join(output.comments() or ()) or "the engine failed")
    given: Mapping[str, Any] = output.data() or {}
    end = given.get("finish_reason")
    if isinstance(end, Mapping) or str(end).startswith("error"):
        raise HttpError(500, "the engine failed")
    return given


def answerable(error: Exception) -> Exception:
    """Return the exception by which Dynamo's server answers with the right status.

    It answers its own exceptions. It keeps the words of an InvalidArgument, and few statuses of others; any error that it does
    not know would be the caller's fault, 400. What a worker raises comes as a ValueError, ``Kind: words``, the words being JSON
    with a code where the worker's exception had one.
    """
    from dynamo.llm.exceptions import DynamoException, HttpError, InvalidArgument  # noqa: PLC0415 -- the engine's own

    if isinstance(error, DynamoException | HttpError):
        return error
    code, words = _of_worker(str(error))
    if isinstance(error, MmprepError):
        code, words = error.code, error.message if error.param is None else f"{error.message} ({error.param})"
    return HttpError(code, words) if code in _KEPT or code >= 500 else InvalidArgument(words)


def _of_worker(said: str) -> tuple[int, str]:
    """Return the status and the words of an error that a worker raised."""
    kind, _, words = said.partition(": ")
    code = _KINDS.get(kind, 500)
    with contextlib.suppress(ValueError, TypeError, KeyError):
        told = json.loads(words)
        code, words = int(told["code"]), str(told["message"])
    return code if 400 <= code < 600 else 500, words
