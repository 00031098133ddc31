"""The native clients: requests to the frontends over ZeroMQ, tensors by shared memory.

:class:`AsyncClient` does the work; :class:`Client` is the same for programs without an event loop and may be used from
several threads at once. Both spread their calls over all frontends of the runtime directory, and send a call again to
another one when its frontend goes away.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import zmq
from numpy.typing import ArrayLike

from mmprep.attachments import detach, header
from mmprep.errors import CLOSED, InvalidRequest, ProtocolError, StaleAddress
from mmprep.frontends import Beside, Frontends
from mmprep.injected import request_body
from mmprep.item import Runner
from mmprep.loop_thread import LoopThread
from mmprep.registration import Registration
from mmprep.remote.curve import RemoteKeys
from mmprep.remote.endpoint import TcpEndpoint
from mmprep.remote.place import place_of
from mmprep.remote.reader import RemoteReader
from mmprep.rendered import Result, read_result
from mmprep.result import unpack_head
from mmprep.runtime import Endpoint, RuntimeDir
from mmprep.wire.codec import MAX_FRAMES
from mmprep.wire.messages import Operation

Payload = Literal["shm", "tensors", "none"]
_CONNECT_SECONDS = 10.0
#: How often an item that was evicted on its way here is asked for again.
_MOST_RETRIES = 2
#: Frames of a request that are no medium: identity, header, body.
_OTHER_FRAMES = 3
#: Characters of an idempotency key.
_LONGEST_KEY = 255


class AsyncClient:
    """A client on the running asyncio loop.

    Parameters
    ----------
    endpoint:
        ``ipc://`` and a runtime directory; by default the one that ``mmprep serve`` uses by default. Or ``tcp://`` with host
        and port of a service's ``--remote-endpoint``, if the service is on this host and its runtime directory can be seen.
    backend_id:
        The name under which addresses are leased to this process; by default a fresh one.
    request_timeout:
        Seconds for one call, where the call names no other.
    curve_key_file, curve_server_key_file, allow_plain:
        For ``tcp://``, as :class:`mmprep.Backend` has them.

    Examples
    --------
    >>> async with AsyncClient("ipc:///run/user/0/mmprep") as client:  # doctest: +SKIP
    ...     result = await client.chat(messages, payload="shm")
    """

    def __init__(
        self,
        endpoint: Endpoint | None = None,
        *,
        backend_id: str | None = None,
        request_timeout: float = 60.0,
        curve_key_file: str | Path | None = None,
        curve_server_key_file: str | Path | None = None,
        allow_plain: bool = False,
        _run: Runner | None = None,
    ) -> None:
        self._keys = RemoteKeys.read(curve_key_file, curve_server_key_file, allow_plain=allow_plain)
        self._place: RuntimeDir | TcpEndpoint = place_of(endpoint, self._keys)
        self._id = backend_id or f"client-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._timeout = request_timeout
        self._run = _run
        self._context: zmq.Context[Any] | None = None
        self._frontends: Frontends | None = None
        self._registration: Registration | None = None

    # --- life -----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect to every frontend of the runtime directory.

        Raises
        ------
        ServiceUnavailable
            None answers.
        InvalidRequest
            The endpoint leads to another host.
        """
        self._context = zmq.Context()
        try:
            self._runtime = await self._found(self._context)
            self._frontends = Frontends(self._context, self._runtime, self._id, self._release_unwanted)
            await self._frontends.ready(_CONNECT_SECONDS)
        except BaseException:
            await self.close()
            raise

    async def _found(self, context: zmq.Context[Any]) -> RuntimeDir:
        """Return the service's runtime directory; one that is reached by ``tcp://`` is asked for it."""
        if isinstance(self._place, RuntimeDir):
            return self._place
        door = RemoteReader(
            context,
            self._place,
            self._keys,
            self._id,
            pulls=None,
            queues=(),
            credits=0,
            receive_limit=1,
            receives=False,
            run=None,
        )
        try:
            await door.ready(_CONNECT_SECONDS)
            if door.near is None:
                raise InvalidRequest(
                    "native clients ask a service on their own host; from another host, or out of a container that does "
                    "not see its runtime directory, ask over HTTP",
                    param="endpoint",
                )
            return door.near
        finally:
            await door.close()

    async def close(self) -> None:
        """Release every lease and disconnect; calls under way fail, and their work ends. Again is no error."""
        context, self._context = self._context, None
        if self._frontends is not None:
            self._frontends.close()
        registration, self._registration = self._registration, None
        if registration is not None:
            await registration.close()
        if context is not None:
            context.destroy(linger=0)

    # --- calls ----------------------------------------------------------------------------------------------------

    async def chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        payload: Payload = "shm",
        model: str | None = None,
        timeout: float | None = None,
        **fields: Any,
    ) -> Result:
        """Render one chat request.

        Parameters
        ----------
        messages:
            As in OpenAI's chat completions. In place of a URL a part may hold the encoded bytes of the medium, or ``None``
            where its ``uuid`` was sent with them before; NotFound where the service does not have them any more.
        payload:
            ``"shm"``: tensors stay in shared memory, leased to this client; one for which none is free comes with the
            answer, and its item has no address. ``"tensors"``: they come with the answer. ``"none"``: hashes and ranges
            only.
        model:
            By default the one that is served.
        timeout:
            Seconds.
        fields:
            Any other field of a chat request, as ``tools`` or ``mm_dtype``; and, as every call takes them, ``traceparent``
            and ``tracestate``: the W3C's headers of the caller's trace.

        Raises
        ------
        MmprepError
            One of the tree, with the place in the request as ``param``.
        """
        if "queue" in fields:
            raise InvalidRequest("a request for a queue has no result here: use post()", param="queue")
        body: dict[str, Any] = {"messages": messages, "mm_payload": payload, **fields}
        if model is not None:
            body["model"] = model
        registration = None
        if payload == "shm":
            registration = await self._registered()
            body["backend_id"] = registration.id
        for retries_left in reversed(range(_MOST_RETRIES + 1)):
            sent_at = time.monotonic()
            frames = await self._request("chat", body, timeout)
            try:
                return await read_result(frames, registration, sent_at, self._run)
            except StaleAddress:  # the writer was replaced while the answer was on its way
                if not retries_left:
                    raise
        raise AssertionError

    async def post(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        queue: str,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        **fields: Any,
    ) -> str:
        """Render one chat request and put the result into a queue, which backends pull from.

        Parameters
        ----------
        messages:
            As in :meth:`chat`.
        queue:
            Its name.
        idempotency_key:
            1 to 255 characters. The same call under the same key is posted once, however often it is made; by default
            each call has a key of its own, under which this client may send it again when a frontend goes away.
        timeout:
            Seconds until the job is accepted. When it must have been taken says ``deadline_ms``, which counts from here.
        fields:
            Any other field of a chat request; ``mm_payload="none"``: the job has hashes and ranges, and no tensors.

        Returns
        -------
        The request's id, which is the job's.

        Raises
        ------
        NotFound
            No backend pulls from such a queue.
        Busy
            It is full.
        Conflict
            The key was used for another request.
        """
        return await self._post("chat", {"messages": messages, "queue": queue, **fields}, idempotency_key, timeout)

    async def post_completion(
        self,
        prompt: str | Sequence[int],
        *,
        queue: str,
        idempotency_key: str | None = None,
        timeout: float | None = None,
        **fields: Any,
    ) -> str:
        """Put one prompt of a completion, a text or token ids, into a queue; otherwise as :meth:`post`."""
        return await self._post("completions", {"prompt": prompt, "queue": queue, **fields}, idempotency_key, timeout)

    async def _post(self, operation: Operation, body: dict[str, Any], key: str | None, timeout: float | None) -> str:
        key = uuid.uuid4().hex if key is None else key
        if not 1 <= len(key) <= _LONGEST_KEY:
            raise InvalidRequest(f"a key has 1 to {_LONGEST_KEY} characters", param="idempotency_key")
        request_id: str = (await self._json(operation, body, timeout, once=key))["request_id"]
        return request_id

    async def completions(self, prompt: Any, *, timeout: float | None = None, **fields: Any) -> list[dict[str, Any]]:
        """Render a completion request: a text, texts, a token list or token lists; returns GenerateRequests."""
        if "queue" in fields:
            raise InvalidRequest("a request for a queue has no result here: use post_completion()", param="queue")
        answer: list[dict[str, Any]] = await self._json("completions", {"prompt": prompt, **fields}, timeout)
        return answer

    async def tokenize(self, *, timeout: float | None = None, **fields: Any) -> dict[str, Any]:
        """Tokenize a ``prompt`` or a chat's ``messages``, media expanded."""
        answer: dict[str, Any] = await self._json("tokenize", fields, timeout)
        return answer

    async def detokenize(self, tokens: Sequence[int], *, timeout: float | None = None, **fields: Any) -> str:
        """Return the text of token ids."""
        answer = await self._json("detokenize", {"tokens": list(tokens), **fields}, timeout)
        text: str = answer["prompt"]
        return text

    async def inject(
        self,
        key_or_hash: str | bytes,
        fields: Mapping[str, ArrayLike],
        *,
        expansion: Sequence[int],
        is_embed: Sequence[bool] | None = None,
        modality: str = "image",
        dtypes: Mapping[str, str] | None = None,
        kinds: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Put an item that was processed elsewhere into the cache; the service must allow it (``--enable-injection``).

        Parts of later requests name it by ``uuid``, without data, as they name what was sent before.

        Parameters
        ----------
        key_or_hash:
            Its name: any text of up to 1,024 characters, or a hash as 64 hexadecimal digits or 32 bytes.
        fields:
            Exactly the fields of the model's items of this modality, of one item's shapes.
        expansion:
            The token ids that the placeholder becomes.
        is_embed:
            Which of them take an embedding; by default all. Those are the placeholder's id, and no others are.
        modality:
            ``image``, ``video`` or ``audio``.
        dtypes:
            ``{"pixel_values": "bfloat16"}`` for bit patterns in uint16.
        kinds:
            ``batched``, ``flat`` or ``shared`` by field, to have them checked; by default the model's own.
        more:
            Other members of the body, as ``cache_salt``.

        Returns
        -------
        ``hash``, which requests will show as that of the item; ``length`` of its range; whether it was ``cached`` before.

        Raises
        ------
        MmprepError
            NotFound where injection is off, InvalidRequest where something does not fit the model, TooLarge, Busy.
        """
        seconds = self._timeout if timeout is None else timeout
        body = request_body(
            key_or_hash,
            fields,
            token_ids=expansion,
            is_embed=is_embed,
            modality=modality,
            dtypes=dtypes or {},
            kinds=kinds or {},
            more={"deadline_ms": max(1, int(seconds * 1000)), **more},
        )
        frames = await self._send("inject", body, [], seconds)
        answer: dict[str, Any] = _only(frames)
        return answer

    async def reset_mm_cache(self, *, timeout: float | None = None) -> dict[str, int]:
        """Empty the cache of processed items, of the whole service; what somebody holds stays readable for him.

        Returns
        -------
        ``entries`` that are found no more, and ``bytes`` that are free now.
        """
        answer: dict[str, int] = await self._json("reset_mm_cache", {}, timeout)
        return answer

    async def reset_media_cache(self, *, timeout: float | None = None) -> dict[str, int]:
        """Empty the disk cache of fetched media and let every frontend forget its downloads; as :meth:`reset_mm_cache`."""
        answer: dict[str, int] = await self._json("reset_media_cache", {}, timeout)
        return answer

    # --- behind the scenes ----------------------------------------------------------------------------------------

    async def _registered(self) -> Registration:
        if self._context is None:
            raise InvalidRequest(CLOSED)
        if self._registration is None:
            self._registration = Registration(self._context, self._runtime, self._id)
        await self._registration.ready(_CONNECT_SECONDS)
        return self._registration

    async def _json(
        self, operation: Operation, body: dict[str, Any], timeout: float | None, *, once: str | None = None
    ) -> Any:
        return _only(await self._request(operation, body, timeout, once=once))

    async def _request(
        self, operation: Operation, body: dict[str, Any], timeout: float | None, *, once: str | None = None
    ) -> list[zmq.Frame]:
        seconds = self._timeout if timeout is None else timeout
        attachments: list[Any] = []
        body = detach(body, attachments)
        beside = header(body, "traceparent"), header(body, "tracestate"), once
        if once is None:
            body.setdefault("deadline_ms", max(1, int(seconds * 1000)))
        try:
            encoded = msgspec.json.encode(body)
        except (TypeError, ValueError) as error:  # as for a number of NumPy's, or half a character
            raise InvalidRequest(f"the request cannot be sent as JSON: {error}") from None
        if len(attachments) > MAX_FRAMES - _OTHER_FRAMES:
            raise InvalidRequest(f"a request has at most {MAX_FRAMES - _OTHER_FRAMES} media", param="messages")
        return await self._send(operation, encoded, attachments, seconds, beside)

    async def _send(
        self,
        operation: Operation,
        encoded: bytes,
        attachments: list[Any],
        seconds: float,
        beside: Beside = (None, None, None),
    ) -> list[zmq.Frame]:
        if self._frontends is None:
            raise InvalidRequest(CLOSED)
        return await self._frontends.send(operation, encoded, attachments, seconds, beside)

    def _release_unwanted(self, frames: list[zmq.Frame]) -> None:
        """Let go of what was leased for an answer that came too late."""
        registration = self._registration
        if registration is None or not frames:
            return
        with contextlib.suppress(ProtocolError):  # an answer without media is none
            for item in unpack_head(frames[0].buffer).items:
                if item.place is not None and item.place.lease is not None:
                    registration.give_up(item.place.lease)


def _only(frames: list[zmq.Frame]) -> Any:
    if len(frames) != 1:
        raise ProtocolError("an answer without its frame")
    return msgspec.json.decode(frames[0].buffer)


class Client:
    """The synchronous client; see :class:`AsyncClient` for the parameters and calls.

    Examples
    --------
    >>> with Client("ipc:///run/user/0/mmprep") as client:  # doctest: +SKIP
    ...     result = client.chat(messages, payload="shm")
    ...     arrays = result.items["image"][0].materialize()
    """

    def __init__(
        self,
        endpoint: Endpoint | None = None,
        *,
        backend_id: str | None = None,
        request_timeout: float = 60.0,
        curve_key_file: str | Path | None = None,
        curve_server_key_file: str | Path | None = None,
        allow_plain: bool = False,
    ) -> None:
        self._thread = LoopThread("mmprep-client")
        make = partial(
            AsyncClient,
            endpoint,
            backend_id=backend_id,
            request_timeout=request_timeout,
            curve_key_file=curve_key_file,
            curve_server_key_file=curve_server_key_file,
            allow_plain=allow_plain,
            _run=self._thread.run,
        )
        try:
            self._client: AsyncClient = self._thread.run(self._open(make))
        except BaseException:
            self._thread.stop()
            raise

    async def _open(self, make: Callable[[], AsyncClient]) -> AsyncClient:
        client = make()
        await client.open()
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release every lease and disconnect; calls of other threads fail, and their work ends. Again is no error."""
        if self._thread.stopped:
            return
        self._thread.run(self._client.close())
        self._thread.stop()

    def chat(self, messages: Sequence[dict[str, Any]], **arguments: Any) -> Result:
        """Render one chat request; see :meth:`AsyncClient.chat`."""
        result: Result = self._thread.run(self._client.chat(messages, **arguments))
        return result

    def post(self, messages: Sequence[dict[str, Any]], **arguments: Any) -> str:
        """Render one chat request and put the result into a queue; see :meth:`AsyncClient.post`."""
        request_id: str = self._thread.run(self._client.post(messages, **arguments))
        return request_id

    def post_completion(self, prompt: str | Sequence[int], **arguments: Any) -> str:
        """Put one prompt of a completion into a queue; see :meth:`AsyncClient.post_completion`."""
        request_id: str = self._thread.run(self._client.post_completion(prompt, **arguments))
        return request_id

    def completions(self, prompt: Any, **arguments: Any) -> list[dict[str, Any]]:
        """Render a completion request; see :meth:`AsyncClient.completions`."""
        answer: list[dict[str, Any]] = self._thread.run(self._client.completions(prompt, **arguments))
        return answer

    def tokenize(self, **arguments: Any) -> dict[str, Any]:
        """Tokenize; see :meth:`AsyncClient.tokenize`."""
        answer: dict[str, Any] = self._thread.run(self._client.tokenize(**arguments))
        return answer

    def detokenize(self, tokens: Sequence[int], **arguments: Any) -> str:
        """Return the text of token ids."""
        text: str = self._thread.run(self._client.detokenize(tokens, **arguments))
        return text

    def inject(
        self, key_or_hash: str | bytes, fields: Mapping[str, ArrayLike], *, expansion: Sequence[int], **arguments: Any
    ) -> dict[str, Any]:
        """Put an item that was processed elsewhere into the cache; see :meth:`AsyncClient.inject`."""
        answer: dict[str, Any] = self._thread.run(
            self._client.inject(key_or_hash, fields, expansion=expansion, **arguments)
        )
        return answer

    def reset_mm_cache(self, **arguments: Any) -> dict[str, int]:
        """Empty the cache of processed items; see :meth:`AsyncClient.reset_mm_cache`."""
        answer: dict[str, int] = self._thread.run(self._client.reset_mm_cache(**arguments))
        return answer

    def reset_media_cache(self, **arguments: Any) -> dict[str, int]:
        """Empty the disk cache of fetched media; see :meth:`AsyncClient.reset_media_cache`."""
        answer: dict[str, int] = self._thread.run(self._client.reset_media_cache(**arguments))
        return answer


__all__ = ["AsyncClient", "Client", "Payload"]
