"""Calls under way: a number for each, a future, and exactly one outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from mmprep.errors import Busy, MmprepError, ServiceUnavailable

_MOST_CALLS = 65_536


class WriterLostError(ServiceUnavailable):
    """The connection to the writer, or to the door to it, was lost while the call was under way."""


def succeeded(future: asyncio.Future[Any]) -> bool:
    """Whether a future has a result, as one may that is awaited by a task that is cancelled in the very same moment."""
    return future.done() and not future.cancelled() and future.exception() is None


class _Told:
    """In place of a future: a function that is called with the outcome, at once."""

    __slots__ = ("set_exception", "set_result")

    def __init__(self, told: Callable[[Any], None]) -> None:
        self.set_result = self.set_exception = told

    @staticmethod
    def done() -> bool:
        return False


class CallTable:
    """Futures by call number, on one event loop."""

    def __init__(self, first: int = 1) -> None:
        self._next = first
        self._waiting: dict[int, asyncio.Future[Any] | _Told] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, number: int) -> bool:
        return number in self._waiting

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._waiting))

    def open(self) -> tuple[int, asyncio.Future[Any]]:
        """Return a new call's number and the future of its outcome.

        Raises
        ------
        Busy
            Too many calls are under way.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        return self._enter(future), future

    def _enter(self, future: asyncio.Future[Any] | _Told) -> int:
        if len(self._waiting) >= _MOST_CALLS:
            raise Busy("too many calls are under way", retry_after=1.0)
        number = self._next
        self._next += 1
        self._waiting[number] = future
        return number

    def tell(self, say: Callable[[int], None], told: Callable[[Any], None]) -> int:
        """Make a call whose outcome, an answer or an error, ``told`` is called with at once; return its number.

        Raises as :meth:`open`, and what ``say`` raises; then nobody is told.
        """
        number = self._enter(_Told(told))
        try:
            say(number)
        except BaseException:
            self.forget(number)
            raise
        return number

    def begin(self, say: Callable[[int], None], answered: Callable[[asyncio.Future[Any]], None]) -> None:
        """Make a call for whose outcome nobody waits: ``answered`` is called with its future. Raises as :meth:`open`."""
        number, future = self.open()
        future.add_done_callback(answered)
        say(number)

    async def ask(
        self, say: Callable[[int], None], connected: Callable[[], Awaitable[None]], *, seconds: float, silence: str
    ) -> Any:
        """Make a call, and make it anew where the connection is lost before it is answered: it may be made twice.

        Parameters
        ----------
        say:
            Sends it, under the number that it is given.
        connected:
            Waits until there is a connection.
        seconds:
            For all of it.
        silence:
            What to say where no answer comes.

        Raises
        ------
        ServiceUnavailable
            None came.
        MmprepError
            What the call was answered with, or what ``connected`` raises.
        """
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await connected()
                    number, future = self.open()
                    try:
                        say(number)
                        return await future
                    except WriterLostError:
                        continue
                    finally:
                        self.forget(number)
        except TimeoutError:
            raise ServiceUnavailable(silence, retry_after=1.0) from None

    def resolve(self, number: int, outcome: Any) -> bool:
        """Give a call its outcome; an error is raised where it is awaited. Later outcomes are passed over.

        Returns
        -------
        bool
            Whether the call was under way, and had not been cancelled.
        """
        future = self._waiting.pop(number, None)
        if future is None or future.done():
            return False
        if isinstance(outcome, MmprepError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        return True

    def forget(self, number: int) -> bool:
        """Drop a call that nobody awaits any more; say whether it was under way."""
        return self._waiting.pop(number, None) is not None

    def fail_all(self, kind: type[MmprepError], message: str) -> None:
        """Fail every call under way."""
        for number in self:
            self.resolve(number, kind(message))
