"""What is answered with text and ids alone: completions, counting and its reverse.

A chat that is counted goes the way of one that is rendered, in :mod:`mmprep_frontend.service`; here is what has no media.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from mmprep.arguments import choose
from mmprep.errors import InvalidRequest
from mmprep_frontend.caller import ANONYMOUS
from mmprep_frontend.model import ServedModel
from mmprep_frontend.render.answer import check_length, generate_request
from mmprep_frontend.render.encodings import JSON, Encoding
from mmprep_frontend.render.expansion import expand
from mmprep_frontend.render.requests import CompletionRequest, DetokenizeRequest, parse, wants_offsets
from mmprep_frontend.render.sampling import check_against_model
from mmprep_frontend.render.tokens import EncodedPrompt
from mmprep_frontend.render.truncation import truncate_offsets
from mmprep_frontend.rendered import RenderedChat
from mmprep_frontend.service import Body, Service, naming, now

#: How many ids the rest of one answer is worth.
_ANSWER = 100
#: Characters and ids that one completion request has tokenized or checked before others get their turn.
_TURN = 64 * 1024


class Completions(NamedTuple):
    """A completion request and its prompts, encoded and cut; the times by the loop's clock."""

    request: CompletionRequest
    prompts: list[EncodedPrompt]
    arrived: float
    deadline: float

    def job(self, max_model_len: int) -> RenderedChat:
        """Return the one prompt of a request for a queue; raises InvalidRequest where it leaves no room for an answer."""
        (prompt,) = self.prompts
        with naming("prompt"):
            check_length(len(prompt.token_ids), max_model_len)
        whole = expand(prompt.token_ids, [], {})
        return RenderedChat(self.request, prompt, whole, prompt.offsets, arrived=self.arrived, deadline=self.deadline)


class Texts:
    """Answers about texts and ids.

    Parameters
    ----------
    service:
        Has the model and the threads.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def completions(self, body: Body) -> Completions:
        """Read a completion request and encode its prompts."""
        model, arrived = self._service.served(), now()
        model.bounds.check_json(len(body))
        request = await self._service.parse_body(
            body,
            lambda: parse(
                body, "completion", trusted=self._service.trusts_kwargs, templates=self._service.trusts_templates
            ),
        )
        model.check_name(request.model)
        check_against_model(request, max_model_len=model.max_model_len, vocab_size=model.vocab_size)
        choose(model.card.arguments, request.mm_processor_kwargs or {}, ())
        deadline = self._service.deadline(arrived, request.deadline_ms)
        with naming("prompt"):
            encoded = await self._encode_prompts(model, request, deadline)
        return Completions(request, encoded, arrived, deadline)

    async def answer(self, completions: Completions, request_id: str, encoding: Encoding = JSON) -> bytes:
        """Return the answer to a completion request: a list of GenerateRequests, one a prompt."""
        model, request, encoded = self._service.served(), completions.request, completions.prompts
        numbered = request.is_batch
        with naming("prompt"):

            def answers() -> bytes:
                told = (
                    generate_request(
                        request,
                        request_id=f"{request_id}-{index}" if numbered else request_id,
                        model=model.name,
                        token_ids=prompt.token_ids,
                        max_model_len=model.max_model_len,
                        defaults=model.sampling,
                        prompt_text=prompt.text,
                        token_offsets=prompt.offsets,
                    )
                    for index, prompt in enumerate(encoded)
                )
                return encoding.join(list(map(encoding.generate_request, told)))

            return await self._encode(sum(_ANSWER + len(prompt.token_ids) for prompt in encoded), answers)

    async def _encode(self, ids: int, answer: Callable[[], bytes]) -> bytes:
        with self._service.timed("serialize"):
            return await self._service.encode(ids, answer)

    async def _encode_prompts(
        self, model: ServedModel, request: CompletionRequest, deadline: float
    ) -> list[EncodedPrompt]:
        """Return every prompt encoded and cut, some at a time, so that others get their turn on the render thread."""
        prompts = request.prompts()
        params = [f"prompt[{index}]" for index in range(len(prompts))] if request.is_batch else ["prompt"]
        if model.truncation(request).tokens is None:
            for prompt, param in zip(prompts, params, strict=True):
                if isinstance(prompt, str):
                    model.bounds.check_prompt(len(prompt), param)
        encoded: list[EncodedPrompt] = []
        for turn in _turns([len(prompt) for prompt in prompts]):
            encoded += await self._service.on_render_thread(
                deadline, _encode, model, request, prompts[turn], params[turn]
            )
        return encoded

    async def tokenize(
        self,
        body: Body,
        attachments: Sequence[memoryview] = (),
        *,
        principal: str = ANONYMOUS,
        encoding: Encoding = JSON,
    ) -> bytes:
        """Tokenize a text or a chat; media are expanded, and only their plans are computed."""
        model, arrived = self._service.served(), now()
        request, taken = await self._service.parse_conversation(
            body,
            lambda json: parse(
                json, "tokenize", trusted=self._service.trusts_kwargs, templates=self._service.trusts_templates
            ),
            lambda request: request.messages,
        )
        model.check_name(request.model)
        deadline = self._service.deadline(arrived, request.deadline_ms)
        if request.prompt is not None:
            choose(model.card.arguments, request.mm_processor_kwargs or {}, ())
            how = model.truncation(request)
            if how.tokens is None:
                model.bounds.check_counted(len(request.prompt), "prompt")
            text, special = request.prompt, request.adds_special_tokens
            encoded = await self._service.on_render_thread(
                deadline, lambda: model.encode_text(text, how, add_special_tokens=special)
            )
            token_ids = encoded.token_ids[how.slice_of(len(encoded.token_ids))]
        else:
            await self._service.prepare(model, request, deadline)
            with naming("messages"):
                token_ids = await self._service.chat_tokens(
                    model, request, self._service.walk(model, request, taken, principal), attachments, deadline
                )
        strings = None
        if request.return_token_strs:
            strings = await self._service.on_render_thread(deadline, model.tokenizer.token_strs, token_ids)

        def answer() -> bytes:
            return encoding.encode(
                {
                    "count": len(token_ids),
                    "max_model_len": model.max_model_len,
                    "tokens": encoding.long_list(token_ids),
                    "token_strs": None if strings is None else encoding.long_list(strings),
                }
            )

        return await self._encode(len(token_ids), answer)

    async def detokenize(self, body: Body, encoding: Encoding = JSON) -> bytes:
        """Return the text of token ids."""
        model, arrived = self._service.served(), now()
        model.bounds.check_json(len(body))
        request: DetokenizeRequest = await self._service.parse_body(body, lambda: parse(body, "detokenize"))
        model.check_name(request.model)
        deadline = self._service.deadline(arrived, request.deadline_ms)

        def decode() -> str:
            if request.tokens:
                model.tokenizer.check_ids(request.tokens, "tokens")
            return model.tokenizer.decode(request.tokens)

        text = await self._service.on_render_thread(deadline, decode)
        return await self._encode(len(request.tokens), lambda: encoding.encode({"prompt": text}))


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
    model: ServedModel, request: CompletionRequest, prompts: Sequence[str | list[int]], params: Sequence[str]
) -> list[EncodedPrompt]:
    """Return each prompt encoded and cut; on the render thread."""
    how = model.truncation(request)
    encoded = []
    for prompt, param in zip(prompts, params, strict=True):
        if isinstance(prompt, str):
            whole = model.encode_text(
                prompt, how, add_special_tokens=request.add_special_tokens, offsets=wants_offsets(request)
            )
            if not whole.token_ids:
                raise InvalidRequest("The prompt is empty, and engines take none without a token.", param=param)
        else:
            model.tokenizer.check_ids(prompt, param)
            whole = EncodedPrompt(prompt, [], None)
        kept = how.slice_of(len(whole.token_ids))
        encoded.append(replace(whole, token_ids=whole.token_ids[kept], offsets=truncate_offsets(whole.offsets, how)))
    return encoded
