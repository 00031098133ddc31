"""The text of an answer from its token ids, piece by piece, up to a stop string. Pure.

A stop string may come in pieces: text that could be the start of one is held back until it is known to be none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


class AnswerText:
    """One answer.

    Parameters
    ----------
    decode:
        Returns the text that one more id adds, ``None`` where none is complete yet.
    stops:
        Texts that end the answer; none is empty.
    include_stop:
        Whether a stop string belongs to the answer.

    Attributes
    ----------
    stopped: a stop string was found; what comes after it is nothing.
    """

    def __init__(
        self, decode: Callable[[int], str | None], stops: Sequence[str] = (), *, include_stop: bool = False
    ) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._include = include_stop
        self._held = ""
        self.stopped = False

    def feed(self, token_ids: Iterable[int]) -> str:
        """Return what can be given out of the answer after these ids."""
        return "".join(self._one(token) for token in token_ids)

    def _one(self, token: int) -> str:
        if self.stopped:
            return ""
        self._held += self._decode(token) or ""
        found = min(((self._held.find(stop), stop) for stop in self._stops if stop in self._held), default=None)
        if found is not None:
            self.stopped = True
            at, stop = found
            ready, self._held = self._held[: at + (len(stop) if self._include else 0)], ""
            return ready
        keep = self._undecided()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def _undecided(self) -> int:
        """Return how many characters at the end may be the start of a stop string."""
        longest = max(map(len, self._stops), default=0)
        return next(
            (
                size
                for size in range(min(longest - 1, len(self._held)), 0, -1)
                if any(stop.startswith(self._held[-size:]) for stop in self._stops)
            ),
            0,
        )

    def end(self) -> str:
        """Return what was held back: the answer has ended without a stop string."""
        ready, self._held = self._held, ""
        return ready
