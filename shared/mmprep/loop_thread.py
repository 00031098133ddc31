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
        outcome: Future[Any] = Future()
        ends: list[Callable[[], object]] = []
        try:  # an interrupt may come at once
            self._loop.call_soon_threadsafe(_begin, begin, outcome, ends)
            return _result(outcome, seconds)
        except BaseException as error:
            if outcome.cancel():
                self._loop.call_soon_threadsafe(_end, ends)
            elif isinstance(error, TimeoutError):
                return outcome.result()  # it came in this moment
            raise

    def stop(self) -> None:
        """Cancel what is under way, whose callers on other threads are told, end the thread and close the loop."""
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _result(future: Future[Any], seconds: float = math.inf) -> Any:
    """Return a future's result as it does itself, and be interrupted soon whatever happens; raises TimeoutError."""
    until = time.monotonic() + seconds
    while True:
        left = until - time.monotonic()
        try:
            return future.result(min(_SLICE, left))
        except TimeoutError:
            if future.done():  # in this moment, or with such an error
                return future.result()
            if left <= _SLICE:
                raise


def _begin(
    begin: Callable[[Callable[[Any], None]], Callable[[], object]],
    outcome: Future[Any],
    ends: list[Callable[[], object]],
) -> None:
    def told(what: Any) -> None:
        if not outcome.set_running_or_notify_cancel():
            return
        if isinstance(what, BaseException):
            outcome.set_exception(what)
        else:
            outcome.set_result(what)

    if outcome.cancelled():
        return
    try:
        ends.append(begin(told))
    except Exception as error:  # noqa: BLE001 -- it is the caller's
        told(error)


def _end(ends: list[Callable[[], object]]) -> None:
    for end in ends:
        end()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
