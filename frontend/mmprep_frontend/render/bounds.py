"""How much text one request may hold, judged before any of it is rendered or tokenized.

A prompt of ``max_model_len`` tokens has no more characters than so many of the vocabulary's longest token: a longer text
cannot fit, and is refused without tokenizing it. (A tokenizer that makes one token of any number of characters is the
exception; its prompts are held to the same bound.)

The text is rendered from JSON, which is bounded first and generously: a template may leave parts of a conversation out.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmprep.errors import InvalidRequest

#: Bytes of JSON that one character may take: a surrogate pair, both halves escaped.
_JSON_BYTES = 12
#: Bytes of JSON without media that every request may have, however short the model's context is.
_LEAST_JSON = 16 << 20
#: Characters that may always be counted: a tokenizer is also asked how much too long a text is.
_LEAST_COUNTED = 1 << 20
#: Prompts of one completion request.
MAX_PROMPTS = 4096


@dataclass(frozen=True)
class TextBounds:
    """The bounds of one model.

    Attributes
    ----------
    max_model_len: tokens of prompt and answer together.
    longest_token: characters of the longest token.
    """

    max_model_len: int
    longest_token: int

    @property
    def characters(self) -> int:
        """The most characters of a prompt that is rendered."""
        return self.max_model_len * self.longest_token

    @property
    def counted_characters(self) -> int:
        """The most characters of a text that is only tokenized."""
        return max(self.characters, _LEAST_COUNTED)

    @property
    def json_bytes(self) -> int:
        """The most bytes of a request's JSON, media not counted."""
        return max(_LEAST_JSON, _JSON_BYTES * self.characters)

    def check_prompt(self, characters: int, param: str | None = None) -> None:
        """Refuse a prompt of so many characters that it cannot fit; raises InvalidRequest."""
        if characters > self.characters:
            raise InvalidRequest(
                f"The prompt has {characters} characters; the model takes at most {self.max_model_len} tokens, which are "
                f"at most {self.characters} characters. Shorten the text.",
                param=param,
            )

    def check_counted(self, characters: int, param: str | None = None) -> None:
        """Refuse a text that is too long to be counted; raises InvalidRequest."""
        if characters > self.counted_characters:
            raise InvalidRequest(
                f"The text has {characters} characters; at most {self.counted_characters} are tokenized in one request. "
                "Send it in parts.",
                param=param,
            )

    def check_json(self, nbytes: int) -> None:
        """Refuse a request of so many bytes beside its media; raises InvalidRequest."""
        if nbytes > self.json_bytes:
            raise InvalidRequest(
                f"The request has {nbytes} bytes beside its media; at most {self.json_bytes} are allowed. Shorten the "
                "text, or send it in several requests."
            )
