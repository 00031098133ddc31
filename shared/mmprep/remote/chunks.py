"""How an item's tensor region is cut into chunks."""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """One chunk: its number, and where in the region it starts and stops, in bytes."""

    number: int
    start: int
    stop: int


def count(length: int, chunk: int) -> int:
    """Return how many chunks of ``chunk`` bytes a region of ``length`` bytes has; the last may be shorter."""
    return -(-length // chunk)


def piece(number: int, length: int, chunk: int) -> Piece:
    """Return the chunk with this number."""
    start = number * chunk
    return Piece(number, start, min(start + chunk, length))
