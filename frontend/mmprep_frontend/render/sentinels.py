"""Marks that keep the template's placeholders apart from what a user typed.

A placeholder's text (``<|image_pad|>``) may come from the template, or from a user who typed it. Only the first stands
for a medium; the second is text and must never take a medium's place. So:

1. before a template is compiled, every placeholder text in its source is replaced by a *sentinel*, a random word that
   this process made at its start and never shows;
2. in the rendered prompt a sentinel is therefore a placeholder, and a placeholder's text was typed, also where it was
   typed in two halves that the template joined.

WARNING: nothing that leaves the process may hold a sentinel: pass it through :meth:`Sentinels.show` first.
"""

from __future__ import annotations

import re
import secrets

from mmprep.card import ModelCard, Placeholder


class Sentinels:
    """The sentinels of one model card.

    Parameters
    ----------
    card: names the placeholders.
    """

    def __init__(self, card: ModelCard) -> None:
        # Lower-case letters and digits: no filter of a template that looks at words or markup takes it apart.
        self._secret = f"mm{secrets.token_hex(16)}"
        #: What ends a message that is to be continued, see :mod:`.template`; not a placeholder.
        self.tail = f"{self._secret}t"
        self._placeholders = card.placeholders
        self._words = [f"{self._secret}p{index}e" for index in range(len(card.placeholders))]
        # Longest first: a placeholder's text may contain another's.
        self._longest_first = sorted(
            zip(card.placeholders, self._words, strict=True), key=lambda pair: len(pair[0].token), reverse=True
        )
        self._pattern = re.compile(f"{self._secret}p([0-9]+)e")

    def hide(self, text: str) -> str:
        """Return ``text``, which no user wrote, with sentinels for the placeholders' texts."""
        for placeholder, word in self._longest_first:
            text = text.replace(placeholder.token, word)
        return text

    def show(self, text: str) -> str:
        """Return ``text`` with the placeholders' texts for the sentinels."""
        for placeholder, word in zip(self._placeholders, self._words, strict=True):
            text = text.replace(word, placeholder.token)
        return text

    def part_text(self, placeholder: Placeholder) -> str:
        """Return what stands for a medium in a message of a template that takes only strings."""
        return self.hide(placeholder.part_text)

    def count(self, text: str | bytes) -> int:
        """Return how often ``text`` holds the secret of the sentinels."""
        return text.count(self._secret) if isinstance(text, str) else text.count(self._secret.encode())

    def order(self, text: str) -> list[Placeholder]:
        """Return the placeholders whose sentinels ``text`` holds, in order."""
        return [self._placeholders[int(index)] for index in self._pattern.findall(text)]
