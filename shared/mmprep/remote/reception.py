"""A backend's side of receiving tensors: what to ask for next, and where what comes belongs. A pure core.

Items are received one behind the other, in the order in which they were begun, with so many chunks under way as the door
allows; the next item begins while the last chunks of the one before are on their way. Chunks of one item come in order,
each once: anything else breaks the protocol. More is asked for when half of the credits are free, so that a word goes for
some chunks together.

An item that nobody wants any more is *abandoned*: what was asked for it still comes, and counts as under way until then.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from mmprep.errors import ProtocolError
from mmprep.remote.chunks import count, piece


class Asking(NamedTuple):
    """What the door is to be asked: the fields of :class:`mmprep.wire.remote_messages.Ask`."""

    lease: bytes
    upto: int
    received: int


class Arrival(NamedTuple):
    """Where a chunk belongs: ``offset`` bytes into the item's region, ``None``: nobody wants it. ``complete``: it was the last."""

    offset: int | None
    complete: bool
    asks: list[Asking]


class Incoming(msgspec.Struct):
    """One item; chunks below ``received`` are here, those below ``asked`` are to come. ``told``: how many the door knows of."""

    length: int
    chunks: int
    moved_at: float
    asked: int = 0
    received: int = 0
    told: int = 0
    abandoned: bool = False


class Reception:
    """What comes from one door in one session.

    Parameters
    ----------
    chunk, credits:
        As the door's welcome names them.
    """

    def __init__(self, *, chunk: int, credits: int) -> None:  # noqa: A002 -- the word for it
        self._chunk = chunk
        self._credits = credits
        self._items: dict[bytes, Incoming] = {}

    def __contains__(self, lease: bytes) -> bool:
        return lease in self._items

    @property
    def under_way(self) -> int:
        """Chunks that were asked for and have not come."""
        return sum(item.asked - item.received for item in self._items.values())

    def begin(self, lease: bytes, length: int, now: float) -> list[Asking]:
        """Receive an item of ``length`` bytes, more than 0; return what to ask for.

        Raises
        ------
        ProtocolError
            It is being received already.
        """
        if lease in self._items:
            raise ProtocolError("the item is being received already")
        self._items[lease] = Incoming(length, count(length, self._chunk), now)
        return self._spend(now)

    def arrived(self, lease: bytes, number: int, nbytes: int, now: float) -> Arrival:
        """A chunk has come.

        Raises
        ------
        ProtocolError
            It is none that was asked for, not the next one, or of another size. Nothing of it may be kept.
        """
        item = self._items.get(lease)
        if item is None or number != item.received or number >= item.asked:
            raise ProtocolError("a chunk came that was not asked for, or out of order")
        place = piece(number, item.length, self._chunk)
        if nbytes != place.stop - place.start:
            raise ProtocolError(f"a chunk has {nbytes} bytes in place of {place.stop - place.start}")
        item.received, item.moved_at = number + 1, now
        if item.abandoned:
            if item.received == item.asked:
                del self._items[lease]
            return Arrival(None, False, self._spend(now))
        complete = item.received == item.chunks
        asks = []
        if complete:
            del self._items[lease]
            asks.append(Asking(lease, item.chunks, item.chunks))
        return Arrival(place.start, complete, [*asks, *self._spend(now)])

    def ended(self, lease: bytes, now: float) -> list[Asking]:
        """The door sends no more of an item; return what to ask for in its place."""
        self._items.pop(lease, None)
        return self._spend(now)

    def abandon(self, lease: bytes, now: float) -> list[Asking]:
        """Nobody wants an item any more; the door is told that its lease is over. Return what to ask for in its place."""
        item = self._items.get(lease)
        if item is not None:
            item.abandoned = True
            if item.received == item.asked:
                del self._items[lease]
        return self._spend(now)

    def stalled(self, now: float, seconds: float) -> list[bytes]:
        """Return the items that wait for chunks of which none has come for ``seconds``."""
        return [
            lease
            for lease, item in self._items.items()
            if item.asked > item.received and not item.abandoned and now - item.moved_at >= seconds
        ]

    def _spend(self, now: float) -> list[Asking]:
        """Ask for as much as the credits allow, where half of them are free."""
        left = self._credits - self.under_way
        wanting = self._wanting()
        if not wanting or 2 * left < self._credits:
            return []
        # What has come is told first: to the door it is what makes room for all that is asked then.
        first = wanting[0][0]
        asks = [ask for ask in self.tell() if ask.lease != first]
        for lease, item in wanting:
            more = min(left, item.chunks - item.asked)
            if more <= 0:
                break
            if item.asked == item.received:  # nothing of it was under way: its time begins now
                item.moved_at = now
            item.asked += more
            left -= more
            asks.append(Asking(lease, item.asked, item.received))
        return asks

    def tell(self) -> list[Asking]:
        """Return what tells the door how far every item has come, where it does not know."""
        asks = []
        for lease, item in self._items.items():
            if item.told < item.received and not item.abandoned:
                item.told = item.received
                asks.append(Asking(lease, item.asked, item.received))
        return asks

    def _wanting(self) -> list[tuple[bytes, Incoming]]:
        return [(lease, item) for lease, item in self._items.items() if not item.abandoned and item.asked < item.chunks]

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
                "more came than was asked for, or is asked than there is"
            )
            assert not item.abandoned or item.received < item.asked, "an item is kept of which nothing comes any more"
            assert item.abandoned or item.received < item.chunks, "a complete item is kept"
            assert item.told <= item.received, "the door was told of more than came"
        free = self._credits - self.under_way
        assert 2 * free < self._credits or not self._wanting(), "half of the credits are left, and chunks are wanted"
