"""What an answer with tensors is made of, and how it is written: a piece at a time, so that no answer is in memory twice.

A tensor is copied, or turned into base64, when its piece is written. Until then it is where it was given, which may be the
ring: whoever writes keeps it there, or detaches the answer from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import pybase64

from mmprep_frontend.render.packing import Piece

#: Bytes of tensors that are copied or encoded at a time: base64 of them needs no padding, and stays in a core's cache.
AT_ONCE: Final = 768 * 1024


class Packed:
    """One medium's fields, packed.

    Parameters
    ----------
    pieces:
        One behind the other.
    borrowed:
        Whether they may refer to memory that is only kept for a while.
    """

    def __init__(self, pieces: Sequence[Piece], *, borrowed: bool = False) -> None:
        self._pieces = list(pieces)
        self._nbytes = sum(map(len, pieces))
        self._borrowed = borrowed

    def __len__(self) -> int:
        return self._nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes once it is detached; what is written of it takes little more."""
        return self._nbytes

    def detach(self) -> None:
        """Copy what is borrowed; other threads may write from this meanwhile."""
        if self._borrowed:
            for index, piece in enumerate(self._pieces):
                if isinstance(piece, memoryview):
                    # Not bytes(): this copy lets other threads run.
                    self._pieces[index] = np.frombuffer(piece, np.uint8).copy().data
            self._borrowed = False

    def written(self) -> Iterator[bytes]:
        """Yield copies of all, at most :data:`AT_ONCE` bytes each."""
        for index in range(len(self._pieces)):
            for start in range(0, len(self._pieces[index]), AT_ONCE):
                yield bytes(self._pieces[index][start : start + AT_ONCE])

    def slices(self) -> Iterator[Piece]:
        """Yield all, in pieces of a multiple of three bytes but for the last one; each is only good until the next."""
        rest = b""
        for index in range(len(self._pieces)):
            start, size = 0, len(self._pieces[index])
            if rest:
                start = min(-len(rest) % 3, size)
                rest += self._pieces[index][:start]
                if len(rest) % 3 == 0:
                    yield rest
                    rest = b""
            whole = start + (size - start) // 3 * 3
            for begin in range(start, whole, AT_ONCE):
                yield self._pieces[index][begin : min(begin + AT_ONCE, whole)]
            rest += self._pieces[index][whole:]
        if rest:
            yield rest


class Base64:
    """One medium's fields as a string of JSON.

    Parameters
    ----------
    packed:
        The fields.
    """

    def __init__(self, packed: Packed) -> None:
        self._packed = packed

    def __len__(self) -> int:
        return len('""') + (len(self._packed) + 2) // 3 * 4

    @property
    def nbytes(self) -> int:
        """As :attr:`Packed.nbytes`."""
        return self._packed.nbytes

    def detach(self) -> None:
        """As :meth:`Packed.detach`."""
        self._packed.detach()

    def written(self) -> Iterator[bytes]:
        """Yield all, encoded."""
        yield b'"'
        yield from map(pybase64.b64encode, self._packed.slices())
        yield b'"'


#: One answer, encoded: its parts one behind the other.
Encoded: TypeAlias = Sequence[bytes | Packed | Base64]


def written(encoded: Encoded) -> Iterator[bytes]:
    """Yield an answer's bytes as they are to be sent, about :data:`AT_ONCE` at a time; small ones are joined."""
    small: list[bytes] = []
    size = 0
    for part in encoded:
        for piece in (part,) if isinstance(part, bytes) else part.written():
            small.append(piece)
            size += len(piece)
            if size >= AT_ONCE:
                yield from _cut(small)
                small, size = [], 0
    if small:
        yield b"".join(small)


def _cut(pieces: list[bytes]) -> Iterator[bytes]:
    whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if len(whole) <= 2 * AT_ONCE:
        yield whole
        return
    for start in range(0, len(whole), AT_ONCE):
        yield whole[start : start + AT_ONCE]
