"""The life of a request in a frontend, whatever door it came through.

Parse and walk on the loop; then, side by side, one hop to the render thread (template, tokens, small media) and the
fetches; then the offer to the writer; then expansion. What leaves is a :class:`RenderedChat`, which the doors turn into
JSON or frames.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import msgspec

from mmprep.digest import Hasher
from mmprep.errors import DeadlineExceeded, InternalError, InvalidRequest, ServiceUnavailable
from mmprep.items import ItemMeta, unpack_meta
from mmprep.metrics import Metrics
from mmprep.wire.messages import ItemAnswer, LeaseTo, Need
from mmprep_frontend.dispatch import Offered, OfferItem, WriterLink
from mmprep_frontend.media.intake import SMALL, TINY, Intake, Medium, Source, at_hand, first_error, size
from mmprep_frontend.media.keys import item_key, scope
from mmprep_frontend.model import ServedModel
from mmprep_frontend.render.answer import check_length, generate_request, json_list
from mmprep_frontend.render.conversation import Conversation, MediaPart
from mmprep_frontend.render.expansion import Expanded, expand
from mmprep_frontend.render.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)
from mmprep_frontend.render.tokens import EncodedPrompt

T = TypeVar("T")
#: A request's JSON as a door holds it.
Body: TypeAlias = bytes | memoryview

#: Requests above this size are parsed off the loop.
_LARGE_BODY = 256 * 1024
#: Ids up to which an answer is encoded on the loop, and how many the rest of one answer is worth.
_FEW_IDS = 16_384
_ANSWER = 100
#: Bytes of tensors up to which an answer is encoded on the loop.
_FEW_BYTES = 64 * 1024
_PIXELS_A_BYTE = 4
#: Characters and ids that one completion request has tokenized or checked before others get their turn.
_TURN = 64 * 1024
_ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class RenderedItem:
    """One medium of a rendered chat."""

    part: MediaPart
    key: bytes
    answer: ItemAnswer
    meta: ItemMeta


@dataclass(frozen=True, slots=True)
class Terms:
    """How a request wants its items.

    Attributes
    ----------
    need: tensors, or only plans.
    lease: to whom the addresses are to be leased; else they are pinned.
    dtype: of the main tensors, or ``auto``.
    salt: of the cache, or ``None``.
    priority: lower is more urgent.
    deadline: by the loop's clock.
    """

    need: Need
    lease: LeaseTo | None
    dtype: str
    salt: str | None
    priority: int
    deadline: float


@dataclass(frozen=True, slots=True)
class _Walked:
    """A request's conversation, and the bytes of its JSON beside its media."""

    conversation: Conversation
    nbytes: int


@dataclass(slots=True)
class RenderedChat:
    """A rendered chat; its items may be pinned or leased: see ``offered``."""

    request: ChatRequest
    prompt: EncodedPrompt
    expanded: Expanded
    items: list[RenderedItem] = field(default_factory=list)
    offered: Offered | None = None

    def in_order(self) -> list[RenderedItem]:
        """Return the items in the order of the prompt's ranges."""
        waiting: dict[str, list[RenderedItem]] = {}
        for item in self.items:
            waiting.setdefault(item.part.modality, []).append(item)
        queues = {modality: iter(items) for modality, items in waiting.items()}
        return [next(queues[placed.modality]) for placed in self.expanded.ranges]

    def region(self, item: RenderedItem) -> memoryview:
        """Return an item's tensors as they lie in the ring; pinned until the chat is released."""
        assert self.offered is not None
        return self.offered.region(item.answer)

    def travels(self, item: RenderedItem) -> bool:
        """Whether an item's tensors travel in the answer itself: as asked for, or since no shared memory was free."""
        return self.request.payload == "tensors" or bool(item.answer.inline)

    def inline_bytes(self) -> int:
        """Return about how many bytes of tensors travel in the answer itself."""
        if self.offered is None:
            return 0
        return sum(self.offered.nbytes(item.answer) for item in self.items if self.travels(item))

    def release(self) -> None:
        """Let go of what is pinned."""
        if self.offered is not None:
            self.offered.release()

    def give_back(self) -> None:
        """Let go, also of leases: the answer will not reach anybody."""
        if self.offered is not None:
            self.offered.give_back()


class Service:
    """What a frontend does, without its doors.

    Parameters
    ----------
    writer, intake, hasher, metrics:
        Its parts.
    render_thread:
        One thread; it alone uses the model's tokenizer and templates.
    threads:
        For serialising large answers.
    tensor_dtype:
        What requests without ``mm_dtype`` get.
    limits:
        Media a request, by modality.
    request_timeout:
        Seconds, for requests without ``deadline_ms``.
    """

    def __init__(
        self,
        *,
        writer: WriterLink,
        intake: Intake,
        hasher: Hasher,
        metrics: Metrics,
        render_thread: ThreadPoolExecutor,
        threads: ThreadPoolExecutor,
        tensor_dtype: str,
        limits: dict[str, int],
        request_timeout: float,
    ) -> None:
        self.writer = writer
        self.metrics = metrics
        self.threads = threads
        self.model: ServedModel | None = None
        self.inflight = 0
        self._intake = intake
        self._hasher = hasher
        self._render_thread = render_thread
        self._tensor_dtype = tensor_dtype
        self._limits = limits
        self._request_timeout = request_timeout

    async def on_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return what ``work`` returns on a thread; awaits its end also when cancelled.

        It may read memory that is pinned only as long as the caller waits.
        """
        running = asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise

    async def encode(self, ids: int, work: Callable[[], bytes], *, nbytes: int = 0) -> bytes:
        """Return the JSON that ``work`` makes of so many ids and bytes of tensors: on a thread where they are many."""
        with self.timed("serialize"):
            light = ids <= _FEW_IDS and nbytes <= _FEW_BYTES
            return work() if light else await self.on_thread(work)

    def served(self) -> ServedModel:
        """Return the model; raises ServiceUnavailable while it is not loaded."""
        if self.model is None:
            raise ServiceUnavailable("the service is starting; try again", retry_after=1.0)
        return self.model

    # --- chat -----------------------------------------------------------------------------------------------------

    async def chat(self, body: Body, attachments: Sequence[memoryview] = ()) -> RenderedChat:
        """Render one chat request.

        Parameters
        ----------
        body:
            JSON.
        attachments:
            What ``attachment:<n>`` URLs name; only through the native door.

        Raises
        ------
        MmprepError
            With the place in the request as ``param``.
        """
        model, arrived = self.served(), _now()
        request = await self._parse(body, lambda: parse(body, "chat"))
        model.check_name(request.model)
        deadline = self._deadline(arrived, request.deadline_ms)
        with _naming("messages"):
            walked = self._walk(model, request, body)
            return await self._render(model, request, walked, attachments, deadline)

    def _walk(self, model: ServedModel, request: ChatRequest | TokenizeRequest, body: Body) -> _Walked:
        conversation = model.walk(request, self._limits)
        nbytes = len(body) - sum(len(part.url) for part in conversation.media)
        model.bounds.check_json(nbytes)
        return _Walked(conversation, nbytes)

    async def _render(
        self,
        model: ServedModel,
        request: ChatRequest,
        walked: _Walked,
        attachments: Sequence[memoryview],
        deadline: float,
    ) -> RenderedChat:
        prompt, media = await self._prompt_and_media(model, request, walked, attachments, deadline)
        if not media:
            check_length(len(prompt.token_ids), model.max_model_len)
            return RenderedChat(request, prompt, expand(prompt.token_ids, prompt.placeholders, {}))
        terms = Terms(
            need="plan" if request.payload == "none" else "tensors",
            lease=LeaseTo(request.backend_id or "", request.lease_kind or "copy") if request.payload == "shm" else None,
            dtype=request.mm_dtype or self._tensor_dtype,
            salt=request.cache_salt,
            priority=request.priority or 0,
            deadline=deadline,
        )
        offered, items = await self._items(model, walked.conversation.media, media, terms)
        try:
            expanded = self._expand(prompt, items)
            check_length(len(expanded.token_ids), model.max_model_len)
        except BaseException:
            offered.give_back()
            raise
        return RenderedChat(request, prompt, expanded, items, offered)

    async def _prompt_and_media(
        self,
        model: ServedModel,
        request: ChatRequest | TokenizeRequest,
        walked: _Walked,
        attachments: Sequence[memoryview],
        deadline: float,
    ) -> tuple[EncodedPrompt, list[Medium]]:
        conversation = walked.conversation
        sources = self._intake.sources(conversation.media, attachments)
        key = model.prompt_key(conversation, request, walked.nbytes)
        prompt = model.prompts.get(key)
        complete = all(map(at_hand, sources))
        nbytes = sum(map(size, sources))
        if prompt is not None and complete and nbytes <= TINY:
            return prompt, _all(self._intake.read_now(sources))
        if complete and nbytes <= SMALL:
            encode = model.encode_chat_and_read
            encoded, media = await self._on_render_thread(
                deadline, encode, conversation, request, self._intake, sources, prompt
            )
            model.prompts.put(key, encoded)
            return encoded, _all(media)
        encoded, read = await self._side_by_side(model, request, conversation, sources, known=prompt, deadline=deadline)
        model.prompts.put(key, encoded)
        return encoded, read

    async def _side_by_side(
        self,
        model: ServedModel,
        request: ChatRequest | TokenizeRequest,
        conversation: Conversation,
        sources: list[Source],
        *,
        known: EncodedPrompt | None,
        deadline: float,
    ) -> tuple[EncodedPrompt, list[Medium]]:
        scoped = scope(_ANONYMOUS, request.cache_salt)
        try:
            async with _within(deadline), asyncio.TaskGroup() as group:
                reading = group.create_task(self._intake.read(sources, conversation.media, deadline, scoped))
                if known is None:
                    encode = self._on_render_thread(deadline, model.encode_chat, conversation, request)
                    encoding = group.create_task(encode)
        except BaseExceptionGroup as failures:
            raise first_error(failures) from None
        return known or encoding.result(), reading.result()

    async def _items(
        self, model: ServedModel, parts: Sequence[MediaPart], media: Sequence[Medium], terms: Terms
    ) -> tuple[Offered, list[RenderedItem]]:
        for medium in media:
            self._observe("hash", medium.seconds)
        scoped = scope(_ANONYMOUS, terms.salt)
        wanted = [
            self._offer_item(model, scoped, part, medium, terms.dtype)
            for part, medium in zip(parts, media, strict=True)
        ]
        offered = await self.writer.offer(
            wanted, need=terms.need, deadline=terms.deadline, priority=terms.priority, lease=terms.lease
        )
        for answer, medium in zip(offered.items, media, strict=True):
            # Where only a plan was asked for, nobody may have looked behind the header.
            if answer.fault is None and (answer.length or answer.inline):
                self._intake.decoded(medium)
        for answer, part in zip(offered.items, parts, strict=True):
            if answer.fault is not None:
                offered.give_back()
                raise answer.fault.error().at(part.param)
        try:
            items = [
                RenderedItem(part, item.key, answer, unpack_meta(answer.meta))
                for part, item, answer in zip(parts, wanted, offered.items, strict=True)
            ]
        except ValueError:
            offered.give_back()
            raise InternalError("an item's metadata cannot be read") from None
        return offered, items

    def _offer_item(
        self, model: ServedModel, scoped: bytes, part: MediaPart, medium: Medium, dtype_name: str
    ) -> OfferItem:
        dtypes = model.card.dtypes[part.modality]
        dtype = dtypes[0] if dtype_name == "auto" else dtype_name
        if dtype not in dtypes:
            raise InvalidRequest(
                f"This model's tensors of modality '{part.modality}' come as {', '.join(dtypes)}, not as {dtype}.",
                param="mm_dtype",
            )
        key = item_key(
            scope=scoped,
            digest=medium.digest,
            hash_name=self._hasher.name,
            modality=part.modality,
            fingerprint=model.card.fingerprint,
            dtype=dtype,
            options=b"",
        )
        cost = max(4096, medium.pixels or len(medium.data) * _PIXELS_A_BYTE)
        return OfferItem(key, part.modality, medium.data, medium.digest, msgspec.msgpack.encode((dtype,)), cost)

    def _expand(self, prompt: EncodedPrompt, items: Sequence[RenderedItem]) -> Expanded:
        plans: dict[str, list[Any]] = {}
        for item in items:
            plans.setdefault(item.part.modality, []).append(item.meta.plan)
        with self.timed("expand"):
            return expand(prompt.token_ids, prompt.placeholders, plans)

    # --- the rest -------------------------------------------------------------------------------------------------

    async def completions(self, body: Body, request_id: str) -> bytes:
        """Render a completion request; JSON of a list of GenerateRequests, one a prompt."""
        model, arrived = self.served(), _now()
        model.bounds.check_json(len(body))
        request = await self._parse(body, lambda: parse(body, "completion"))
        model.check_name(request.model)
        numbered = request.is_batch
        with _naming("prompt"):
            encoded = await self._encode_prompts(model, request, self._deadline(arrived, request.deadline_ms))

            def answers() -> bytes:
                told = (
                    generate_request(
                        request,
                        request_id=f"{request_id}-{index}" if numbered else request_id,
                        model=model.name,
                        token_ids=token_ids,
                        max_model_len=model.max_model_len,
                        prompt_text=text,
                    )
                    for index, (token_ids, text) in enumerate(encoded)
                )
                return b"".join((b"[", b",".join(map(msgspec.json.encode, told)), b"]"))

            return await self.encode(sum(_ANSWER + len(token_ids) for token_ids, _ in encoded), answers)

    async def _encode_prompts(
        self, model: ServedModel, request: CompletionRequest, deadline: float
    ) -> list[tuple[list[int], str | None]]:
        """Return ids and text of every prompt, some at a time, so that others get their turn on the render thread."""
        prompts = request.prompts()
        params = [f"prompt[{index}]" for index in range(len(prompts))] if request.is_batch else ["prompt"]
        for prompt, param in zip(prompts, params, strict=True):
            if isinstance(prompt, str):
                model.bounds.check_prompt(len(prompt), param)
        encoded: list[tuple[list[int], str | None]] = []
        for turn in _turns([len(prompt) for prompt in prompts]):
            encoded += await self._on_render_thread(
                deadline, _encode, model, prompts[turn], params[turn], request.add_special_tokens
            )
        return encoded

    async def tokenize(self, body: Body, attachments: Sequence[memoryview] = ()) -> bytes:
        """Tokenize a text or a chat, to JSON; media are expanded, and only their plans are computed."""
        model, arrived = self.served(), _now()
        request = await self._parse(body, lambda: parse(body, "tokenize"))
        model.check_name(request.model)
        deadline = self._deadline(arrived, request.deadline_ms)
        if request.prompt is not None:
            model.bounds.check_counted(len(request.prompt), "prompt")
            text, special = request.prompt, request.adds_special_tokens
            token_ids = await self._on_render_thread(
                deadline, lambda: model.encode_text(text, add_special_tokens=special)
            )
        else:
            with _naming("messages"):
                token_ids = await self._tokenize_chat(
                    model, request, self._walk(model, request, body), attachments, deadline
                )
        strings = None
        if request.return_token_strs:
            strings = await self._on_render_thread(deadline, model.tokenizer.token_strs, token_ids)

        def answer() -> bytes:
            return msgspec.json.encode(
                {
                    "count": len(token_ids),
                    "max_model_len": model.max_model_len,
                    "tokens": json_list(token_ids),
                    "token_strs": None if strings is None else json_list(strings),
                }
            )

        return await self.encode(len(token_ids), answer)

    async def _tokenize_chat(
        self,
        model: ServedModel,
        request: TokenizeRequest,
        walked: _Walked,
        attachments: Sequence[memoryview],
        deadline: float,
    ) -> list[int]:
        prompt, media = await self._prompt_and_media(model, request, walked, attachments, deadline)
        if not media:
            return (
                expand(prompt.token_ids, prompt.placeholders, {}).token_ids if prompt.placeholders else prompt.token_ids
            )
        terms = Terms(
            need="plan",
            lease=None,
            dtype=request.mm_dtype or self._tensor_dtype,
            salt=request.cache_salt,
            priority=request.priority or 0,
            deadline=deadline,
        )
        offered, items = await self._items(model, walked.conversation.media, media, terms)
        with offered:
            return self._expand(prompt, items).token_ids

    async def detokenize(self, body: Body) -> bytes:
        """Return the text of token ids, as JSON."""
        model, arrived = self.served(), _now()
        model.bounds.check_json(len(body))
        request: DetokenizeRequest = await self._parse(body, lambda: parse(body, "detokenize"))
        model.check_name(request.model)
        deadline = self._deadline(arrived, request.deadline_ms)

        def decode() -> str:
            model.tokenizer.check_ids(request.tokens, "tokens")
            return model.tokenizer.decode(request.tokens)

        text = await self._on_render_thread(deadline, decode)
        return await self.encode(len(request.tokens), lambda: msgspec.json.encode({"prompt": text}))

    # --- steps ----------------------------------------------------------------------------------------------------

    def _deadline(self, arrived: float, deadline_ms: int | None) -> float:
        seconds = self._request_timeout if deadline_ms is None else min(deadline_ms / 1000, self._request_timeout)
        return arrived + seconds

    async def _parse(self, body: Body, work: Callable[[], T]) -> T:
        if len(body) <= _LARGE_BODY:
            return work()
        async with _within(_now() + self._request_timeout):
            return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    async def _on_render_thread(self, deadline: float, work: Callable[..., T], *arguments: Any) -> T:
        """Return what ``work`` returns. Where the deadline comes first, work that has not begun is dropped."""
        try:
            async with _within(deadline):
                return await asyncio.get_running_loop().run_in_executor(self._render_thread, work, *arguments)
        finally:
            stages = self.served().stages
            while stages:
                self._observe(*stages.popleft())

    def _observe(self, stage: str, seconds: float) -> None:
        self.metrics.observe("mmprep_stage_seconds", seconds, stage=stage)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the block's time for ``stage``."""
        started = time.monotonic()
        yield
        self._observe(stage, time.monotonic() - started)


def _all(media: Sequence[Medium | None]) -> list[Medium]:
    return [medium for medium in media if medium is not None]


@contextmanager
def _naming(param: str) -> Iterator[None]:
    """Let an invalid request that names no place name ``param``."""
    try:
        yield
    except InvalidRequest as error:
        raise error.at(param) from None


def _now() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def _within(deadline: float) -> AsyncIterator[None]:
    """Raise DeadlineExceeded where the block is not over by ``deadline``, by the loop's clock."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the request's time was over before it was rendered and tokenized") from None


def _turns(lengths: Sequence[int]) -> Iterator[slice]:
    """Cut a list of prompts of these lengths into slices, each of one prompt or of at most ``_TURN`` in sum."""
    start = size = 0
    for index, length in enumerate(lengths):
        if index > start and size + length > _TURN:
            yield slice(start, index)
            start, size = index, 0
        size += length
    yield slice(start, len(lengths))


def _encode(
    model: ServedModel, prompts: Sequence[str | list[int]], params: Sequence[str], add_special_tokens: bool
) -> list[tuple[list[int], str | None]]:
    """Return ids and text of each prompt; on the render thread."""
    encoded: list[tuple[list[int], str | None]] = []
    for prompt, param in zip(prompts, params, strict=True):
        if isinstance(prompt, str):
            encoded.append((model.encode_text(prompt, add_special_tokens=add_special_tokens), prompt))
        else:
            model.tokenizer.check_ids(prompt, param)
            encoded.append((prompt, None))
    return encoded
