"""Prompts that were rendered and tokenized before.

The same conversation comes again when a router counts it and an engine then runs it, when a client tokenizes before it
asks, when a request is tried again, and when one question is asked about many pictures: media are no part of the rendered
text. What the template and the tokenizer make of it is then known. Used on the event loop.
"""

from __future__ import annotations

import sys
from collections import OrderedDict

import msgspec
from blake3 import blake3

from mmprep_frontend.render.conversation import Conversation
from mmprep_frontend.render.requests import ChatRequest, TokenizeRequest
from mmprep_frontend.render.tokens import EncodedPrompt

#: Bytes of JSON beside media above which a prompt is not looked for: encoding what identifies it would take too long.
LONGEST_JSON = 64 * 1024
#: Bytes of a token id in a list, of a placeholder, and of an entry with its key.
_ID, _PLACEHOLDER, _ENTRY = 40, 100, 500


class PromptCache:
    """Encoded prompts by everything that the template is given, least recently used out first.

    Parameters
    ----------
    max_bytes:
        Of memory, by :meth:`size`; 0: nothing is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._prompts: OrderedDict[bytes, EncodedPrompt] = OrderedDict()
        self._bytes = 0

    @staticmethod
    def size(prompt: EncodedPrompt) -> int:
        """Return the bytes of memory that an entry takes, roughly."""
        ids, placeholders = len(prompt.token_ids) * _ID, len(prompt.placeholders) * _PLACEHOLDER
        return _ENTRY + ids + placeholders + sys.getsizeof(prompt.text)

    def key(
        self,
        conversation: Conversation,
        request: ChatRequest | TokenizeRequest,
        *,
        nbytes: int,
        special: bool,
        scope: bytes,
    ) -> bytes | None:
        """Return what identifies the prompt, 32 bytes, or ``None`` where it is not to be cached.

        Parameters
        ----------
        nbytes:
            Of the request's JSON without its media.
        special:
            Whether the tokenizer's own special tokens are added.
        scope:
            The name space of the request's items: tenants do not share prompts either.
        """
        if not self._max_bytes or nbytes > LONGEST_JSON:
            return None
        given = (
            conversation.messages,
            request.tools,
            request.documents,
            request.chat_template_kwargs,
            request.reasoning_effort,
            request.add_generation_prompt,
            request.continue_final_message,
            request.chat_template,
            # Only a text that is too long is cut before it is tokenized.
            request.truncate_prompt_tokens is not None,
            request.truncation_side,
            special,
            scope,
        )
        try:
            return blake3(msgspec.json.encode(given)).digest()
        except RecursionError:  # rendering refuses it
            return None

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
        if key is None or key in self._prompts or self.size(prompt) > self._max_bytes:
            return
        self._prompts[key] = prompt
        self._bytes += self.size(prompt)
        while self._bytes > self._max_bytes:
            _, dropped = self._prompts.popitem(last=False)
            self._bytes -= self.size(dropped)

    def clear(self) -> None:
        """Forget everything."""
        self._prompts.clear()
        self._bytes = 0

    def validate(self) -> None:
        """Check the invariants."""
        assert self._bytes == sum(self.size(prompt) for prompt in self._prompts.values()), "bytes are miscounted"
        assert self._bytes <= self._max_bytes, "above the limit"
