"""What peers ask of leases, and how a call's pins become leases. A part of the writer's state machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from mmprep import errors
from mmprep.lease_id import RANDOM_SIZE, lease_id
from mmprep.wire import messages
from mmprep_worker.ring.ring import Ring
from mmprep_worker.writer.state import Peer, PendingCall


class Leasing:
    """Leases of backends.

    Parameters
    ----------
    seconds:
        How long a lease holds without renewal.
    new_id:
        Returns fresh random bytes, at least :data:`~mmprep.lease_id.RANDOM_SIZE`.
    """

    def __init__(self, ring: Ring, seconds: float, new_id: Callable[[], bytes]) -> None:
        self._ring = ring
        self._seconds = seconds
        self._random = new_id

    @property
    def milliseconds(self) -> int:
        """How long a lease holds without renewal."""
        return int(self._seconds * 1000)

    def answer(self, peer: Peer, message: Any, now: float) -> Any:
        """Do what a message about leases asks for and return its answer, ``None`` where none is wanted.

        Raises
        ------
        MmprepError
            What the call is to be answered with.
        """
        match message:
            case messages.Reassert():
                return self._reassert(peer, message, now)
            case messages.Acquire():
                return self._acquire(peer, message, now)
            case messages.Renew():
                return self._renew(peer, message, now)
            case messages.Release():
                return self._release(peer, message)
            case messages.Upgrade():
                return self._upgrade(peer, message)
            case messages.Retag():
                peer.retag(message.turn)
                return messages.Done(message.call)
        raise errors.InvalidRequest(f"a {type(message).__name__} is not about leases")

    def grant(self, peer: Peer, slot: int, generation: int, kind: messages.LeaseKind, now: float) -> bytes:
        """Lease content to a backend; return the lease's id, which says to whom. Raises StaleAddress or Busy."""
        random = self._random()[:RANDOM_SIZE]
        lease = lease_id(self._ring.incarnation, random, mark=peer.mark, slot=slot, generation=generation, kind=kind)
        self._ring.deliver(lease, peer.id, slot, generation, kind, now=now, seconds=self._seconds)
        return lease

    def _reassert(self, peer: Peer, message: messages.Reassert, now: float) -> messages.Renewed:
        """Take over leases of an earlier writer; the answer names those whose content is gone.

        They are promises that were given already: no quota refuses them.
        """
        lost = []
        for held in message.leases:
            known = self._ring.leases.get(held.lease)
            entry = self._ring.at(held.slot, held.generation)
            if known and entry and (known.owner, known.slot) == (peer.id, entry.slot):  # it is not the first time
                self._ring.renew(peer.id, (held.lease,), now, self._seconds)
                self._ring.upgrade(peer.id, held.lease, held.kind, again=True)
                continue
            try:
                self._ring.deliver(
                    held.lease,
                    peer.id,
                    held.slot,
                    held.generation,
                    held.kind,
                    now=now,
                    seconds=self._seconds,
                    again=True,
                )
            except (errors.StaleAddress, ValueError):
                lost.append(held.lease)
        return messages.Renewed(message.call, tuple(lost), self.milliseconds)

    def _acquire(self, peer: Peer, message: messages.Acquire, now: float) -> messages.Acquired:
        """Lease the content of an address; raises StaleAddress or Busy."""
        lease = self.grant(peer, message.slot, message.generation, message.kind, now)
        return messages.Acquired(message.call, lease, self.milliseconds)

    def _renew(self, peer: Peer, message: messages.Renew, now: float) -> messages.Renewed:
        """Prolong leases; the answer names those that are over."""
        held = self._ring.renew(_owner(peer, message), message.leases, now, self._seconds)
        lost = tuple(lease for lease, alive in held.items() if not alive)
        return messages.Renewed(message.call, lost, self.milliseconds)

    def _release(self, peer: Peer, message: messages.Release) -> messages.Done | None:
        """End leases of a backend, which says so itself; ``None`` where no answer is wanted."""
        self._ring.release(peer.id, message.leases)
        return messages.Done(message.call) if message.call else None

    def given_back(self, peer: Peer, message: messages.Release) -> tuple[str, list[bytes]]:
        """Return which backend is to be asked about what, of that which a frontend wants to be released in its name.

        Raises
        ------
        InvalidRequest
            It names no backend.
        """
        owner = _owner(peer, message)
        known = map(self._ring.leases.get, message.leases)
        return owner, [lease.lease_id for lease in known if lease is not None and lease.owner == owner]

    def _upgrade(self, peer: Peer, message: messages.Upgrade) -> messages.Done:
        """Change a lease's kind; raises LeaseLost or Busy."""
        if not self._ring.upgrade(peer.id, message.lease, message.kind):
            raise errors.LeaseLost("the lease is over, or another backend's; ask for the item again")
        return messages.Done(message.call)

    def lease_out(self, pending: PendingCall, to: Peer, kind: messages.LeaseKind, now: float) -> None:
        """Lease every entry that a call pins to a backend; raises Busy, and then none is leased.

        Whether a backend may get leases does not change between two of them, so the first decides for all.
        """
        for position, answer in enumerate(pending.answers):
            if answer is None or not answer.length:
                continue
            lease = self.grant(to, answer.slot, answer.generation, kind, now)
            pending.answers[position] = msgspec.structs.replace(answer, lease=lease)


def _owner(peer: Peer, message: messages.Renew | messages.Release) -> str:
    """A backend speaks for itself; a frontend speaks for the backend that an HTTP caller names."""
    if peer.role == "backend":
        return peer.id
    if message.owner is None:
        raise errors.InvalidRequest("only a backend has leases of its own; name the one that is meant", param="owner")
    return message.owner
