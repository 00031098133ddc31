"""An asyncio loop on a thread of its own, under the synchronous clients."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any

from mmprep.errors import CLOSED, InvalidRequest

#: Seconds after which a thread that waits looks whether it was interrupted: an interrupt that comes in the moment in which
#: the wait begins does not end it.
_SLICE = 0.5


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
            raise InvalidRequest(CLOSED)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return _result(future)
        except CancelledError:
            raise InvalidRequest("it was closed while the call was under way") from None
        except BaseException:
            future.cancel()
            raise

    def ask(self, begin: Callable[[Callable[[Any], None]], Callable[[], object]], *, seconds: float) -> Any:
        """Return what is told, with one hop to the loop and one back, and no task between them.

        Parameters
        ----------
        begin:
            Called on the loop with what takes the outcome, an error too, on the loop and once. Returns what ends the wait.
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
            raise InvalidRequest(CLOSED)
        outcome = _Outcome()
        try:  # an interrupt may come at once
            self._loop.call_soon_threadsafe(outcome.begin, begin)
            if not outcome.comes(seconds):
                raise TimeoutError
        except BaseException as error:
            if outcome.give_up():
                self._loop.call_soon_threadsafe(outcome.end)
                raise
            if not isinstance(error, TimeoutError):
                raise
            outcome.comes(math.inf)  # it came in this moment
        return outcome.get()

    def stop(self) -> None:
        """Cancel what is under way, whose callers on other threads are told, end the thread and close the loop."""
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _result(future: Future[Any]) -> Any:
    """Return a future's result as it does itself, and be interrupted soon whatever happens."""
    while True:
        try:
            return future.result(_SLICE)
        except TimeoutError:
            if future.done():  # in this moment, or with such an error
                return future.result()


class _Outcome:
    """What one thread waits for and the loop tells it: a future with less to it, because engines wait here between jobs."""

    __slots__ = ("_claim", "_end", "_there", "_what")

    def __init__(self) -> None:
        #: Who has it decides what comes of the wait: an outcome, or none.
        self._claim = threading.Lock()
        #: Held until there is an outcome.
        self._there = threading.Lock()
        self._there.acquire()
        self._what: Any = None
        self._end: Callable[[], object] | None = None

    # On the loop

    def begin(self, begin: Callable[[Callable[[Any], None]], Callable[[], object]]) -> None:
        if self._claim.locked():  # nobody waits any more
            return
        try:
            self._end = begin(self._told)
        except Exception as error:  # noqa: BLE001 -- it is the caller's
            self._told(error)

    def _told(self, what: Any) -> None:
        if self._claim.acquire(blocking=False):
            self._what = what
            self._there.release()

    def end(self) -> None:
        """End what was begun, of which nobody wants to know any more."""
        if self._end is not None:
            self._end()

    # On the thread that waits

    def comes(self, seconds: float) -> bool:
        """Wait; return whether there is an outcome."""
        until = time.monotonic() + seconds
        while not self._there.acquire(timeout=max(0.0, min(_SLICE, until - time.monotonic()))):
            if time.monotonic() >= until:
                return False
        return True

    def give_up(self) -> bool:
        """Wait no more; return whether there is, and will be, no outcome."""
        return self._claim.acquire(blocking=False)

    def get(self) -> Any:
        if isinstance(self._what, BaseException):
            raise self._what
        return self._what


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
