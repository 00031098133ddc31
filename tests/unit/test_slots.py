"""Slots of fetches: what several do in one turn of the loop. That they bound fetches: test_fetch."""

import asyncio
import contextlib

import pytest

from mmprep.errors import Busy
from mmprep_frontend.media.slots import Slots


class Holder:
    """One who takes a slot for a host and holds it until told."""

    def __init__(self, slots, host="a"):
        self.inside, self.told = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._hold(slots, host))

    async def _hold(self, slots, host):
        async with slots.hold(host):
            self.inside.set()
            await self.told.wait()

    async def leave(self):
        self.told.set()
        await self.task

    async def cancel(self):
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


def test_who_gives_up_in_the_turn_in_which_a_slot_is_free_harms_nobody():
    async def main():
        slots = Slots(1, 1, 8)
        first = Holder(slots)
        await first.inside.wait()
        second, third = Holder(slots), Holder(slots)
        await asyncio.sleep(0)
        # In this order the one who leaves finds a waiter that was cancelled and has not left yet.
        first.told.set()
        second.task.cancel()
        await first.task
        await third.inside.wait()
        await second.cancel()
        await third.leave()

    asyncio.run(main())


def test_a_slot_that_was_granted_to_one_who_gives_up_goes_to_the_next():
    async def main():
        slots = Slots(1, 1, 8)
        first = Holder(slots)
        await first.inside.wait()
        second, third = Holder(slots), Holder(slots)
        await asyncio.sleep(0)
        await first.leave()
        await second.cancel()
        await third.inside.wait()
        await third.leave()

    asyncio.run(main())


def test_who_fits_overtakes_those_who_wait_for_a_busy_host():
    async def main():
        slots = Slots(3, 1, 8)
        first, waiting, other = Holder(slots, "a"), Holder(slots, "a"), Holder(slots, "b")
        await first.inside.wait()
        await other.inside.wait()
        assert not waiting.inside.is_set()
        await first.leave()
        await waiting.inside.wait()
        for holder in (waiting, other):
            await holder.leave()

    asyncio.run(main())


def test_beyond_those_who_may_wait_the_next_is_refused_at_once():
    async def main():
        slots = Slots(1, 1, 1)
        holders = [Holder(slots), Holder(slots)]
        await holders[0].inside.wait()
        with pytest.raises(Busy) as caught:
            async with slots.hold("a"):
                pass
        assert caught.value.retry_after
        for holder in holders:
            await holder.leave()

    asyncio.run(main())
