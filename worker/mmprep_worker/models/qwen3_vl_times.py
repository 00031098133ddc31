"""The text that stands before each pair of a Qwen3-VL video's frames, ``<12.5 seconds>``, as token ids.

transformers writes it into the prompt between special tokens, and vLLM encodes it alone, so its ids do not depend on the
rest. A tokenizer of Qwen's cuts it into the same pieces whatever the time: ``<``, single digits, ``.``, a digit,
`` seconds``, ``>``. So their ids are looked up once and the tokenizer, 60 MB, is not kept; one that cuts otherwise is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tokenizers import Tokenizer

_DIGITS = "0123456789"


class TimeTokens:
    """Encodes times.

    Parameters
    ----------
    tokenizer:
        The model's; its truncation and padding are switched off.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer: Tokenizer | None = tokenizer
        self._pieces = {piece: self._encoded(piece) for piece in ("<", ".", " seconds>", *_DIGITS)}
        if all(self._joined(text) == self._encoded(text) for text in _probes()):
            self._tokenizer = None

    def encode(self, seconds: float) -> list[int]:
        """Return the ids of a time in seconds."""
        text = f"<{seconds:.1f} seconds>"
        return self._joined(text) if self._tokenizer is None else self._encoded(text)

    def _encoded(self, text: str) -> list[int]:
        assert self._tokenizer is not None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _joined(self, text: str) -> list[int]:
        number = text.removeprefix("<").removesuffix(" seconds>")
        return list(itertools.chain.from_iterable(self._pieces[piece] for piece in ("<", *number, " seconds>")))


def _probes() -> Iterator[str]:
    """Yield times in which each digit stands next to each other one, at each place of up to five, and each alone."""
    for pair in itertools.product(_DIGITS, repeat=2):
        two = "".join(pair)
        yield from (f"<{number} seconds>" for number in (f"{two[0]}.{two[1]}", f"{two}.{two[0]}", f"1{two}{two[1]}.0"))
        yield f"<{two}{two}{two[0]}.{two[1]} seconds>"
