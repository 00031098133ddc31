"""What a reader holds, as far as it knows: a pure core of :mod:`mmprep.registration`.

A *life* is one writer's time with one segment: an epoch and an incarnation. A lease is good in the life that granted it.
When the next writer takes the segment over, it has to be told of every lease, and a lease of an earlier life that it was not
told of is worth nothing: the content may be there, but nobody keeps it. In another epoch nothing needs to be held: the
former segment is never written again.

An address that comes from outside is believed about its lease without a word with the writer. That is right because

* the tag of the lease's id says that it was granted to this very process, on this content, as this kind
  (:mod:`mmprep.lease_id`), by the writer of this life or a later one; and
* such a lease is over for the writer only where it is over here too: this process has released it or been told that it is
  lost, or, of a copy, whose content is checked after reading, its time has passed.

A lease that was taken up is its taker's to end. Who has only the address may end it as well (:meth:`Holdings.give_up`), but
not while it is a view: the same address may have been handed to this process twice, and the other taker reads.

So a lease that is over must never be taken up again. Those are remembered up to a bound; beyond it a new *turn* begins,
whose mark no lease granted before has, so that there is nothing to remember of it.

Deadlines count from the moment a request was *sent*, never from when its answer came.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar, NamedTuple

import msgspec

from mmprep.lease_id import lease_incarnation, mark_of, was_granted_to
from mmprep.wire.messages import Held, LeaseKind


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
    """

    slot: int
    generation: int
    kind: LeaseKind
    deadline: float
    sure: bool


class Holdings:
    """The leases of one reader; ``now`` and ``sent_at`` are monotonic seconds.

    Parameters
    ----------
    instance:
        Of its hold of the process lock, as in its hello.

    Attributes
    ----------
    life: the present one, ``None`` before the first welcome.
    seconds: how long a lease holds without renewal.
    turn: the writer is to be told of a new one.
    """

    #: Leases that are remembered as over.
    most_over: ClassVar = 65_536

    def __init__(self, instance: bytes) -> None:
        self.life: Life | None = None
        self.seconds = 0.0
        self.turn = 0
        self._instance = instance
        self._mark = mark_of(instance, self.turn)
        self._held: dict[bytes, Holding] = {}
        self._dropped: deque[bytes] = deque()
        self._given_up: deque[bytes] = deque()
        #: The writer was told that these are released, and has not said that it heard.
        self._releasing: dict[bytes, None] = {}
        self._over: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._held)

    def welcomed(self, life: Life, seconds: float) -> tuple[Held, ...]:
        """A writer has welcomed this reader; return what it has to be told of."""
        former, self.life, self.seconds = self.life, life, seconds
        if former is None or former.epoch != life.epoch:
            self._held.clear()
            self._dropped.clear()
            self._given_up.clear()
            self._releasing.clear()
            self._over.clear()
            return ()
        self._dropped.extendleft(self._releasing)
        self._releasing.clear()
        dropped = set(self._dropped)
        return tuple(
            Held(lease, holding.slot, holding.generation, holding.kind)
            for lease, holding in self._held.items()
            if lease not in dropped
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
        """Keep the lease of an address; return whether it is good. Where it is not, acquire the content anew.

        Parameters
        ----------
        sent_at:
            When the request was sent that led to it; where that is not known, a guess, and ``sure`` false: the lease is
            renewed at once.

        Good is what was granted to this process, on this content, as this kind, is not over, and is nobody else's here: an
        address that is opened twice takes two leases, each with an end of its own. One of a later life than the present is
        good: its writer knows it, and will be told again. One of an earlier life that comes only now is not.
        """
        granted = was_granted_to(self._mark, lease, slot=slot, generation=generation, kind=kind)
        return granted and self.acquired(lease, slot, generation, kind, epoch=epoch, sent_at=sent_at, sure=sure)

    def acquired(
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
        """Keep a lease of which the writer itself has told this process; return whether it is good, as :meth:`adopt`."""
        if self.life is None or self.life.epoch != epoch or lease_incarnation(lease) < self.life.incarnation:
            return False
        if lease in self._held or lease in self._over or lease in self._dropped or lease in self._given_up:
            return False
        self._held[lease] = Holding(slot, generation, kind, sent_at + self.seconds, sure)
        return True

    def drop(self, lease: bytes) -> None:
        """End a lease that the caller has taken up; :meth:`take_dropped` hands it out. May be called from any thread."""
        self._dropped.append(lease)

    def give_up(self, lease: bytes) -> None:
        """End a lease of which the caller has the address, unless it is a view that was taken up; else as :meth:`drop`."""
        self._given_up.append(lease)

    def drop_all(self) -> None:
        """Release every lease."""
        self._dropped.extend(self._held)

    def take_dropped(self, most: int) -> tuple[bytes, ...]:
        """Return up to ``most`` leases that the writer is to be told of as released; :meth:`released` ends it.

        Where the connection is lost before that, they are handed out again.
        """
        while self._given_up:
            lease = self._given_up.popleft()
            holding = self._held.get(lease)
            if holding is None or holding.kind == "copy":
                self._dropped.append(lease)
        taken: list[bytes] = []
        while self._dropped and len(taken) < most:
            lease = self._dropped.popleft()
            self._end(lease)
            self._releasing[lease] = None
            taken.append(lease)
        return tuple(taken)

    def released(self, leases: tuple[bytes, ...]) -> None:
        """The writer has heard that these are released."""
        for lease in leases:
            self._releasing.pop(lease, None)

    def asked(self, leases: tuple[bytes, ...]) -> None:
        """The writer asks about leases that may be nobody's: what is not held is released, and never taken up."""
        for lease in leases:
            if lease not in self._held:
                self._end(lease)
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
                self._end(lease)
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

    def _end(self, lease: bytes) -> None:
        self._held.pop(lease, None)
        if len(self._over) >= self.most_over:
            self._over.clear()
            self.turn += 1
            self._mark = mark_of(self._instance, self.turn)
        self._over.add(lease)

    def validate(self) -> None:
        """Check the invariants.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        assert not self._held.keys() & self._over, "a lease is held that is over"
        assert len(self._over) <= self.most_over, "too many leases are remembered"
        assert self.life is not None or not self._held, "something is held before the first welcome"
