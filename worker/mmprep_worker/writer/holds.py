"""What answers speak of, and what keeps it there: entries that are read and pinned for calls, and transfers.

A part of the writer's state machine. An entry is pinned once for a call, however many of its items it answers. Rules:

* One call pins at most half of the ring, so that two calls can always go on side by side, and none flushes the cache.
* What it needs beyond that is had apart from the ring: from a spill or inline. So an entry of the ring that it cannot pin
  is no hit for it, and what would not fit beside its other items when they are computed is not granted in the ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from mmprep import errors
from mmprep.wire.messages import ItemAnswer, Recalled
from mmprep_worker.ring.directory import Entry
from mmprep_worker.ring.ring import Ring
from mmprep_worker.ring.spills import SLOT as SPILL_SLOT
from mmprep_worker.ring.spills import Spill
from mmprep_worker.scheduling.flight import IN_RING, Need, nobody_has_it
from mmprep_worker.scheduling.flights import Flights
from mmprep_worker.writer.plans import PlanStore
from mmprep_worker.writer.state import PendingCall, Result, failed
from mmprep_worker.writer.transfers import Transfer, Transfers

#: A call may pin this part of the ring.
_PIN_SHARE = 2


class Holds:
    """Pins and transfers of calls, and the answers about them.

    Parameters
    ----------
    read:
        Returns bytes of the segment: ``read(offset, length)``.
    """

    def __init__(
        self,
        ring: Ring,
        flights: Flights,
        transfers: Transfers,
        plans: PlanStore,
        read: Callable[[int, int], bytes],
    ) -> None:
        self._ring = ring
        self._flights = flights
        self._transfers = transfers
        self._plans = plans
        self._read = read
        self._limit = ring.geometry.arena_capacity // _PIN_SHARE

    def hit(self, pending: PendingCall, key: bytes) -> ItemAnswer | None:
        """Answer from what is there; ``None`` where it has to be computed."""
        if any(item.replace and item.key == key for item in pending.injected):
            return None
        if pending.need == "plan" and (meta := self._plans.get(key)) is not None:
            return ItemAnswer("hit", meta=meta)
        entry = self._ring.lookup(key)
        if entry is not None and not self._may_pin(pending, entry):
            entry = self._ring.lookup_spill(key)
        if entry is None:
            return None
        answer = self._about(pending, entry, "hit")
        if pending.need == "plan":
            self._plans.put(key, answer.meta)
        return answer

    def there(self, keys: Iterable[bytes], places: Iterable[tuple[int, int]]) -> bool:
        """Whether one who asks for items is answered at once, and with these slots and generations; without any: with plans."""
        wanted = set(places)
        if not wanted:
            return all(self._plans.get(key) is not None or self._ring.lookup(key) is not None for key in keys)
        found: dict[tuple[int, int], int] = {}
        for key in keys:
            entry = self._ring.lookup(key)
            if entry is not None and _place(entry) not in found and not self._fits(entry, found.values()):
                entry = self._ring.lookup_spill(key)
            if entry is None or _place(entry) not in wanted:
                return False
            found[_place(entry)] = 0 if isinstance(entry, Spill) else entry.extent
        return found.keys() == wanted

    def outcome(self, pending: PendingCall, position: int, flight_id: int, result: Result) -> ItemAnswer:
        """Answer with what a flight ended with.

        A flight for tensors may have failed for want of room when its plan was known: that is all that some wait for.
        """
        outcome: Literal["computed", "joined"] = "computed" if flight_id in pending.opened else "joined"
        if isinstance(result, errors.MmprepError):
            item = pending.offered[position]
            if isinstance(item, Recalled) and item.injected == pending.keys[position]:
                return failed(nobody_has_it())  # what is wrong with it is the matter of who injects it
            plan = self._plans.get(pending.keys[position]) if pending.need == "plan" else None
            return failed(result) if plan is None else ItemAnswer(outcome, meta=plan)
        if isinstance(result, bytes):
            return ItemAnswer(outcome, meta=result)
        if isinstance(result, Transfer):
            return self._inline(pending, result, outcome)
        if not self._may_pin(pending, result):
            return failed(
                errors.Busy(
                    "the request's items together need more than half of the cache, and there is no room beside it now; "
                    "send fewer, or send them again later",
                    retry_after=1.0,
                )
            )
        return self._about(pending, result, outcome)

    def needs(self, pending: PendingCall, positions: Iterable[int]) -> list[Need]:
        """Return for each missing item what a flight has to give for this call."""
        promised = sum(pending.pinned.values())
        wanted = [pending.keys[position] for position in positions]
        needs: dict[bytes, Need] = dict.fromkeys((item.key for item in pending.injected), "injected")
        for key in wanted:
            if pending.need == "plan" or key in needs:
                continue
            entry = self._ring.in_ring(key)
            extent = 0 if entry is None else entry.extent
            if promised + extent <= self._limit:
                needs[key] = "tensors"
                promised += extent
            else:
                needs[key] = "apart"
        return [needs.get(key, "plan") for key in wanted]

    def may_fit(self, pending: PendingCall, extent: int) -> bool:
        """Whether the call could pin ``extent`` bytes more of the ring beside all that is being filled there for it."""
        if pending.need == "plan":
            return True
        filling = 0
        for flight_id in pending.by_flight:
            flight = self._flights[flight_id]
            entry = self._ring.in_ring(flight.key) if flight.need in IN_RING else None
            filling += 0 if entry is None else entry.extent
        return sum(pending.pinned.values()) + filling + extent <= self._limit

    def apart(self, pending: PendingCall) -> tuple[int, int]:
        """Return the bytes of the spills that the call pins, and of the transfers that it holds."""
        spills = [entry for entry in self._ring.pinned_by(pending.holder) if isinstance(entry, Spill)]
        return sum(spill.extent for spill in spills), self._transfers.bytes_of(pending.transfers)

    def forget(self, key: bytes) -> None:
        """Take what is there under a key out of the cache; who holds it keeps it until he lets go."""
        self._ring.remove(key)
        self._plans.drop(key)

    def metadata(self, entry: Entry) -> bytes:
        """Return the packed metadata of an entry."""
        return entry.meta if isinstance(entry, Spill) else self._read(entry.offset, entry.meta_len)

    def repin(self, pending: PendingCall, places: Sequence[tuple[int, int]]) -> None:
        """Pin entries by slot and generation; those that are not there any more are passed over."""
        for slot, generation in places:
            entry = self._ring.at(slot, generation)
            if entry is not None and generation not in pending.pinned:
                self._ring.pin(pending.holder, entry.slot)
                pending.pinned[generation] = 0 if isinstance(entry, Spill) else entry.extent
                pending.answers.append(ItemAnswer("hit", slot, entry.offset, entry.length, generation))

    def let_go(self, pending: PendingCall) -> None:
        """End all that the call holds."""
        self.unpin(pending)
        for number in pending.transfers:
            self._transfers.let_go(number, pending.holder)
        pending.transfers.clear()

    def unpin(self, pending: PendingCall) -> None:
        """End the call's pins."""
        self._ring.unpin(pending.holder)
        pending.pinned.clear()

    def _may_pin(self, pending: PendingCall, entry: Entry) -> bool:
        if pending.need == "plan" or entry.generation in pending.pinned:
            return True
        return self._fits(entry, pending.pinned.values())

    def _fits(self, entry: Entry, pinned: Iterable[int]) -> bool:
        """Whether one who pins so many bytes of the ring may pin another entry."""
        return isinstance(entry, Spill) or sum(pinned) + entry.extent <= self._limit

    def _inline(self, pending: PendingCall, transfer: Transfer, outcome: Literal["computed", "joined"]) -> ItemAnswer:
        if pending.need == "plan":
            return ItemAnswer(outcome, meta=transfer.meta)
        self._transfers.hold(transfer, pending.holder)
        pending.transfers.add(transfer.number)
        return ItemAnswer(outcome, meta=transfer.meta, inline=transfer.number)

    def _about(self, pending: PendingCall, entry: Entry, outcome: Literal["hit", "computed", "joined"]) -> ItemAnswer:
        spill = entry if isinstance(entry, Spill) else None
        if pending.need == "tensors" and entry.generation not in pending.pinned:
            self._ring.pin(pending.holder, entry.slot)
            pending.pinned[entry.generation] = 0 if spill else entry.extent
        meta = self.metadata(entry)
        if pending.need == "plan":
            return ItemAnswer(outcome, meta=meta)
        slot, generation = _place(entry)
        epoch = spill.epoch if spill else None
        return ItemAnswer(outcome, slot, entry.offset, entry.length, generation, None, meta, None, epoch)

    def validate(self, pending: PendingCall) -> None:
        """Check what the ring holds for a call; raises AssertionError."""
        entries = self._ring.pinned_by(pending.holder)
        held = {entry.generation: 0 if isinstance(entry, Spill) else entry.extent for entry in entries}
        assert len(held) == len(entries), f"call {pending.call} pins something twice"
        assert held == pending.pinned, f"call {pending.call} pins something else than it knows of"
        assert sum(pending.pinned.values()) <= self._limit, f"call {pending.call} pins more than one call may"
        answers = [answer for answer in pending.answers if answer is not None]
        answered = {answer.generation for answer in answers if answer.length}
        leased = pending.answered and pending.lease is not None
        assert leased or answered == pending.pinned.keys(), (
            f"call {pending.call} was answered about what it does not pin, or pins more"
        )
        assert {answer.inline for answer in answers if answer.inline} == pending.transfers, (
            f"call {pending.call} was answered about tensors that it does not hold, or holds more"
        )
        held_by_it = {transfer.number for transfer in self._transfers if pending.holder in transfer.holders}
        assert held_by_it == pending.transfers, f"call {pending.call} holds other transfers than it knows of"


def _place(entry: Entry) -> tuple[int, int]:
    """Return an entry's slot, as answers and addresses tell it, and its generation."""
    return SPILL_SLOT if isinstance(entry, Spill) else entry.slot, entry.generation
