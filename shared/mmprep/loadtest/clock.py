"""Seconds that pass, and calls at a moment that come within some tens of microseconds of it.

The timers of event loops are a millisecond wide, which is as much as a cached request takes: a load test that sent its
requests by them would measure them. The kernel's timer, as a file that the loop watches, is not.
"""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import itertools
import os
import struct
import time
from collections.abc import Callable
from typing import Final, Self

#: From ``sys/timerfd.h`` and ``time.h``.
_MONOTONIC: Final = 1
_NONBLOCK: Final = os.O_NONBLOCK
_ABSOLUTE: Final = 1
#: An ``itimerspec``: the interval, which is none here, and the moment, each in seconds and nanoseconds.
_SPEC: Final = struct.Struct("@qqqq")


class Clock:
    """The monotonic clock, on the running event loop. A context manager."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._spec = ctypes.create_string_buffer(_SPEC.size)
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        #: Whether calls are made now; the timer is set once, after them.
        self._calling = False
        self._loop = asyncio.get_running_loop()
        self._file = self._libc.timerfd_create(_MONOTONIC, _NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._loop.add_reader(self._file, self._rings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.remove_reader(self._file)
        os.close(self._file)

    @staticmethod
    def now() -> float:
        """Return the time in seconds."""
        return time.monotonic()

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        """Call back when :meth:`now` has reached ``when``; never before this has returned."""
        heapq.heappush(self._calls, (when, next(self._numbers), callback))
        if self._calls[0][0] == when and not self._calling:
            self._set(when)

    def _set(self, when: float) -> None:
        seconds = max(0, int(when))
        # Nought and nought would stop it.
        _SPEC.pack_into(self._spec, 0, 0, 0, seconds, max(1, int((when - seconds) * 1e9)))
        self._libc.timerfd_settime(self._file, _ABSOLUTE, self._spec, None)

    def _rings(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:  # it was set anew meanwhile
            return
        now, self._calling = self.now(), True
        try:
            while self._calls and self._calls[0][0] <= now:
                heapq.heappop(self._calls)[2]()
        finally:
            self._calling = False
            if self._calls:
                self._set(self._calls[0][0])
