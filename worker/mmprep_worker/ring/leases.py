"""Leases: what backends hold, for how long, and what happens when they are late or gone.

A lease has a random id of 16 bytes, an owner, a slot, a kind and a deadline. It lives until it is released, its owner
is gone, or :meth:`Leases.tick` revokes it. Rules:

* An operation on an id that is unknown, or another owner's, is reported and changes nothing. Repeating an operation
  does no harm.
* A *copy* lease ends when it is overdue: its reader validates after copying, and finds out.
* A *view* lease never ends by time: somebody may be reading through it. When overdue it is counted against its
  owner; an owner above the quota is quarantined. It ends when the owner's process is proven gone.
* A deadline is never brought forward: a promise once given stands.

Deadlines wait in a heap, one live element a lease: renewing only changes the lease, and the element moves when it comes
up. Elements of ended leases are swept out when they outnumber the others.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

Kind = Literal["copy", "view"]

#: Bytes of a lease's id.
ID_SIZE = 16
# Below this many elements the heap is never rebuilt.
_SMALL_HEAP = 64


class Lease:
    """One hold of a backend. Callers read it; only :class:`Leases` changes it.

    Attributes
    ----------
    lease_id: 16 random bytes.
    owner: the backend's registered id.
    slot, nbytes: the entry's slot and its extent's bytes.
    kind: ``"copy"`` or ``"view"``.
    deadline: monotonic seconds.
    overdue: a view lease that the clock has passed.
    live: not ended.
    """

    __slots__ = ("deadline", "kind", "lease_id", "live", "nbytes", "overdue", "owner", "slot")

    def __init__(self, lease_id: bytes, owner: str, slot: int, nbytes: int, *, kind: Kind, deadline: float) -> None:
        self.lease_id = lease_id
        self.owner = owner
        self.slot = slot
        self.nbytes = nbytes
        self.kind = kind
        self.deadline = deadline
        self.overdue = False
        self.live = True


class Overdue(NamedTuple):
    """View leases past their deadline: how many, and the bytes of their extents (a shared extent counts each time)."""

    views: int
    nbytes: int


class _Owner:
    __slots__ = ("leases", "overdue_bytes", "overdue_count")

    def __init__(self) -> None:
        self.leases: dict[bytes, Lease] = {}
        self.overdue_bytes = 0
        self.overdue_count = 0


class Leases:
    """The table of leases."""

    __slots__ = ("_by_id", "_heap", "_owners", "_serial", "overdue_count", "revoked_count")

    def __init__(self) -> None:
        self._by_id: dict[bytes, Lease] = {}
        self._owners: dict[str, _Owner] = {}
        # (deadline when queued, tie-breaker, lease)
        self._heap: list[tuple[float, int, Lease]] = []
        self._serial = 0
        #: View leases past their deadline, of all owners.
        self.overdue_count = 0
        #: Copy leases that :meth:`tick` has ended since the start.
        self.revoked_count = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._by_id.values())

    def get(self, lease_id: bytes) -> Lease | None:
        """Return the live lease of that id."""
        return self._by_id.get(lease_id)

    def deliver(
        self, lease_id: bytes, owner: str, slot: int, nbytes: int, kind: Kind, *, now: float, seconds: float
    ) -> bool:
        """Start a lease.

        Parameters
        ----------
        lease_id:
            16 random bytes.
        slot, nbytes:
            What is leased; ``nbytes`` counts against the owner when a view is overdue.
        now, seconds:
            The lease is due ``seconds`` after ``now``.

        Returns
        -------
        bool
            False where the same lease was delivered before; then this renews it.

        Raises
        ------
        ValueError
            The id is not 16 bytes, it is taken by another owner, slot or kind, or the time is not positive and finite.
        """
        deadline = _deadline(now, seconds)
        lease = self._by_id.get(lease_id)
        if lease is not None:
            if (lease.owner, lease.slot, lease.kind) != (owner, slot, kind):
                raise ValueError("the id of this lease is taken by another one")
            self._extend(lease, deadline)
            return False
        if len(lease_id) != ID_SIZE:
            raise ValueError(f"a lease's id has {ID_SIZE} bytes, not {len(lease_id)}")
        if kind not in {"copy", "view"}:
            raise ValueError(f"a lease is a copy or a view, not {kind!r}")
        lease = Lease(lease_id, owner, slot, nbytes, kind=kind, deadline=deadline)
        self._by_id[lease_id] = lease
        holder = self._owners.get(owner)
        if holder is None:
            holder = self._owners[owner] = _Owner()
        holder.leases[lease_id] = lease
        self._queue(lease)
        return True

    def renew(self, owner: str, ids: Iterable[bytes], now: float, seconds: float) -> dict[bytes, bool]:
        """Set the deadlines of ``owner``'s leases to ``seconds`` after ``now``; return for each id whether it lives.

        An overdue lease that has not been revoked is good again.

        Raises
        ------
        ValueError
            The time is not positive and finite.
        """
        deadline = _deadline(now, seconds)
        renewed = {}
        for lease_id in ids:
            lease = self._owned(owner, lease_id)
            if lease is not None:
                self._extend(lease, deadline)
            renewed[lease_id] = lease is not None
        return renewed

    def release(self, owner: str, ids: Iterable[bytes]) -> tuple[list[int], list[bytes]]:
        """End ``owner``'s leases; return the slots of those that ended, and the ids that are not live leases of its."""
        slots = []
        unknown = []
        for lease_id in ids:
            lease = self._owned(owner, lease_id)
            if lease is None:
                unknown.append(lease_id)
            else:
                self._end(lease)
                slots.append(lease.slot)
        return slots, unknown

    def upgrade(self, owner: str, lease_id: bytes, kind: Kind) -> bool:
        """Change the kind of ``owner``'s lease, either way; return whether it is a live lease of that owner.

        Raises
        ------
        ValueError
            There is no such kind.
        """
        if kind not in {"copy", "view"}:
            raise ValueError(f"a lease is a copy or a view, not {kind!r}")
        lease = self._owned(owner, lease_id)
        if lease is None:
            return False
        if lease.overdue and kind == "copy":
            # It has left the heap; back there, the next tick ends it.
            self._forgive(lease)
            self._queue(lease)
        lease.kind = kind
        return True

    def owner_gone(self, owner: str) -> list[int]:
        """End everything that ``owner`` holds, because its process lock has fallen; return the slots, one a lease."""
        holder = self._owners.get(owner)
        if holder is None:
            return []
        slots = []
        for lease in list(holder.leases.values()):
            self._end(lease)
            slots.append(lease.slot)
        return slots

    def tick(self, now: float) -> list[Lease]:
        """End the copy leases whose deadline is not after ``now`` and return them; count the views."""
        revoked = []
        heap = self._heap
        while heap and heap[0][0] <= now:
            lease = heapq.heappop(heap)[2]
            if not lease.live:
                continue
            if lease.deadline > now:
                self._queue(lease)
            elif lease.kind == "copy":
                self._end(lease)
                revoked.append(lease)
            else:
                self._blame(lease)
        self.revoked_count += len(revoked)
        return revoked

    def next_deadline(self) -> float | None:
        """Return when :meth:`tick` next has something to do, in monotonic seconds; ``None``: nothing is due ever."""
        heap = self._heap
        while heap:
            queued, _, lease = heap[0]
            if lease.live and lease.deadline <= queued:
                return queued
            heapq.heappop(heap)
            if lease.live:
                self._queue(lease)
        return None

    def count(self, owner: str) -> int:
        """Return how many leases ``owner`` has."""
        holder = self._owners.get(owner)
        return 0 if holder is None else len(holder.leases)

    def overdue(self, owner: str) -> Overdue:
        """Return what ``owner`` holds as views past their deadline, as of the last :meth:`tick`."""
        holder = self._owners.get(owner)
        return Overdue(0, 0) if holder is None else Overdue(holder.overdue_count, holder.overdue_bytes)

    def overdue_ids(self, owner: str) -> list[bytes]:
        """Return the ids of ``owner``'s views past their deadline, as of the last :meth:`tick`."""
        holder = self._owners.get(owner)
        return [] if holder is None else [lease.lease_id for lease in holder.leases.values() if lease.overdue]

    def quarantined(self, owner: str, quota: int) -> bool:
        """Return whether ``owner``'s overdue views are above ``quota`` bytes: it must not get new leases."""
        holder = self._owners.get(owner)
        return holder is not None and holder.overdue_bytes > quota

    def validate(self) -> None:
        """Check every invariant.

        Raises
        ------
        AssertionError
            One is broken; the message says which.
        """
        queued = Counter(id(lease) for _, _, lease in self._heap if lease.live)
        for due, _, lease in self._heap:
            assert not lease.live or due <= lease.deadline, "a lease would be seen after its deadline"
        seen = 0
        for name, holder in self._owners.items():
            assert holder.leases, f"owner {name!r} has no lease and is remembered"
            late = [lease for lease in holder.leases.values() if lease.overdue]
            assert len(late) == holder.overdue_count, f"the overdue views of {name!r} are miscounted"
            assert sum(lease.nbytes for lease in late) == holder.overdue_bytes, f"the overdue bytes of {name!r} are off"
            for lease_id, lease in holder.leases.items():
                assert self._by_id.get(lease_id) is lease, "an owner has a lease that its id does not find"
                assert lease.owner == name, "a lease is in another owner's table"
                assert lease.live, "an ended lease is still listed"
                assert lease.kind == "view" or not lease.overdue, "a copy lease is overdue and not ended"
                assert queued[id(lease)] == (not lease.overdue), "a lease is not exactly once in the heap"
            seen += len(holder.leases)
        assert seen == len(self._by_id), "a lease has no owner"
        assert sum(holder.overdue_count for holder in self._owners.values()) == self.overdue_count, "overdue is off"
        assert len(self._heap) <= 2 * len(self._by_id) + _SMALL_HEAP, "the heap is full of ended leases"

    def _owned(self, owner: str, lease_id: bytes) -> Lease | None:
        lease = self._by_id.get(lease_id)
        return lease if lease is not None and lease.owner == owner else None

    def _queue(self, lease: Lease) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (lease.deadline, self._serial, lease))

    def _extend(self, lease: Lease, deadline: float) -> None:
        lease.deadline = max(lease.deadline, deadline)
        if lease.overdue:
            self._forgive(lease)
            self._queue(lease)

    def _blame(self, lease: Lease) -> None:
        lease.overdue = True
        holder = self._owners[lease.owner]
        holder.overdue_count += 1
        holder.overdue_bytes += lease.nbytes
        self.overdue_count += 1

    def _forgive(self, lease: Lease) -> None:
        lease.overdue = False
        holder = self._owners[lease.owner]
        holder.overdue_count -= 1
        holder.overdue_bytes -= lease.nbytes
        self.overdue_count -= 1

    def _end(self, lease: Lease) -> None:
        if lease.overdue:
            self._forgive(lease)
        lease.live = False
        del self._by_id[lease.lease_id]
        holder = self._owners[lease.owner]
        del holder.leases[lease.lease_id]
        if not holder.leases:
            del self._owners[lease.owner]
        if len(self._heap) > 2 * len(self._by_id) + _SMALL_HEAP:
            self._heap[:] = [element for element in self._heap if element[2].live]
            heapq.heapify(self._heap)


def _deadline(now: float, seconds: float) -> float:
    if not 0 < seconds < math.inf:
        raise ValueError(f"a lease lasts a positive, finite time, not {seconds} seconds")
    return now + seconds
