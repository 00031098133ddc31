"""Cuts a prompt to so many tokens, as ``truncate_prompt_tokens`` and ``truncation_side`` say.

Rules
-----
- Ids are cut here, behind the expansion of media; never by the tokenizer, and never before.
- A range is left whole or the request is refused: a medium of which a part is gone would be read wrongly.
- What runs parallel to the ids, as their offsets, is cut with the same slice.

A text that is far too long is cut before it is tokenized too, to the characters that so many tokens can have at most, so
that nobody pays for what is thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.expansion import Expanded

if TYPE_CHECKING:
    from mmprep_frontend.render.requests import Side

_PARAM = "truncate_prompt_tokens"


@dataclass(frozen=True)
class Truncation:
    """How one request's prompts are cut.

    Attributes
    ----------
    tokens: that are kept at most; ``None``: all.
    side: from which tokens are cut off.
    """

    tokens: int | None
    side: Side

    def slice_of(self, length: int) -> slice:
        """Return what is kept of ``length`` tokens."""
        if self.tokens is None or length <= self.tokens:
            return slice(0, length)
        return slice(length - self.tokens, length) if self.side == "left" else slice(0, self.tokens)

    def trim(self, text: str, characters: int) -> tuple[str, int]:
        """Return ``text`` without what can't be kept, and how many characters are gone on its left.

        Parameters
        ----------
        text: to be tokenized.
        characters: that a prompt can have at most.
        """
        if self.tokens is None or len(text) <= characters:
            return text, 0
        if self.side == "left":
            return text[-characters:], len(text) - characters
        return text[:characters], 0


def truncation(tokens: int | None, side: Side | None, *, default: Side, max_model_len: int) -> Truncation:
    """Return how a request's prompts are cut.

    Parameters
    ----------
    tokens, side: the request's; -1 tokens: as many as leave room for an answer.
    default: the tokenizer's side.
    max_model_len: tokens of prompt and answer together.

    Raises
    ------
    InvalidRequest
        More tokens are to be kept than the model takes.
    """
    if tokens is not None and tokens > max_model_len:
        raise InvalidRequest(
            f"'{_PARAM}' is {tokens}, and the model takes at most {max_model_len} tokens.", param=_PARAM
        )
    if tokens == -1:
        tokens = max(1, max_model_len - 1)
    return Truncation(tokens, side or default)


def truncate(expanded: Expanded, how: Truncation) -> Expanded:
    """Return a prompt cut, its ranges moved with the tokens.

    Raises
    ------
    InvalidRequest
        A medium would be cut, or cut off.
    """
    kept = how.slice_of(len(expanded.token_ids))
    if kept.stop - kept.start == len(expanded.token_ids):
        return expanded
    for number, placed in enumerate(expanded.ranges):
        end = placed.offset + placed.length
        if placed.offset < kept.start or end > kept.stop:
            raise InvalidRequest(
                f"Keeping {how.tokens} of the prompt's {len(expanded.token_ids)} tokens would cut medium {number + 1}, "
                f"of modality '{placed.modality}', which takes tokens {placed.offset} to {end - 1}. Keep more tokens, "
                "shorten the text, or send fewer or smaller media.",
                param=_PARAM,
            )
    ranges = [replace(placed, offset=placed.offset - kept.start) for placed in expanded.ranges]
    return Expanded(expanded.token_ids[kept], ranges)


def truncate_offsets(offsets: list[tuple[int, int]] | None, how: Truncation) -> list[tuple[int, int]] | None:
    """Return the offsets of the tokens that are kept."""
    return None if offsets is None else offsets[how.slice_of(len(offsets))]
