"""Undoing a content coding that was not asked for, in bounded steps.

The caller counts what comes out, and stops where it is too much: a decompression bomb never exists in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from mmprep.errors import FetchError

#: Largest step, bytes; between two steps the event loop should move on.
_PIECE: Final = 2**18


class Inflater:
    """What undoes gzip or deflate. Whatever is wrong with the data is a :class:`~mmprep.errors.FetchError`."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32)

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """Yield what ``chunk`` decompresses to, in bounded pieces."""
        try:
            while True:
                if self._zlib.eof and chunk:
                    raise FetchError("the medium's host sent something behind its compressed data")
                piece = self._zlib.decompress(chunk, _PIECE)
                yield piece
                chunk = self._zlib.unconsumed_tail or self._zlib.unused_data
                # A full piece may have left something behind even where all of the input is consumed.
                if not chunk and (self._zlib.eof or len(piece) < _PIECE):
                    return
        except zlib.error:
            raise FetchError("the medium's host sent broken compressed data") from None

    def end(self) -> None:
        """Check that nothing is missing."""
        if not self._zlib.eof:
            raise FetchError("the compressed data that the medium's host sent are cut off")


def inflater(encoding: str) -> Inflater | None:
    """Return what undoes the coding of a ``Content-Encoding`` header, ``None`` where there is none.

    Raises
    ------
    mmprep.errors.FetchError
        It is none that every client knows.
    """
    match encoding.strip().lower():
        case "identity" | "":
            return None
        case "gzip" | "x-gzip" | "deflate":
            return Inflater()
        case _:
            raise FetchError("the medium's host sent a content coding that was not asked for")
