"""A clock-hand allocator over a byte range: bookkeeping only, no memory is touched here.

The range ``[0, capacity)`` is tiled by *blocks*, each occupied (an extent) or free, linked in address order. Rules:

* Extents start at multiples of :data:`~mmprep.items.ALIGNMENT` and are whole multiples of it. None is ever moved.
* Neighbouring free blocks are one block.
* A *hand* sweeps the blocks in address order and jumps from the end to the start. For each extent it meets it asks
  the caller's verdict. The first run of free blocks and evictable extents that is long enough is evicted and granted,
  and the hand stops behind it. A run never wraps around the end.
* A failed sweep changes nothing here (the caller's use marks may have been cleared).

The sweep ends after one revolution if no extent was spared in it, because a second would see the same; else after two,
when every spared extent has been asked again. A run that is still open where the sweep began is followed to its end.
So ``None`` means that no run would have fitted, provided that an extent is spared at most once a sweep.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mmprep.items import ALIGNMENT, align


class Verdict(enum.Enum):
    """What may happen to an extent that the hand meets."""

    #: Somebody holds it: pass over.
    KEEP = enum.auto()
    #: Used since the last pass: pass over this once. Who answers this clears the mark.
    SPARE = enum.auto()
    #: Nobody holds it and nobody used it: may be evicted.
    EVICT = enum.auto()


class Allocation(NamedTuple):
    """A granted extent.

    Attributes
    ----------
    offset, length: bytes; both multiples of the alignment.
    evicted: offsets of the extents that had to go, in address order.
    steps: how many blocks the hand looked at.
    """

    offset: int
    length: int
    evicted: tuple[int, ...]
    steps: int


class _Block:
    """One tile of the range. ``prev`` and ``next`` close to a circle: behind the last block comes the first."""

    __slots__ = ("free", "length", "next", "offset", "prev")

    def __init__(self, offset: int, length: int, *, free: bool) -> None:
        self.offset = offset
        self.length = length
        self.free = free
        self.prev = self
        self.next = self


class Arena:
    """The allocator.

    Parameters
    ----------
    capacity:
        Bytes to hand out, a positive multiple of the alignment.

    Raises
    ------
    ValueError
        ``capacity`` is not such a multiple.
    """

    __slots__ = ("_blocks", "_first", "_hand", "_occupied", "capacity", "free_bytes")

    def __init__(self, capacity: int) -> None:
        if capacity <= 0 or capacity % ALIGNMENT:
            raise ValueError(f"an arena's capacity is a positive multiple of {ALIGNMENT} bytes, not {capacity}")
        self.capacity = capacity
        #: Bytes in no extent.
        self.free_bytes = capacity
        # The block at offset 0. It is split and merged but never replaced: merging keeps the left block.
        self._first = _Block(0, capacity, free=True)
        self._hand = self._first
        self._blocks = 1
        self._occupied: dict[int, _Block] = {}

    def allocate(self, nbytes: int, verdict: Callable[[int], Verdict]) -> Allocation | None:
        """Grant an extent, evicting what the hand meets and ``verdict`` allows.

        Parameters
        ----------
        nbytes:
            Bytes wanted; rounded up to the alignment.
        verdict:
            Asked with the offset of each extent that the hand meets. It must not call this arena.

        Returns
        -------
        Allocation or None
            ``None`` where no run fits; nothing has changed then.

        Raises
        ------
        ValueError
            ``nbytes`` is not positive or above the capacity.
        """
        need = align(nbytes)
        if nbytes <= 0 or need > self.capacity:
            raise ValueError(f"an extent has 1 to {self.capacity} bytes, not {nbytes}")
        found = self._sweep(need, verdict)
        if found is None:
            return None
        start, last, run, steps = found
        # The run's head goes too, even where its last block alone is long enough: a small entry before long ones would
        # else be passed over for ever.
        evicted = self._claim(start, last, run)
        if run > need:
            self._split(start, need)
        self._hand = start.next
        return Allocation(start.offset, need, evicted, steps)

    def free(self, offset: int) -> None:
        """Give the extent at ``offset`` back.

        Raises
        ------
        ValueError
            No extent starts there.
        """
        block = self._occupied.pop(offset, None)
        if block is None:
            raise ValueError(f"no extent starts at {offset}")
        block.free = True
        self.free_bytes += block.length
        self._join_next(block)
        if block.prev.free:
            self._join_next(block.prev)

    def insert(self, offset: int, length: int) -> None:
        """Occupy a given range, to rebuild a known state; ``length`` is rounded up to the alignment.

        The search starts at the hand and leaves it behind the new extent, so inserting in the order of addresses takes
        one step each.

        Raises
        ------
        ValueError
            The range is empty, misaligned, reaches out of the arena, or overlaps an extent.
        """
        need = align(length)
        if length <= 0 or offset < 0 or offset % ALIGNMENT or offset + need > self.capacity:
            raise ValueError(f"no extent of {length} bytes can be at {offset} in an arena of {self.capacity}")
        block = self._hand
        while block.offset > offset:
            block = block.prev
        while block.offset + block.length <= offset:
            block = block.next
        if not block.free or offset + need > block.offset + block.length:
            raise ValueError(f"an extent of {length} bytes at {offset} overlaps another")
        if offset > block.offset:
            self._split(block, offset - block.offset)
            block = block.next
        if need < block.length:
            self._split(block, need)
        self._claim(block, block, need)
        self._hand = block.next

    def point_behind(self, offset: int) -> None:
        """Put the hand behind the extent at ``offset``, where it was after that one was granted; raises ValueError."""
        block = self._occupied.get(offset)
        if block is None:
            raise ValueError(f"no extent starts at {offset}")
        self._hand = block.next

    def extents(self) -> Iterator[tuple[int, int]]:
        """Iterate over ``(offset, length)`` of the extents in address order."""
        block = self._first
        while True:
            if not block.free:
                yield block.offset, block.length
            block = block.next
            if block is self._first:
                return

    def validate(self) -> None:
        """Check every invariant; takes time in proportion to the number of blocks.

        Raises
        ------
        AssertionError
            One is broken; the message says which.
        """
        block, end, count, free_bytes, hand_seen = self._first, 0, 0, 0, False
        occupied = {}
        while True:
            assert block.offset == end, f"the block at {block.offset} does not start where the last one ends, {end}"
            assert block.length > 0, f"the block at {block.offset} is empty"
            assert block.length % ALIGNMENT == 0, f"the block at {block.offset} has a ragged length"
            assert block.next.prev is block, f"the links behind the block at {block.offset} disagree"
            if block.free:
                free_bytes += block.length
                merged = block.next is self._first or not block.next.free
                assert merged, f"the free blocks at {block.offset} and {block.next.offset} are not merged"
            else:
                occupied[block.offset] = block
            hand_seen |= block is self._hand
            end += block.length
            count += 1
            block = block.next
            if block is self._first:
                break
        assert end == self.capacity, f"the blocks add up to {end} bytes, not to the capacity {self.capacity}"
        assert free_bytes == self.free_bytes, f"{free_bytes} bytes are free, {self.free_bytes} were counted"
        assert count == self._blocks, f"there are {count} blocks, {self._blocks} were counted"
        assert occupied == self._occupied, "the index of extents differs from the blocks"
        assert hand_seen, "the hand points to a block that is no more"

    def _sweep(self, need: int, verdict: Callable[[int], Verdict]) -> tuple[_Block, _Block, int, int] | None:
        """Return the first and last block of the first run of ``need`` bytes, its bytes, and the steps taken."""
        block = start = self._hand
        first = self._first
        evict, spare = Verdict.EVICT, Verdict.SPARE
        limit = self._blocks
        run = steps = 0
        while True:
            if block is first:
                run = 0
            if steps >= limit and not run:
                return None
            steps += 1
            if block.free or (answer := verdict(block.offset)) is evict:
                if not run:
                    start = block
                run += block.length
                if run >= need:
                    return start, block, run, steps
            else:
                run = 0
                if answer is spare:
                    limit = 2 * self._blocks
            block = block.next

    def _claim(self, start: _Block, last: _Block, length: int) -> tuple[int, ...]:
        """Make one extent of the blocks from ``start`` to ``last``; return the offsets of those that were occupied."""
        evicted = []
        block = start
        while True:
            if block.free:
                self.free_bytes -= block.length
            else:
                evicted.append(block.offset)
                del self._occupied[block.offset]
            if block is last:
                break
            block = block.next
            self._blocks -= 1
        start.length = length
        start.next = last.next
        start.next.prev = start
        start.free = False
        self._occupied[start.offset] = start
        return tuple(evicted)

    def _split(self, block: _Block, length: int) -> None:
        """Cut ``block`` behind ``length`` bytes; the rest becomes a free block, joined with a free neighbour."""
        rest = _Block(block.offset + length, block.length - length, free=True)
        if not block.free:
            self.free_bytes += rest.length
        block.length = length
        rest.prev, rest.next = block, block.next
        block.next.prev = rest
        block.next = rest
        self._blocks += 1
        self._join_next(rest)

    def _join_next(self, block: _Block) -> None:
        """Join the free ``block`` with the next one where that is free too."""
        gone = block.next
        if not gone.free or gone is self._first:
            return
        block.length += gone.length
        block.next = gone.next
        block.next.prev = block
        self._blocks -= 1
        if self._hand is gone:
            self._hand = block
