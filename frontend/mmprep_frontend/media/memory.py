"""The bytes of media that a frontend holds for requests: those on their way from hosts, and those read from disks.

One budget for all of them. What would be above it is refused, and does not wait: those who wait would keep what they have
read so far, so that nobody could go on. A share counts for as long as anything refers to it; several requests that wait
for one download refer to the same share, and the bytes count once.

Shares grow on any thread and may end anywhere, in the middle of another one's growth too: there they only leave a note.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Final, Self

from mmprep.errors import Busy

_RETRY_AFTER: Final = 1.0


class MediaMemory:
    """The budget.

    Parameters
    ----------
    max_bytes:
        Of all shares together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held = 0
        self._ended: deque[int] = deque()

    @property
    def nbytes(self) -> int:
        """The bytes of all shares."""
        with self._lock:
            self._settle()
            return self._held

    def share(self) -> Share:
        """Return an empty share."""
        return Share(self)

    def pieces(self) -> Pieces:
        """Return what takes one medium in, piece by piece."""
        return Pieces(self.share())

    def take(self, nbytes: int) -> None:
        """Count bytes of a share; see :meth:`Share.grow`."""
        with self._lock:
            self._settle()
            if self._held + nbytes > self._max_bytes:
                raise Busy(
                    "media that are being fetched fill this service's memory; send fewer or smaller ones at once, or try "
                    "again",
                    retry_after=_RETRY_AFTER,
                )
            self._held += nbytes

    def give_back(self, nbytes: int) -> None:
        """Note that a share has ended; takes no lock, since its end may come while this thread has it."""
        self._ended.append(nbytes)

    def _settle(self) -> None:
        while self._ended:
            self._held -= self._ended.popleft()


class Share:
    """What one medium takes of the budget, until nothing refers to this any more."""

    __slots__ = ("_memory", "_nbytes")

    def __init__(self, memory: MediaMemory) -> None:
        self._memory = memory
        self._nbytes = 0

    def grow(self, nbytes: int) -> None:
        """Count so many more bytes, before they are held; raises :class:`~mmprep.errors.Busy` where they do not fit."""
        self._memory.take(nbytes)
        self._nbytes += nbytes

    def end(self) -> None:
        """Count nothing any more: for one whose bytes are of no use, while an error may still refer to it."""
        self._memory.give_back(self._nbytes)
        self._nbytes = 0

    def __del__(self) -> None:
        self.end()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A medium's bytes, and what counts them."""

    data: bytes
    share: Share


class Pieces:
    """One medium on its way in; a context manager: at an error nothing stays, though the error may refer to this.

    Attributes
    ----------
    nbytes: of the pieces so far.
    """

    def __init__(self, share: Share) -> None:
        self.nbytes = 0
        self._share = share
        self._pieces: list[bytes] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._pieces.clear()
            self._share.end()

    def add(self, piece: bytes) -> None:
        """Take one more piece; raises :class:`~mmprep.errors.Busy` where there is no memory for it."""
        self._share.grow(len(piece))
        self._pieces.append(piece)
        self.nbytes += len(piece)

    def joined(self) -> Loaded:
        """Return the medium; there are no more pieces."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        return Loaded(data, self._share)
