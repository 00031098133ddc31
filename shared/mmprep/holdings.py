"""What a reader holds, as far as it knows: a pure core of :mod:`mmprep.registration`.

A *life* is one writer's time with one segment: an epoch and an incarnation. A lease is good in the life that granted it.
When the next writer takes the segment over, it has to be told of every lease, and a lease of an earlier life that it was not
told of is worth nothing: the content may be there, but nobody keeps it. In another epoch nothing needs to be held: the
former segment is never written again.

Deadlines count from the moment a request was *sent*, never from when its answer came.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from typing import NamedTuple

import msgspec

from mmprep.address import lease_incarnation
from mmprep.wire.messages import Held, LeaseKind

#: Leases that are remembered as never to be taken up again; the oldest are forgotten first.
_MOST_DISOWNED = 65_536


class Life(NamedTuple):
    """One writer's time with one segment."""

    epoch: str
    incarnation: int


class Holding(msgspec.Struct):
    """One lease.

    Attributes
    ----------
    deadline: in the caller's monotonic seconds.
    sure: the deadline counts from a moment that is known.
    uses: how often it was adopted and not dropped yet: one address may be opened several times.
    """

    slot: int
    generation: int
    kind: LeaseKind
    deadline: float
    sure: bool
    uses: int = 1


class Holdings:
    """The leases of one reader; ``now`` and ``sent_at`` are monotonic seconds.

    Attributes
    ----------
    life: the present one, ``None`` before the first welcome.
    seconds: how long a lease holds without renewal.
    """

    def __init__(self) -> None:
        self.life: Life | None = None
        self.seconds = 0.0
        self._held: dict[bytes, Holding] = {}
        self._dropped: deque[bytes] = deque()
        #: The writer was told that these are released, and has not said that it heard.
        self._releasing: dict[bytes, None] = {}
        self._disowned: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def welcomed(self, life: Life, seconds: float) -> tuple[Held, ...]:
        """A writer has welcomed this reader; return what it has to be told of."""
        former, self.life, self.seconds = self.life, life, seconds
        if former is None or former.epoch != life.epoch:
            self._held.clear()
            self._dropped.clear()
            self._releasing.clear()
            self._disowned.clear()
            return ()
        self._dropped.extendleft(self._releasing)
        self._releasing.clear()
        dropped = Counter(self._dropped)
        return tuple(
            Held(lease, holding.slot, holding.generation, holding.kind)
            for lease, holding in self._held.items()
            if dropped[lease] < holding.uses
        )

    def adopt(
        self,
        lease: bytes,
        slot: int,
        generation: int,
        kind: LeaseKind,
        *,
        epoch: str,
        sent_at: float,
        sure: bool = True,
    ) -> bool:
        """Keep a lease that an answer granted; return whether it is good.

        Parameters
        ----------
        sent_at:
            When the request was sent that led to it; where that is not known, a guess, and ``sure`` false: the lease is
            renewed at once.

        One of a later life than the present is: its writer knows it, and will be told again. One of an earlier life that
        comes only now is not, nor is one that was released before, or that the writer has asked about in vain: acquire the
        content anew.
        """
        if self.life is None or self.life.epoch != epoch or lease_incarnation(lease) < self.life.incarnation:
            return False
        if lease in self._disowned:
            return False
        known = self._held.get(lease)
        if known is not None:
            known.uses += 1
        else:
            self._held[lease] = Holding(slot, generation, kind, sent_at + self.seconds, sure)
        return True

    def drop(self, lease: bytes) -> None:
        """End one use of a lease; after the last, :meth:`take_dropped` hands it out. May be called from any thread."""
        self._dropped.append(lease)

    def drop_all(self) -> None:
        """Release every lease."""
        for lease, holding in self._held.items():
            self._dropped.extend([lease] * holding.uses)

    def take_dropped(self, most: int) -> tuple[bytes, ...]:
        """Return up to ``most`` leases that the writer is to be told of as released; :meth:`released` ends it.

        Where the connection is lost before that, they are handed out again.
        """
        taken: list[bytes] = []
        while self._dropped and len(taken) < most:
            lease = self._dropped.popleft()
            holding = self._held.get(lease)
            if holding is not None and holding.uses > 1:
                holding.uses -= 1
                continue
            self._held.pop(lease, None)
            self._disown(lease)
            self._releasing[lease] = None
            taken.append(lease)
        return tuple(taken)

    def released(self, leases: tuple[bytes, ...]) -> None:
        """The writer has heard that these are released."""
        for lease in leases:
            self._releasing.pop(lease, None)

    def asked(self, leases: tuple[bytes, ...]) -> None:
        """The writer asks about views beyond their time: what is not held is released, and never taken up.

        An answer that granted it was lost, or comes too late.
        """
        for lease in leases:
            if lease not in self._held:
                self._disown(lease)
                self._dropped.append(lease)

    def due(self, now: float, most: int) -> tuple[bytes, ...]:
        """Return up to ``most`` leases of which a third of the time has gone."""
        soon = now + self.seconds * 2 / 3
        due = []
        for lease, holding in self._held.items():
            if holding.deadline < soon or not holding.sure:
                due.append(lease)
                if len(due) == most:
                    break
        return tuple(due)

    def renewed(self, asked: tuple[bytes, ...], lost: frozenset[bytes], sent_at: float) -> None:
        """The writer has answered about these leases."""
        for lease in asked:
            holding = self._held.get(lease)
            if lease in lost:
                self._held.pop(lease, None)
                self._disown(lease)
            elif holding is not None:
                holding.deadline = max(holding.deadline, sent_at + self.seconds)
                holding.sure = True

    def changed(self, lease: bytes, kind: LeaseKind) -> None:
        """The writer has changed a lease's kind."""
        holding = self._held.get(lease)
        if holding is not None:
            holding.kind = kind

    def lost(self, lease: bytes, now: float) -> bool:
        """Whether a lease that was adopted is over: it was released, the writer says so, or a copy's time has passed."""
        holding = self._held.get(lease)
        return holding is None or (holding.kind == "copy" and holding.deadline < now)

    def _disown(self, lease: bytes) -> None:
        self._disowned[lease] = None
        self._disowned.move_to_end(lease)
        if len(self._disowned) > _MOST_DISOWNED:
            self._disowned.popitem(last=False)

    def validate(self) -> None:
        """Check the invariants.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        assert all(holding.uses > 0 for holding in self._held.values()), "a lease is held for nobody"
        assert not self._held.keys() & self._disowned.keys(), "a lease is held that must never be taken up"
        assert len(self._disowned) <= _MOST_DISOWNED, "too many leases are remembered"
        assert self.life is not None or not self._held, "something is held before the first welcome"
