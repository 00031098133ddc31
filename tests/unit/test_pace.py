"""Pacing: how many go on in one turn of the loop, and in which order."""

import asyncio
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mmprep_frontend.pace import Pace


class Turns:
    """Counts the turns of the running loop."""

    def __init__(self):
        self.number = 0
        self._next()

    def _next(self):
        self.number += 1
        self._handle = asyncio.get_running_loop().call_soon(self._next)

    def stop(self):
        self._handle.cancel()


@given(
    steps=st.integers(1, 5),
    # How many come in each turn, and which of all of them are cancelled at the end of each.
    coming=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    cancelled=st.sets(st.integers(0, 30)),
)
def test_all_go_on_in_their_order_and_no_more_in_a_turn_than_may(steps, coming, cancelled):
    async def main():
        pace, turns, went = Pace(steps), Turns(), []

        async def go_on(number):
            await pace.step()
            went.append((turns.number, number))

        tasks = []
        for count in coming:
            tasks += [asyncio.create_task(go_on(len(tasks) + number)) for number in range(count)]
            await asyncio.sleep(0)
            for number in cancelled & set(range(len(tasks))):
                tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        turns.stop()
        assert [number for _, number in went] == [n for n, task in enumerate(tasks) if not task.cancelled()]
        assert max(Counter(turn for turn, _ in went).values(), default=0) <= steps

    asyncio.run(main())


def test_what_else_the_loop_does_has_its_turn_between_them():
    async def main():
        pace, turns = Pace(2), Turns()
        waiting = [asyncio.create_task(pace.step()) for _ in range(20)]
        await waiting[0]
        begun = turns.number
        await waiting[-1]
        turns.stop()
        assert turns.number - begun >= 20 / 2 - 1
        # Who comes later waits for nobody.
        await pace.step()

    asyncio.run(main())
