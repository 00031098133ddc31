"""The served model as a frontend knows it: card, template, tokenizer, and the length of its context.

All of it is used on the one render thread: the tokenizer is not to be shared, and one is all that the memory budget has
room for.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmprep.card import ModelCard
from mmprep.errors import InvalidRequest, NotFound, StartupError
from mmprep.wire.messages import MAX_ITEMS
from mmprep_frontend.media.intake import Intake, Medium, Source
from mmprep_frontend.render.bounds import TextBounds
from mmprep_frontend.render.conversation import Conversation, walk
from mmprep_frontend.render.loaded_tokenizer import LoadedTokenizer
from mmprep_frontend.render.prompt_cache import PromptCache
from mmprep_frontend.render.requests import ChatRequest, CompletionRequest, TokenizeRequest, wants_offsets
from mmprep_frontend.render.sampling import NO_DEFAULTS, Defaults, read_defaults
from mmprep_frontend.render.sentinels import Sentinels
from mmprep_frontend.render.template import ChatTemplate, load_sources
from mmprep_frontend.render.tokens import EncodedPrompt, Tokenizer
from mmprep_frontend.render.truncation import Truncation, truncation
from mmprep_frontend.tracing.spans import record

_DEFAULT_LENGTH = 32_768
#: Bytes of all cached prompts of one frontend.
_CACHED_BYTES = 16 << 20
#: Stages that are noted and not taken out yet.
_NOTED = 1024


@dataclass(frozen=True)
class ServedModel:
    """One model, ready to render.

    Attributes
    ----------
    name: under which it is served.
    max_model_len: tokens of prompt and answer together.
    vocab_size: how many ids the engine knows: the tokenizer's, or more where the model's configuration says so.
    bounds: of a request's text.
    prompts: those that were encoded before.
    sampling: the model's defaults.
    stages: stages and their seconds, as the render thread noted them; for whoever counts to take out.
    """

    name: str
    card: ModelCard
    sentinels: Sentinels
    template: ChatTemplate
    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    bounds: TextBounds
    prompts: PromptCache
    sampling: Defaults = NO_DEFAULTS
    stages: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=_NOTED))

    def check_name(self, name: str | None) -> None:
        """Refuse another model's name; raises NotFound."""
        if name is not None and name != self.name:
            raise NotFound(
                f"The model {name[:200]!r} is not served here; this service has {self.name!r}.", param="model"
            )

    def walk(self, request: ChatRequest | TokenizeRequest, limits: dict[str, int]) -> Conversation:
        """Take the media out of a request's messages; raises InvalidRequest, also for more of them than ``limits`` allow."""
        assert request.messages is not None
        conversation = walk(request.messages, self.card, self.template.format_for(request), self.sentinels)
        if len(conversation.media) > MAX_ITEMS:
            raise InvalidRequest(
                f"The request has {len(conversation.media)} media; at most {MAX_ITEMS} are allowed in one.",
                param=conversation.media[MAX_ITEMS].param,
            )
        counts: dict[str, int] = {}
        for part in conversation.media:
            counts[part.modality] = counts.get(part.modality, 0) + 1
            limit = limits.get(part.modality, 0)
            if counts[part.modality] > limit:
                raise InvalidRequest(
                    f"At most {limit} of modality '{part.modality}' are allowed in one request (--limit-mm-per-prompt).",
                    param=part.param,
                )
        return conversation

    def encode_chat(self, conversation: Conversation, request: ChatRequest | TokenizeRequest) -> EncodedPrompt:
        """Render and tokenize; on the render thread."""
        with self._noting("template"):
            rendered = self.template.render(conversation, request)
        trimmed, dropped = self.truncation(request).trim(rendered, self.bounds.characters)
        if trimmed is not rendered and self.sentinels.order(trimmed) != self.sentinels.order(rendered):
            raise InvalidRequest(
                f"The prompt has {len(rendered)} characters, and truncating it would cut off a medium; shorten the text.",
                param="truncate_prompt_tokens",
            )
        counts = isinstance(request, TokenizeRequest)
        offsets = wants_offsets(request) and not conversation.media
        with self._noting("tokenize"):
            return self.tokenizer.encode_prompt(
                trimmed,
                add_special_tokens=_adds_special_tokens(request),
                check=self.bounds.check_counted if counts else self.bounds.check_prompt,
                offsets_from=dropped if offsets else None,
            )

    def encode_text(
        self, text: str, how: Truncation, *, add_special_tokens: bool, offsets: bool = False
    ) -> EncodedPrompt:
        """Tokenize a plain text, of which only what ``how`` can keep is looked at; on the render thread."""
        trimmed, dropped = how.trim(text, self.bounds.characters)
        with self._noting("tokenize"):
            encoded = self.tokenizer.encode_text(
                trimmed, add_special_tokens=add_special_tokens, offsets_from=dropped if offsets else None
            )
        return replace(encoded, text=text)

    def truncation(self, request: ChatRequest | CompletionRequest | TokenizeRequest) -> Truncation:
        """Return how a request's prompts are cut; raises InvalidRequest."""
        return truncation(
            request.truncate_prompt_tokens,
            request.truncation_side,
            default=self.tokenizer.truncation_side,
            max_model_len=self.max_model_len,
        )

    @contextlib.contextmanager
    def _noting(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        ended = time.monotonic()
        self.stages.append((stage, ended - started))
        record(stage, started, ended)

    def prompt_key(
        self, conversation: Conversation, request: ChatRequest | TokenizeRequest, nbytes: int, scope: bytes
    ) -> bytes | None:
        """Return what identifies the prompt in :attr:`prompts` of a request of ``nbytes`` of JSON beside its media."""
        if wants_offsets(request) or self.template.depends_on_time(request):
            return None
        special = _adds_special_tokens(request)
        return self.prompts.key(conversation, request, nbytes=nbytes, special=special, scope=scope)

    def encode_chat_and_read(
        self,
        conversation: Conversation,
        request: ChatRequest | TokenizeRequest,
        intake: Intake,
        sources: list[Source],
        known: EncodedPrompt | None,
    ) -> tuple[EncodedPrompt, list[Medium | None]]:
        """As :meth:`encode_chat` unless the prompt is ``known``, and decode and hash small media in the same hop."""
        return known or self.encode_chat(conversation, request), intake.read_now(sources)


def _adds_special_tokens(request: ChatRequest | TokenizeRequest) -> bool:
    return request.add_special_tokens if isinstance(request, ChatRequest) else request.adds_special_tokens


def load_model(
    directory: Path,
    card: ModelCard,
    loaded: LoadedTokenizer,
    *,
    name: str,
    max_model_len: int | None,
    template: str | None,
) -> ServedModel:
    """Put the parts of a model together.

    Parameters
    ----------
    loaded:
        The tokenizer, from :func:`~mmprep_frontend.render.loaded_tokenizer.load_tokenizer`.
    max_model_len:
        ``None``: what the model's configuration says.
    template:
        A chat template's text in place of the model's own, or ``None``.

    Raises
    ------
    StartupError
        A file of the model directory is missing or broken; the message names it.
    """
    sentinels = Sentinels(card)
    tokenizer = Tokenizer(loaded, card, sentinels)
    sources = load_sources(directory) if template is None else {"default": template}
    try:
        chat_template = ChatTemplate(sources, tokenizer.special_tokens, sentinels)
    except StartupError as error:
        raise StartupError(f"{'MODEL' if template is None else '--chat-template'}: {error}") from None
    config = _text_config(directory)
    length = max_model_len or config.get("max_position_embeddings", _DEFAULT_LENGTH)
    return ServedModel(
        name,
        card,
        sentinels,
        chat_template,
        tokenizer,
        length,
        max(tokenizer.vocab_size, config.get("vocab_size", 0)),
        TextBounds(length, tokenizer.longest_token),
        PromptCache(_CACHED_BYTES),
        read_defaults(directory),
    )


def _text_config(directory: Path) -> dict[str, int]:
    """Return the numbers of the text model, as config.json has them on the top or in a sub-configuration."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"config.json of the model directory cannot be read: {error}") from None
    parts = [part for part in (config.get("llm_config"), config.get("text_config"), config) if isinstance(part, dict)]
    return {name: value for part in parts for name, value in part.items() if type(value) is int}
