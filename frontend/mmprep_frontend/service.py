"""The life of a request in a frontend, whatever door it came through.

Parse and walk on the loop; then, side by side, one hop to the render thread (template, tokens, small media) and the
fetches; then the offer to the writer; then expansion. What leaves is a :class:`RenderedChat`, which the doors turn into
answers or frames.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from mmprep.arguments import choose
from mmprep.digest import Hasher
from mmprep.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MmprepError,
    NotFound,
    ServiceUnavailable,
)
from mmprep.items import unpack_meta
from mmprep.metrics import Metrics
from mmprep.wire.messages import ItemAnswer, LeaseTo, Need, Recalled
from mmprep_frontend.caller import ANONYMOUS
from mmprep_frontend.dispatch import WriterLink
from mmprep_frontend.known import KnownItems
from mmprep_frontend.media.embeddings import EmbeddedItem, embedded_item
from mmprep_frontend.media.intake import SMALL, TINY, Intake, Medium, Source, at_hand, first_error, size
from mmprep_frontend.media.keys import scope
from mmprep_frontend.model import ServedModel
from mmprep_frontend.offered import Offered, OfferItem
from mmprep_frontend.pace import Pace
from mmprep_frontend.render.answer import check_length
from mmprep_frontend.render.conversation import MediaPart
from mmprep_frontend.render.data_urls import Taken, take_out
from mmprep_frontend.render.expansion import Expanded, expand
from mmprep_frontend.render.messages import read_messages
from mmprep_frontend.render.parts import Message
from mmprep_frontend.render.places import Asked
from mmprep_frontend.render.requests import ChatRequest, TokenizeRequest, parse
from mmprep_frontend.render.responses import read_responses
from mmprep_frontend.render.sampling import check_against_model
from mmprep_frontend.render.tokens import EncodedPrompt
from mmprep_frontend.render.truncation import truncate, truncate_offsets
from mmprep_frontend.rendered import RenderedChat, RenderedItem, Terms, Unasked, Walked
from mmprep_frontend.tracing.spans import current, record, record_lookup, recording
from mmprep_frontend.wanted import check_injected, key_of, recalled_within, wanted

T = TypeVar("T")
#: A request's JSON as a door holds it.
Body: TypeAlias = bytes | memoryview
#: The API of a conversation: OpenAI's chat completions, Anthropic's messages, OpenAI's responses.
Form: TypeAlias = Literal["chat", "messages", "responses"]

#: Requests above this size are parsed off the loop.
_LARGE_BODY = 256 * 1024
#: Ids up to which an answer is encoded on the loop.
_FEW_IDS = 16_384
#: Bytes of what is remembered of items.
_KNOWN_BYTES = 16 << 20


class _Rendering(NamedTuple):
    """All that a chat is rendered of but its items; the times by the loop's clock."""

    model: ServedModel
    asked: Asked
    walked: Walked
    prompt: EncodedPrompt
    media: Sequence[Medium | None]
    arrived: float
    deadline: float


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
    trusts_kwargs:
        Whether requests may say how media are read and processed.
    trusts_templates:
        Whether they may bring or choose their chat template.
    injection:
        Whether items may have been injected.
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
        trusts_kwargs: bool,
        trusts_templates: bool,
        injection: bool = False,
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
        self.trusts_kwargs = trusts_kwargs
        self.trusts_templates = trusts_templates
        self._injection = injection
        self._known = KnownItems(_KNOWN_BYTES)
        self._pace = Pace()

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

    async def encode(self, ids: int, work: Callable[[], T]) -> T:
        """Return the answer that ``work`` encodes, of so many ids: on a thread where they are many."""
        return work() if ids <= _FEW_IDS else await self.on_thread(work)

    def served(self) -> ServedModel:
        """Return the model; raises ServiceUnavailable while it is not loaded."""
        if self.model is None:
            raise ServiceUnavailable("the service is starting; try again", retry_after=1.0)
        return self.model

    # --- chat -----------------------------------------------------------------------------------------------------

    async def chat(
        self,
        body: Body,
        attachments: Sequence[memoryview] = (),
        form: Form = "chat",
        *,
        principal: str = ANONYMOUS,
    ) -> RenderedChat:
        """Render one conversation.

        Parameters
        ----------
        body:
            JSON.
        attachments:
            What ``attachment:<n>`` URLs name; only through the native door.
        principal:
            Whose cache is used.
        form:
            The API that the body is a request of.

        Raises
        ------
        MmprepError
            With the place in the request as ``param``.
        """
        model, arrived = self.served(), now()
        read = partial(self._read, model, form)
        asked, taken = await self.parse_conversation(body, read, lambda asked: asked.request.messages)
        request = asked.request
        with asked.places.renaming(), naming("messages"):
            model.check_name(request.model)
            model.truncation(request)
            check_against_model(request, max_model_len=model.max_model_len, vocab_size=model.vocab_size)
            deadline = self.deadline(arrived, request.deadline_ms)
            await self.prepare(model, request, deadline)
            walked = self.walk(model, request, taken, principal)
            prompt, media = await self._prompt_and_media(model, request, walked, attachments, deadline)
            rendering = _Rendering(model, asked, walked, prompt, media, arrived, deadline)
            return self._from_memory(rendering) or await self._render(rendering)

    def _read(self, model: ServedModel, form: Form, body: Body) -> Asked:
        trusted, templates = self.trusts_kwargs, self.trusts_templates
        if form == "messages":
            return read_messages(body, model.template.habits, trusted=trusted, templates=templates)
        if form == "responses":
            return read_responses(body, trusted=trusted, templates=templates)
        return Asked(parse(body, "chat", trusted=trusted, templates=templates))

    async def prepare(self, model: ServedModel, request: ChatRequest | TokenizeRequest, deadline: float) -> None:
        """Compile the request's own chat template, where it brings one; raises InvalidRequest."""
        if not model.template.is_ready(request):
            await self.on_render_thread(deadline, model.template.prepare, request)

    def walk(self, model: ServedModel, request: ChatRequest | TokenizeRequest, taken: Taken, principal: str) -> Walked:
        """Take the media out of a request's messages and judge what is left; raises InvalidRequest.

        The media are of the principal's name space.
        """
        conversation = model.walk(request, self._limits)
        nbytes = max(0, len(taken.json) - sum(len(part.url) for part in conversation.media))
        if taken.urls:
            conversation = replace(conversation, media=taken.put_back(conversation.media))
        model.bounds.check_json(nbytes)
        modalities = {part.modality for part in conversation.media}
        kwargs = choose(model.card.arguments, request.mm_processor_kwargs or {}, modalities)
        return Walked(conversation, nbytes, scope(principal, request.cache_salt), kwargs)

    async def _render(self, rendering: _Rendering) -> RenderedChat:
        media, terms = rendering.media, self._terms(rendering)
        if not media:
            return self._rendered(rendering, [])
        offered, items = await self._all_items(rendering.model, rendering.walked.conversation.media, media, terms)
        try:
            chat = self._rendered(rendering, items)
        except BaseException:
            if offered is not None:
                offered.give_back()
            raise
        chat.offered = offered
        return chat

    def _rendered(self, rendering: _Rendering, items: list[RenderedItem]) -> RenderedChat:
        model, request, prompt = rendering.model, rendering.asked.request, rendering.prompt
        how = model.truncation(request)
        whole = self._expand(prompt, items) if items else expand(prompt.token_ids, prompt.placeholders, {})
        expanded = truncate(whole, how)
        check_length(len(expanded.token_ids), model.max_model_len)
        offsets = None if items else truncate_offsets(prompt.offsets, how)
        return RenderedChat(
            request, prompt, expanded, offsets, items, arrived=rendering.arrived, deadline=rendering.deadline
        )

    def _terms(self, rendering: _Rendering) -> Terms:
        request, walked = rendering.asked.request, rendering.walked
        need: Need = "plan" if request.payload == "none" else "tensors"
        return Terms(
            need=need,
            lease=_lease(request),
            dtype=request.mm_dtype or self._tensor_dtype,
            io=request.io,
            kwargs=walked.kwargs,
            scope=walked.scope,
            priority=request.priority or 0,
            deadline=rendering.deadline,
            for_job=request.queue is not None and need == "tensors",
        )

    # --- from memory ----------------------------------------------------------------------------------------------

    def _from_memory(self, rendering: _Rendering) -> RenderedChat | None:
        """Render a chat for a queue of what is remembered of its items; ``None`` where that is not enough."""
        parts, ring = rendering.walked.conversation.media, self.writer.mapping
        if rendering.asked.request.queue is None or ring is None or not parts:
            return None
        terms = self._terms(rendering)
        if any(map(terms.stays_here, parts)):
            return None
        asked = self._asked(rendering.model, parts, rendering.media, terms)
        found = self._known.recollect(asked, terms.need, ring.epoch)
        if found is None:
            return None
        items = [
            RenderedItem(part, told.key, item.answer, item.meta)
            for part, (item, told) in zip(parts, found, strict=True)
        ]
        chat = self._rendered(rendering, items)
        told = tuple(one.told for one in found)
        chat.unasked = Unasked(told, rendering.media, ring, partial(self._render_asked, rendering))
        return chat

    async def _render_asked(self, rendering: _Rendering) -> RenderedChat:
        with rendering.asked.places.renaming(), naming("messages"):
            return await self._render(rendering)

    def found(self, chat: RenderedChat, started: float) -> None:
        """The writer has found the items of a chat that was rendered from memory, between ``started`` and now."""
        assert chat.unasked is not None, "the writer was asked before"
        for medium, item in zip(chat.unasked.media, chat.items, strict=True):
            if medium is not None and item.answer.length:
                self._intake.decoded(medium)
        if (trace := current.get()) is not None:
            told = [(item.part.modality, item.answer) for item in chat.items]
            record_lookup(trace, started, time.monotonic(), told)

    # --- prompt and media -----------------------------------------------------------------------------------------

    async def _prompt_and_media(
        self,
        model: ServedModel,
        request: ChatRequest | TokenizeRequest,
        walked: Walked,
        attachments: Sequence[memoryview],
        deadline: float,
    ) -> tuple[EncodedPrompt, list[Medium | None]]:
        """Return the prompt and the request's media, ``None`` for those that it names only by their uuids."""
        conversation = walked.conversation
        sources = self._intake.sources(conversation.media, attachments)
        key = model.prompt_key(conversation, request, walked.nbytes, walked.scope)
        prompt = model.prompts.get(key)
        complete = all(map(at_hand, sources))
        nbytes = sum(map(size, sources))
        if prompt is not None and complete and nbytes <= TINY:
            encoded, media = prompt, self._intake.read_now(sources)
        elif complete and nbytes <= SMALL:
            encode = model.encode_chat_and_read
            encoded, media = await self.on_render_thread(
                deadline, encode, conversation, request, self._intake, sources, prompt
            )
        else:
            encoded, media = await self._side_by_side(model, request, walked, sources, known=prompt, deadline=deadline)
        model.prompts.put(key, encoded)
        self._note_hashing(media)
        return encoded, media

    async def _side_by_side(
        self,
        model: ServedModel,
        request: ChatRequest | TokenizeRequest,
        walked: Walked,
        sources: list[Source],
        *,
        known: EncodedPrompt | None,
        deadline: float,
    ) -> tuple[EncodedPrompt, list[Medium | None]]:
        conversation = walked.conversation
        try:
            async with _within(deadline), asyncio.TaskGroup() as group:
                reading = group.create_task(self._intake.read(sources, conversation.media, deadline, walked.scope))
                if known is None:
                    encode = self.on_render_thread(deadline, model.encode_chat, conversation, request)
                    encoding = group.create_task(encode)
        except BaseExceptionGroup as failures:
            raise first_error(failures) from None
        return known or encoding.result(), reading.result()

    async def _all_items(
        self, model: ServedModel, parts: Sequence[MediaPart], media: Sequence[Medium | None], terms: Terms
    ) -> tuple[Offered | None, list[RenderedItem]]:
        """Return all items in order, those that came embedded and travel as they are, and the offer of the others."""
        both = list(zip(parts, media, strict=True))
        others = [one for one in both if not terms.stays_here(one[0])]
        if len(others) == len(both):
            return await self._items(model, parts, media, terms)
        own = [await self.on_thread(self._own_item, model, *one, terms) for one in both if terms.stays_here(one[0])]
        offered: Offered | None = None
        items: list[RenderedItem] = []
        if others:
            offered, items = await self._items(model, [part for part, _ in others], [m for _, m in others], terms)
        waiting, ready = iter(items), iter(own)
        return offered, [next(ready if terms.stays_here(part) else waiting) for part in parts]

    def _own_item(self, model: ServedModel, part: MediaPart, medium: Medium, terms: Terms) -> RenderedItem:
        item = self._embedded(model, part, medium, terms)
        meta = item.embeddings.meta
        region = None if terms.need == "plan" else item.region()
        return RenderedItem(part, item.wanted.key, ItemAnswer("computed", meta=meta.pack()), meta, region)

    def _embedded(self, model: ServedModel, part: MediaPart, medium: Medium, terms: Terms) -> EmbeddedItem:
        return embedded_item(part, medium, card=model.card, scope=terms.scope, hash_name=self._hasher.name)

    async def _items(
        self, model: ServedModel, parts: Sequence[MediaPart], media: Sequence[Medium | None], terms: Terms
    ) -> tuple[Offered, list[RenderedItem]]:
        asked = self._asked(model, parts, media, terms)
        offered = await self._offer(parts, asked, terms)
        for answer, medium in zip(offered.items, media, strict=True):
            # Where only a plan was asked for, nobody may have looked behind the header.
            if medium is not None and answer.fault is None and (answer.length or answer.inline):
                self._intake.decoded(medium)
        for answer, part in zip(offered.items, parts, strict=True):
            if answer.fault is not None:
                offered.give_back()
                raise answer.fault.error().at(part.param)
        try:
            items = []
            for part, item, answer in zip(parts, asked, offered.items, strict=True):
                meta = unpack_meta(answer.meta)
                check_injected(part, meta, model.card, terms.dtype)
                key = key_of(item, answer, meta)
                items.append(RenderedItem(part, key, answer, meta))
                if meta.injected is None and not answer.inline:
                    self._known.note(key, answer, meta, offered.mapping.epoch)
                    if isinstance(item, Recalled):
                        self._known.note_alias(item.alias, item.variant, key)
        except (ValueError, NotFound) as error:
            offered.give_back()
            if isinstance(error, NotFound):
                raise
            raise InternalError("an item's metadata cannot be read") from None
        return offered, items

    def _asked(
        self, model: ServedModel, parts: Sequence[MediaPart], media: Sequence[Medium | None], terms: Terms
    ) -> list[OfferItem | Recalled]:
        """Return what the writer is asked for; what aliases will stand for then is remembered."""
        asked = [self._wanted(model, *one, terms) for one in zip(parts, recalled_within(parts, media), strict=True)]
        for item in asked:
            if isinstance(item, OfferItem) and item.alias is not None:
                self._known.note_alias(item.alias.id, item.variant, item.key)
        return asked

    def _wanted(self, model: ServedModel, part: MediaPart, medium: Medium | None, terms: Terms) -> OfferItem | Recalled:
        if part.grid is not None:
            assert medium is not None, "embeddings are sent each time"
            return self._embedded(model, part, medium, terms).wanted
        return wanted(
            part,
            medium,
            card=model.card,
            scope=terms.scope,
            hash_name=self._hasher.name,
            dtype=terms.dtype,
            io=terms.io,
            kwargs=terms.kwargs,
            injected=self._injection,
        )

    def _note_hashing(self, media: Sequence[Medium | None]) -> None:
        for medium in media:
            if medium is not None:
                self.observe("hash", medium.seconds)
                if medium.hashed:
                    record("hash", medium.hashed - medium.seconds, medium.hashed)

    async def _offer(self, parts: Sequence[MediaPart], asked: Sequence[OfferItem | Recalled], terms: Terms) -> Offered:
        trace, started = current.get(), time.monotonic()
        offered = await self.writer.offer(
            asked,
            need=terms.need,
            deadline=terms.deadline,
            priority=terms.priority,
            lease=terms.lease,
            traced=trace is not None,
        )
        try:
            await self._pace.step()  # the writer answers many at once
        except BaseException:
            offered.give_back()
            raise
        if trace is not None:
            told = [(part.modality, answer) for part, answer in zip(parts, offered.items, strict=True)]
            record_lookup(trace, started, time.monotonic(), told)
        return offered

    def _expand(self, prompt: EncodedPrompt, items: Sequence[RenderedItem]) -> Expanded:
        plans: dict[str, list[Any]] = {}
        for item in items:
            plans.setdefault(item.part.modality, []).append(item.meta.plan)
        with self.timed("expand"):
            return expand(prompt.token_ids, prompt.placeholders, plans)

    async def chat_tokens(
        self,
        model: ServedModel,
        request: TokenizeRequest,
        walked: Walked,
        attachments: Sequence[memoryview],
        deadline: float,
    ) -> list[int]:
        """Return the ids of a chat, media expanded; only their plans are computed."""
        prompt, media = await self._prompt_and_media(model, request, walked, attachments, deadline)
        how = model.truncation(request)
        if not media:
            return truncate(expand(prompt.token_ids, prompt.placeholders, {}), how).token_ids
        terms = Terms(
            need="plan",
            lease=None,
            dtype=request.mm_dtype or self._tensor_dtype,
            io=request.io,
            kwargs=walked.kwargs,
            scope=walked.scope,
            priority=request.priority or 0,
            deadline=deadline,
        )
        offered, items = await self._all_items(model, walked.conversation.media, media, terms)
        with offered or nullcontext():
            return truncate(self._expand(prompt, items), how).token_ids

    # --- steps ----------------------------------------------------------------------------------------------------

    def deadline(self, arrived: float, deadline_ms: int | None) -> float:
        """Return when a request's time is over, by the loop's clock."""
        seconds = self._request_timeout if deadline_ms is None else min(deadline_ms / 1000, self._request_timeout)
        return arrived + seconds

    async def parse_conversation(
        self, body: Body, read: Callable[[Body], T], messages: Callable[[T], Sequence[Message] | None]
    ) -> tuple[T, Taken]:
        """Return what ``read`` makes of ``body``, and the data URLs that were taken out of it before."""
        await self._pace.step()
        taken = take_out(body)
        if taken.urls and len(taken.json) <= _LARGE_BODY:
            with suppress(MmprepError):  # what is wrong is told of the whole
                parsed = read(taken.json)
                if taken.are_media_of(messages(parsed) or ()):
                    return parsed, taken
        return await self._parsed(body, lambda: read(body)), Taken(body)

    async def parse_body(self, body: Body, work: Callable[[], T]) -> T:
        """Return what ``work`` makes of ``body``, when it is the request's turn; off the loop where it is large."""
        await self._pace.step()
        return await self._parsed(body, work)

    async def _parsed(self, body: Body, work: Callable[[], T]) -> T:
        if len(body) <= _LARGE_BODY:
            return work()
        async with _within(now() + self._request_timeout):
            return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    async def on_render_thread(self, deadline: float, work: Callable[..., T], *arguments: Any) -> T:
        """Return what ``work`` returns. Where the deadline comes first, work that has not begun is dropped."""
        try:
            async with _within(deadline):
                call = partial(copy_context().run, work) if current.get() is not None else work
                return await asyncio.get_running_loop().run_in_executor(self._render_thread, call, *arguments)
        finally:
            stages = self.served().stages
            while stages:
                self.observe(*stages.popleft())

    def observe(self, stage: str, seconds: float) -> None:
        """Count so much time for ``stage``."""
        self.metrics.observe("mmprep_stage_seconds", seconds, stage=stage)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the block's time for ``stage``."""
        started = time.monotonic()
        with recording(stage):
            yield
        self.observe(stage, time.monotonic() - started)


def _lease(request: ChatRequest) -> LeaseTo | None:
    """Return to whom the request's addresses are leased; those of a job are leased when it is delivered."""
    if request.payload != "shm" or request.queue is not None:
        return None
    return LeaseTo(request.backend_id or "", request.lease_kind or "copy")


@contextmanager
def naming(param: str) -> Iterator[None]:
    """Let an invalid request that names no place name ``param``."""
    try:
        yield
    except InvalidRequest as error:
        raise error.at(param) from None


def now() -> float:
    """Return the running loop's time, in seconds."""
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def _within(deadline: float) -> AsyncIterator[None]:
    """Raise DeadlineExceeded where the block is not over by ``deadline``, by the loop's clock."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the request's time was over before it was rendered and tokenized") from None
