"""What the writer has said of items: enough to make a job of them without asking first. Used on the event loop.

It is a memory, no promise: what is remembered may have gone since. The writer looks when the job is posted, and takes it
only if everything is where it was. Plans are true for ever, because keys are made of contents.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from mmprep.items import ItemMeta
from mmprep.wire.messages import ItemAnswer, Need

#: Bytes of memory for each byte of packed metadata, which is kept unpacked too, and for an entry with its key.
_META, _ENTRY = 6, 1200


class KnownItem(NamedTuple):
    """An item as it was answered; ``epoch`` of the ring that its place lies in or beside."""

    answer: ItemAnswer
    meta: ItemMeta
    epoch: str


class KnownItems:
    """Items by key, least recently used out first.

    Parameters
    ----------
    max_bytes:
        Of memory, by :meth:`size`.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._items: OrderedDict[bytes, KnownItem] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    @staticmethod
    def size(item: KnownItem) -> int:
        """Return the bytes of memory that an entry takes, roughly."""
        return _ENTRY + _META * len(item.answer.meta)

    def note(self, key: bytes, answer: ItemAnswer, meta: ItemMeta, epoch: str) -> None:
        """Remember a good answer; one with a place is better than one with a plan alone."""
        former = self._items.get(key)
        if former is not None and not answer.length:
            self._items.move_to_end(key)
            return
        plain = ItemAnswer(
            "hit", answer.slot, answer.offset, answer.length, answer.generation, meta=answer.meta, spill=answer.spill
        )
        item = KnownItem(plain, meta, epoch)
        self.forget(key)
        if self.size(item) > self._max_bytes:
            return
        self._items[key] = item
        self._bytes += self.size(item)
        while self._bytes > self._max_bytes:
            _, dropped = self._items.popitem(last=False)
            self._bytes -= self.size(dropped)

    def get(self, key: bytes, need: Need, epoch: str) -> KnownItem | None:
        """Return what would be answered for an item if nothing has changed, ``None`` where that is not known."""
        item = self._items.get(key)
        if item is None:
            return None
        if need == "plan":
            item = KnownItem(ItemAnswer("hit", meta=item.answer.meta), item.meta, epoch)
        elif not item.answer.length or item.epoch != epoch:
            return None
        self._items.move_to_end(key)
        return item

    def forget(self, key: bytes) -> None:
        """Remember nothing of an item."""
        item = self._items.pop(key, None)
        if item is not None:
            self._bytes -= self.size(item)

    def validate(self) -> None:
        """Check the invariants; raises AssertionError."""
        assert self._bytes == sum(map(self.size, self._items.values())), "bytes are miscounted"
        assert self._bytes <= self._max_bytes, "above the limit"
