"""What answers speak of, and what keeps it there: entries that are read and pinned for calls.

A part of the writer's state machine. An entry is pinned once for a call, however many of its items it answers; what one
call pins is bounded, so that two calls can always go on side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from mmprep import errors
from mmprep.wire.messages import ItemAnswer
from mmprep_worker.ring.directory import Entry
from mmprep_worker.ring.ring import Ring
from mmprep_worker.writer.plans import PlanStore
from mmprep_worker.writer.state import PendingCall, Result, failed

#: A call may pin this part of the ring.
_PIN_SHARE = 2


class Holds:
    """Pins of calls, and the answers about what is pinned.

    Parameters
    ----------
    read:
        Returns bytes of the segment: ``read(offset, length)``.
    """

    def __init__(self, ring: Ring, plans: PlanStore, read: Callable[[int, int], bytes]) -> None:
        self._ring = ring
        self._plans = plans
        self._read = read
        self._limit = ring.geometry.arena_capacity // _PIN_SHARE

    def hit(self, pending: PendingCall, key: bytes) -> ItemAnswer | None:
        """Answer from what is there; ``None`` where it has to be computed.

        Raises
        ------
        TooLarge
            The call would pin more than one call may.
        """
        if pending.need == "plan" and (meta := self._plans.get(key)) is not None:
            return ItemAnswer("hit", meta=meta)
        entry = self._ring.lookup(key)
        if entry is None:
            return None
        answer = self._about(pending, entry, "hit")
        if pending.need == "plan":
            self._plans.put(key, answer.meta)
        return answer

    def outcome(self, pending: PendingCall, position: int, flight_id: int, result: Result) -> ItemAnswer:
        """Answer with what a flight ended with.

        A flight for tensors may have failed for want of room when its plan was known: that is all that some wait for.
        """
        outcome: Literal["computed", "joined"] = "computed" if flight_id in pending.opened else "joined"
        if isinstance(result, errors.MmprepError):
            plan = self._plans.get(pending.offered[position].key) if pending.need == "plan" else None
            return failed(result) if plan is None else ItemAnswer(outcome, meta=plan)
        if isinstance(result, bytes):
            return ItemAnswer(outcome, meta=result)
        try:
            return self._about(pending, result, outcome)
        except errors.TooLarge as error:
            return failed(error)

    def repin(self, pending: PendingCall, places: Sequence[tuple[int, int]]) -> None:
        """Pin entries by slot and generation; those that are not there any more are passed over."""
        for slot, generation in places:
            entry = self._ring.at(slot, generation)
            if entry is not None and slot not in pending.pinned:
                self._ring.pin(pending.holder, slot)
                pending.pinned[slot] = entry.extent
                pending.answers.append(ItemAnswer("hit", slot, entry.offset, entry.length, generation))

    def let_go(self, pending: PendingCall) -> None:
        """End the call's pins."""
        self._ring.unpin(pending.holder)
        pending.pinned.clear()

    def _about(self, pending: PendingCall, entry: Entry, outcome: Literal["hit", "computed", "joined"]) -> ItemAnswer:
        if pending.need == "tensors" and entry.slot not in pending.pinned:
            if sum(pending.pinned.values()) + entry.extent > self._limit:
                raise errors.TooLarge("the request's items together are larger than half of the cache; send fewer")
            self._ring.pin(pending.holder, entry.slot)
            pending.pinned[entry.slot] = entry.extent
        meta = self._read(entry.offset, entry.meta_len)
        if pending.need == "plan":
            return ItemAnswer(outcome, meta=meta)
        return ItemAnswer(outcome, entry.slot, entry.offset, entry.length, entry.generation, None, meta)

    def validate(self, pending: PendingCall) -> None:
        """Check what the ring holds for a call; raises AssertionError."""
        held = sorted((entry.slot, entry.extent) for entry in self._ring.pinned_by(pending.holder))
        assert held == sorted(pending.pinned.items()), f"call {pending.call} pins something else than it knows of"
        assert sum(pending.pinned.values()) <= self._limit, f"call {pending.call} pins more than one call may"
        answered = {answer.slot for answer in pending.answers if answer is not None and answer.length}
        assert answered == pending.pinned.keys(), (
            f"call {pending.call} was answered about what it does not pin, or pins more"
        )
