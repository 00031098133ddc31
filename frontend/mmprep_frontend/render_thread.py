"""Where prompts are rendered and tokenized: on the render thread, and short ones at once, on the event loop.

A hop to the thread and back costs more than a short prompt does, since the two threads take the interpreter's lock from
each other: a chat of 200 words takes the process half as much CPU time without it. Rules:

- the tokenizer and the templates are used by one thread at a time: whoever uses them holds the lock;
- the loop never waits for that lock: while the thread is at work, a short prompt goes there as well;
- of all short prompts one is made in a turn of the loop, so that whatever else it has to do comes between: with two,
  `/health` waits twice as long while many new texts are under way.

How short is short enough is the caller's to say.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mmprep_frontend.pace import Pace

T = TypeVar("T")


class RenderThread:
    """The thread that uses the model's tokenizer and templates.

    Parameters
    ----------
    executor:
        Of one thread.
    """

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._in_use = threading.Lock()
        self._pace = Pace(1)

    def run(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Return the future of what ``work`` returns on the thread. Where it is cancelled, work that has not begun is dropped."""
        return asyncio.get_running_loop().run_in_executor(self._executor, self._alone, work, *arguments)

    async def at_once(self, work: Callable[..., T], *arguments: object) -> T | None:
        """Return what ``work``, which takes little, returns on the loop when it is its turn; ``None`` while the thread is at work."""
        await self._pace.step()
        if not self._in_use.acquire(blocking=False):
            return None
        try:
            return work(*arguments)
        finally:
            self._in_use.release()

    def close(self) -> None:
        """Drop what has not begun; does not wait for what has."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _alone(self, work: Callable[..., T], *arguments: object) -> T:
        with self._in_use:
            return work(*arguments)
