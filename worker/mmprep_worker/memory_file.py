"""Encoded bytes as a file for the decoding libraries, without a copy.

They read through callbacks in which nothing may be raised: what a broken medium makes them seek lies within the bytes.
"""

from __future__ import annotations

import os
from typing import Any


class MemoryFile:
    """A file to be read, over bytes that somebody else holds."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; a place before the beginning or behind the end becomes that."""
        start = {os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}.get(whence, 0)
        self._at = min(max(0, start + offset), len(self._data))
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes; where it is negative, all that are left."""
        end = len(self._data) if size < 0 else min(self._at + size, len(self._data))
        piece = bytes(self._data[self._at : end])
        self._at = end
        return piece

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as ``buffer`` has room for, and return how many there were."""
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)
