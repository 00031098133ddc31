"""What the writer has said of items: enough to make a job of them without asking first. Used on the event loop.

It is a memory, no promise: what is remembered may have gone since, and an alias may stand for other content, of which another
frontend has heard. The writer looks when the job is posted, and takes it only if everything is where it was, and aliases
lead where they led. Plans are true for ever, because keys are made of contents. What was injected is not remembered: its key
is made of its name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from mmprep.items import ItemMeta
from mmprep.wire.messages import ItemAnswer, Need, Offered, Recalled, Remembered
from mmprep_frontend.offered import OfferItem

#: Bytes of memory for each byte of packed metadata, which is kept unpacked too, and for an entry with its key.
_META, _ENTRY = 6, 1200
#: Aliases that are remembered; 5 MB of memory.
_MOST_ALIASES = 16_384


class KnownItem(NamedTuple):
    """An item as it was answered; ``epoch`` of the ring that its place lies in or beside."""

    answer: ItemAnswer
    meta: ItemMeta
    epoch: str


class Recollection(NamedTuple):
    """What an item of a request would be found as, and how the writer is told of it with a job."""

    item: KnownItem
    told: Offered | Remembered


class KnownItems:
    """Items by key, and keys by alias and variant; both least recently used out first.

    Parameters
    ----------
    max_bytes:
        Of memory of the items, by :meth:`size`.
    max_aliases:
        That are remembered.
    """

    def __init__(self, max_bytes: int, max_aliases: int = _MOST_ALIASES) -> None:
        self._max_bytes = max_bytes
        self._max_aliases = max_aliases
        self._items: OrderedDict[bytes, KnownItem] = OrderedDict()
        self._keys: OrderedDict[bytes, bytes] = OrderedDict()
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

    def note_alias(self, alias: bytes, variant: bytes, key: bytes) -> None:
        """Remember which item an alias stands for in a variant; both have 32 bytes."""
        name = alias + variant
        self._keys[name] = key
        self._keys.move_to_end(name)
        if len(self._keys) > self._max_aliases:
            self._keys.popitem(last=False)

    def recollect(self, asked: Sequence[OfferItem | Recalled], need: Need, epoch: str) -> list[Recollection] | None:
        """Return what would be answered for all items of a request if nothing has changed, ``None`` where that is not known.

        It is not known either where a part names an alias that a later part sends with a medium: the writer would have to look
        what it stands for in between.
        """
        sent = {item.alias.id for item in asked if isinstance(item, OfferItem) and item.alias is not None}
        found = []
        for item in asked:
            if isinstance(item, OfferItem):
                told: Offered | Remembered | None = item.offered()
            else:
                told = None if item.alias in sent else self._remembered(item)
            known = None if told is None else self.get(told.key, need, epoch)
            if told is None or known is None:
                return None
            found.append(Recollection(known, told))
        return found

    def _remembered(self, item: Recalled) -> Remembered | None:
        name = item.alias + item.variant
        key = self._keys.get(name)
        if key is None:
            return None
        self._keys.move_to_end(name)
        return Remembered(item.alias, item.variant, item.modality, key)

    def forget(self, key: bytes) -> None:
        """Remember nothing of an item."""
        item = self._items.pop(key, None)
        if item is not None:
            self._bytes -= self.size(item)

    def validate(self) -> None:
        """Check the invariants; raises AssertionError."""
        assert self._bytes == sum(map(self.size, self._items.values())), "bytes are miscounted"
        assert self._bytes <= self._max_bytes, "above the limit"
        assert len(self._keys) <= self._max_aliases, "there are more aliases than the limit"
