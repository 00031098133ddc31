"""Pacing: how many steps of requests go on in one turn of the event loop.

Many requests that come at once, or wait for one thing, would all go on in the same turn, and whatever else the loop has to
do (the answer to ``/health``, a deadline, bytes that have arrived) would wait until the last of them has had its step.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

#: Of the longest steps, which take some 0.3 ms, four take little more than 1 ms.
STEPS: Final = 4


class Pace:
    """Lets a few go on in each turn of the running loop, and the others in the turns that follow, in their order.

    It bounds nothing else: whoever uses it has a bound for how many can wait here.

    Parameters
    ----------
    steps:
        At most so many go on in a turn.
    """

    def __init__(self, steps: int = STEPS) -> None:
        self._steps = steps
        self._taken = 0
        #: Those who have to go on before anybody who comes now: they wait, or were let go on and have not had their turn yet.
        self._ahead = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._will_turn = False

    async def step(self) -> None:
        """Return when it is the caller's turn: at once, unless too many went on in this one."""
        if self._ahead or self._taken >= self._steps:
            await self._wait()
        self._taken += 1
        self._turn_soon()

    async def _wait(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._turn_soon()
        self._ahead += 1
        try:
            await waiter
        finally:
            self._ahead -= 1

    def _turn_soon(self) -> None:
        if not self._will_turn:
            self._will_turn = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._taken, self._will_turn = 0, False
        if self._waiting:
            self._turn_soon()  # first: before those who are let go on here, in the turn in which they do
        let_go = 0
        while self._waiting and let_go < self._steps:
            waiter = self._waiting.popleft()
            if not waiter.done():  # else cancelled
                waiter.set_result(None)
                let_go += 1
