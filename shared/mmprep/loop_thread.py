"""An asyncio loop on a thread of its own, under the synchronous clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from typing import Any

from mmprep.errors import InvalidRequest


class LoopThread:
    """Runs coroutines for threads that have no loop."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` has ended the thread."""
        return self._loop.is_closed()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run ``work`` on the loop and return its result; an interrupt of the caller cancels it.

        Raises
        ------
        InvalidRequest
            The thread was stopped.
        """
        if self._loop.is_closed():
            work.close()
            raise InvalidRequest("this client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise InvalidRequest("this client was closed while the call was under way") from None
        except BaseException:
            future.cancel()
            raise

    def ask(self, begin: Callable[[Callable[[Any], None]], None], end: Callable[[], object], *, seconds: float) -> Any:
        """Return what is told, without a task or a hop to the loop: the caller's thread begins by itself.

        Parameters
        ----------
        begin:
            Called with what takes the outcome, an error too, once and from any thread. What it raises is raised.
        end:
            Called on the loop where the wait ends without an outcome: by its time, or by an interrupt.
        seconds:
            For how long the outcome is waited for.

        Raises
        ------
        TimeoutError
            There was none in that time.
        InvalidRequest
            The thread was stopped.
        """
        if self._loop.is_closed():
            raise InvalidRequest("this client is closed")
        outcome = _Outcome()
        try:  # an interrupt may come at once
            begin(outcome.told)
            if not outcome.there.acquire(timeout=seconds):
                raise TimeoutError
        except BaseException as error:
            if outcome.settle():
                self._loop.call_soon_threadsafe(end)
                raise
            if not isinstance(error, TimeoutError):  # else it came in this moment
                raise
        return outcome.result()

    def stop(self) -> None:
        """Cancel what is under way, whose callers on other threads are told, end the thread and close the loop."""
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Outcome:
    """One outcome that one thread waits for; a future costs several times as much."""

    __slots__ = ("_open", "_what", "there")

    def __init__(self) -> None:
        #: Held until the outcome is there.
        self.there = threading.Lock()
        self.there.acquire()
        #: Who takes it settles the outcome: who tells it, or who waits no more.
        self._open = threading.Lock()
        self._what: Any = None

    def settle(self) -> bool:
        """Say that there will be no outcome; return whether there was none."""
        return self._open.acquire(blocking=False)

    def told(self, what: Any) -> None:
        if self.settle():
            self._what = what
            self.there.release()

    def result(self) -> Any:
        if isinstance(self._what, BaseException):
            raise self._what
        return self._what


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
