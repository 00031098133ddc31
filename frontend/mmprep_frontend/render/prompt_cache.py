"""Prompts that were rendered and tokenized before.

The same conversation comes again when a router counts it and an engine then runs it, when a client tokenizes before it
asks, when a request is tried again, and when one question is asked about many pictures: media are no part of the rendered
text. What the template and the tokenizer make of it is then known. Used on the event loop.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from mmprep_frontend.render.conversation import Conversation
from mmprep_frontend.render.requests import ChatRequest, TokenizeRequest
from mmprep_frontend.render.tokens import EncodedPrompt

#: Longer keys are not worth the search.
_LONGEST_KEY = 64 * 1024


class PromptCache:
    """Encoded prompts by everything that the template is given, least recently used out first.

    Parameters
    ----------
    max_tokens:
        Of all prompts together; 0 for a template whose text also depends on the time.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._prompts: OrderedDict[bytes, EncodedPrompt] = OrderedDict()
        self._tokens = 0

    def key(
        self, conversation: Conversation, request: ChatRequest | TokenizeRequest, *, special: bool, salt: str | None
    ) -> bytes | None:
        """Return what identifies the prompt, or ``None`` where it is not to be cached.

        Parameters
        ----------
        special:
            Whether the tokenizer's own special tokens are added.
        salt:
            The request's ``cache_salt``: tenants do not share prompts either.
        """
        if not self._max_tokens:
            return None
        given = (
            conversation.messages,
            request.tools,
            request.documents,
            request.chat_template_kwargs,
            request.reasoning_effort,
            request.add_generation_prompt,
            request.continue_final_message,
            special,
            salt,
        )
        key = msgspec.json.encode(given)
        return key if len(key) <= _LONGEST_KEY else None

    def get(self, key: bytes | None) -> EncodedPrompt | None:
        """Return the prompt of ``key`` and note its use."""
        if key is None:
            return None
        prompt = self._prompts.get(key)
        if prompt is not None:
            self._prompts.move_to_end(key)
        return prompt

    def put(self, key: bytes | None, prompt: EncodedPrompt) -> None:
        """Keep a prompt."""
        if key is None or key in self._prompts or len(prompt.token_ids) > self._max_tokens:
            return
        self._prompts[key] = prompt
        self._tokens += len(prompt.token_ids)
        while self._tokens > self._max_tokens:
            _, dropped = self._prompts.popitem(last=False)
            self._tokens -= len(dropped.token_ids)

    def validate(self) -> None:
        """Check the invariants."""
        assert self._tokens == sum(len(prompt.token_ids) for prompt in self._prompts.values()), "tokens are miscounted"
        assert self._tokens <= self._max_tokens, "above the limit"
