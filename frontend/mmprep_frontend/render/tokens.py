"""Text to token ids and back, with the model's own fast tokenizer.

Rules
-----
- One instance is used by one thread at a time, and one is enough for a process (a large vocabulary takes 100 MB).
- Nothing is ever truncated or padded by the tokenizer: on a shared one that gave wrong lengths without an error.
- A prompt is encoded in one call. Only where a user typed a placeholder's text is it cut, so that the text stays text:
  each typed one is cut behind its first character and the pieces are encoded apart.
- Whatever the tokenizer did, the placeholders' ids must be as many as the sentinels, in their order; else the prompt
  is refused. That holds also where a normalizer makes a placeholder of other characters.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from mmprep.card import ModelCard
from mmprep.errors import InvalidRequest, StartupError
from mmprep_frontend.render.loaded_tokenizer import LoadedTokenizer
from mmprep_frontend.render.sentinels import Sentinels

#: Ids that are looked at in one call.
_PIECE = 16_384


@dataclass(frozen=True)
class Placed:
    """One placeholder in a prompt: its modality, and its index in the token ids."""

    modality: str
    position: int


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as ids, before the placeholders are expanded.

    Attributes
    ----------
    token_ids: of the prompt.
    placeholders: where media belong.
    text: as the model's users know it; ``None`` where the prompt came as ids.
    offsets: first character and first one behind it, of each id in the text, where they were asked for; (0, 0) for a
        special token that the tokenizer added.
    """

    token_ids: list[int]
    placeholders: list[Placed]
    text: str | None
    offsets: list[tuple[int, int]] | None = None


class Tokenizer:
    """The tokenizer of one model.

    Parameters
    ----------
    loaded: the model's; it is this object's own from here on.
    card: of the model; names the placeholders.
    sentinels: of the card.

    Raises
    ------
    StartupError
        The card's ids are not the tokenizer's.
    """

    def __init__(self, loaded: LoadedTokenizer, card: ModelCard, sentinels: Sentinels) -> None:
        self._backend = loaded.backend
        self._backend.no_truncation()
        self._backend.no_padding()
        for placeholder in card.placeholders:
            if self._backend.token_to_id(placeholder.token) != placeholder.token_id:
                raise StartupError(f"The tokenizer has no token '{placeholder.token}' of id {placeholder.token_id}.")
        #: Special tokens by name, as the chat template's variables.
        self.special_tokens = dict(loaded.special_tokens)
        #: One more than the largest id, added tokens included.
        self.vocab_size = 1 + max(
            self._backend.get_vocab_size(with_added_tokens=False) - 1,
            *self._backend.get_added_tokens_decoder(),
        )
        #: Characters of the longest token: of a byte-level one, its bytes, of which a character has one or more.
        self.longest_token = max(map(len, self._backend.get_vocab(with_added_tokens=True)))
        #: From which side the tokenizer's configuration cuts too long texts.
        self.truncation_side = loaded.truncation_side
        self._sentinels = sentinels
        self._modalities = {placeholder.token_id: placeholder.modality for placeholder in card.placeholders}
        self._placeholders = [placeholder.token for placeholder in card.placeholders]
        self._typed = re.compile("|".join(f"(?={re.escape(p.token)})" for p in card.placeholders))
        self._before, self._after = self._surroundings()
        del loaded
        _return_freed_memory()

    def encode_prompt(
        self,
        rendered: str,
        *,
        add_special_tokens: bool,
        check: Callable[[int], None] = lambda _: None,
        offsets_from: int | None = None,
    ) -> EncodedPrompt:
        """Return the ids of a prompt and the places of its placeholders.

        Parameters
        ----------
        rendered: the prompt's text, sentinels where media belong.
        add_special_tokens: put the tokenizer's own special tokens around it.
        check: called with the characters of the prompt before it is tokenized; raises where they are too many.
        offsets_from: the offset of the text's first character; ``None``: no offsets are wanted, which is faster.

        Raises
        ------
        InvalidRequest
            The prompt is empty or too long, or the tokenizer makes placeholders of text that is none.
        """
        pieces = [self._sentinels.show(piece) for piece in self._cut_typed(rendered)]
        check(sum(map(len, pieces)))
        token_ids, offsets = self._encode(pieces, add_special_tokens=add_special_tokens, offsets_from=offsets_from)
        if not token_ids:
            raise InvalidRequest("The prompt is empty.")
        placeholders = self._find(token_ids)
        if [placed.modality for placed in placeholders] != [p.modality for p in self._sentinels.order(rendered)]:
            raise InvalidRequest("The text holds characters that the tokenizer takes for a placeholder of a medium.")
        return EncodedPrompt(token_ids, placeholders, "".join(pieces), offsets)

    def encode_text(self, text: str, *, add_special_tokens: bool, offsets_from: int | None = None) -> EncodedPrompt:
        """Return a plain text as ids, of which an empty one has none; it may spell special tokens, and has no placeholders.

        Parameters
        ----------
        add_special_tokens, offsets_from: as :meth:`encode_prompt` has them.
        """
        token_ids, offsets = self._encode([text], add_special_tokens=add_special_tokens, offsets_from=offsets_from)
        return EncodedPrompt(token_ids, [], text, offsets)

    def check_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Refuse ids that the model does not have, and an empty list.

        Raises
        ------
        InvalidRequest
            ``param`` names the first wrong one, as ``tokens[3]``.
        """
        if not token_ids:
            raise InvalidRequest("At least one token id is needed.", param=param)
        # In pieces: one call over millions of ids would hold up every other thread.
        pieces = (token_ids[start : start + _PIECE] for start in range(0, len(token_ids), _PIECE))
        if all(min(piece) >= 0 and max(piece) < self.vocab_size for piece in pieces):
            return
        index = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < self.vocab_size)
        raise InvalidRequest(
            f"{token_ids[index]} is no token id of this model; they go from 0 to {self.vocab_size - 1}.",
            param=f"{param}[{index}]",
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of checked ids, special tokens included."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=False)
        return text

    def token_strs(self, token_ids: Sequence[int]) -> list[str]:
        """Return the vocabulary's own spelling of each id; empty for one that the vocabulary leaves out."""
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def _encode(
        self, pieces: list[str], *, add_special_tokens: bool, offsets_from: int | None
    ) -> tuple[list[int], list[tuple[int, int]] | None]:
        # The fast call keeps no account of characters.
        encode = self._backend.encode_batch_fast if offsets_from is None else self._backend.encode_batch
        encodings = encode(pieces, add_special_tokens=False)
        token_ids = encodings[0].ids if len(encodings) == 1 else list(chain.from_iterable(e.ids for e in encodings))
        offsets: list[tuple[int, int]] | None = None
        if offsets_from is not None:
            starts = accumulate(map(len, pieces), initial=offsets_from)
            offsets = [
                (start + first, start + last)
                for start, encoding in zip(starts, encodings, strict=False)
                for first, last in encoding.offsets
            ]
        if add_special_tokens:
            token_ids = [*self._before, *token_ids, *self._after]
            if offsets is not None:
                offsets = [*((0, 0) for _ in self._before), *offsets, *((0, 0) for _ in self._after)]
        return token_ids, offsets

    def _cut_typed(self, rendered: str) -> list[str]:
        """Return ``rendered`` in pieces, none of which holds a placeholder's text."""
        if not any(token in rendered for token in self._placeholders):  # a tenth of the time that the pattern takes
            return [rendered]
        cuts = [match.start() + 1 for match in self._typed.finditer(rendered)]
        return [rendered[start:end] for start, end in zip([0, *cuts], [*cuts, len(rendered)], strict=True)]

    def _find(self, token_ids: list[int]) -> list[Placed]:
        found = []
        for token_id, modality in self._modalities.items():
            position = -1
            # `index` searches in C: a Python loop over 16 thousand ids would take a millisecond.
            for _ in range(token_ids.count(token_id)):
                position = token_ids.index(token_id, position + 1)
                found.append(Placed(modality, position))
        return sorted(found, key=lambda placed: placed.position)

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """Return the special ids that the tokenizer puts before and behind a text.

        They are added here and not by the tokenizer, because a prompt may be encoded in pieces.
        """
        plain: list[int] = self._backend.encode("a", add_special_tokens=False).ids
        whole: list[int] = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        raise StartupError("The tokenizer changes a text when special tokens are added; such a one is not supported.")


def _return_freed_memory() -> None:
    """Give the system back what loading used and freed: 100 of 220 MB with a vocabulary of 150 thousand."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other C libraries do not
    if trim is not None:
        trim(0)
