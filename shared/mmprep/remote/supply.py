"""The door's side of sending tensors to one backend: what may be sent, and when. A pure core.

A backend asks for the chunks of an item in order, each once, and says how many it has received. Rules:

* of all items together at most ``credits`` chunks are asked for and not received;
* nothing beyond the item, nothing twice, no word that takes another back.

Whoever breaks one gets no more of that item; the other items go on. A transfer that stands still although more is wanted
or on its way is given up after a time, so that a backend that never reads holds nothing for ever.
"""

from __future__ import annotations

import msgspec

from mmprep.errors import ProtocolError
from mmprep.remote.chunks import Piece, count, piece


class Outgoing(msgspec.Struct):
    """One item on its way; chunks below ``asked`` were sent, those below ``received`` have arrived."""

    length: int
    chunks: int
    moved_at: float
    asked: int = 0
    received: int = 0
    refused: bool = False

    @property
    def complete(self) -> bool:
        """Every chunk has arrived."""
        return self.received == self.chunks

    @property
    def over(self) -> bool:
        """Nothing more is sent."""
        return self.refused or self.complete


class Supply:
    """What goes to one backend.

    Parameters
    ----------
    chunk:
        Bytes of a chunk.
    credits:
        Chunks that may be under way.
    """

    def __init__(self, *, chunk: int, credits: int) -> None:  # noqa: A002 -- the word for it
        self._chunk = chunk
        self._credits = credits
        self._items: dict[bytes, Outgoing] = {}

    @property
    def under_way(self) -> int:
        """Chunks that were sent and not received, as far as is known."""
        return sum(item.asked - item.received for item in self._items.values() if not item.refused)

    def asked(self, lease: bytes, length: int, *, upto: int, received: int, now: float) -> list[Piece]:
        """The backend asks for chunks; return those to be sent.

        Parameters
        ----------
        length:
            Of the item's tensor region, in bytes.
        upto, received:
            As in :class:`mmprep.wire.remote_messages.Ask`.

        Raises
        ------
        ProtocolError
            It may not ask for these. Nothing more is sent of this item.
        """
        item = self._items.get(lease)
        if item is None:
            item = self._items[lease] = Outgoing(length, count(length, self._chunk), now)
        wrong = self._wrong(item, upto, received)
        if wrong is not None:
            item.refused = True
            raise ProtocolError(wrong)
        first, item.asked, item.received, item.moved_at = item.asked, upto, received, now
        return [piece(number, item.length, self._chunk) for number in range(first, upto)]

    def _wrong(self, item: Outgoing, upto: int, received: int) -> str | None:
        if item.refused:
            return "nothing more is sent of this item; open it again"
        if upto > item.chunks:
            return f"the item has {item.chunks} chunks, and chunk {upto - 1} was asked for"
        if upto < item.asked or (upto == item.asked and received <= item.received):
            return "a chunk was asked for twice; each is sent once"
        if not item.received <= received <= item.asked:
            return "more, or fewer, chunks are said to be received than can be"
        if self.under_way + (upto - item.asked) - (received - item.received) > self._credits:
            return f"more than {self._credits} chunks were asked for at once"
        return None

    def complete(self, lease: bytes) -> bool:
        """Whether every chunk of an item has arrived."""
        item = self._items.get(lease)
        return item is not None and item.complete

    def unfinished(self, lease: bytes) -> bool:
        """Whether an item is on its way."""
        item = self._items.get(lease)
        return item is not None and not item.over

    def ended(self, lease: bytes) -> None:
        """The lease is over: forget the item."""
        self._items.pop(lease, None)

    def stalled(self, now: float, seconds: float) -> list[bytes]:
        """Return the items of which nothing has moved for ``seconds`` though they are not complete."""
        return [lease for lease, item in self._items.items() if not item.over and now - item.moved_at >= seconds]

    def validate(self) -> None:
        """Check the invariants.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        assert self.under_way <= self._credits, "more is under way than the credits allow"
        for item in self._items.values():
            assert 0 <= item.received <= item.asked <= item.chunks, (
                "more was received than asked, or asked than there is"
            )
