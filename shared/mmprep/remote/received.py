"""Received tensors: memory of this process, and how much of it there may be."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable

import numpy as np

from mmprep.errors import Busy, LeaseLost, TooLarge
from mmprep.items import ALIGNMENT
from mmprep.sizes import format_size


def aligned(nbytes: int) -> memoryview:
    """Return new memory that starts where tensors do; what is in it is not defined."""
    whole = np.empty(nbytes + ALIGNMENT, np.uint8)
    skipped = -whole.ctypes.data % ALIGNMENT
    return whole[skipped : skipped + nbytes].data


class Memory:
    """A bound on received bytes.

    Parameters
    ----------
    limit:
        Bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._guard = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._freed = asyncio.Event()
        self._turn = asyncio.Lock()

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return self._used

    async def take(self, nbytes: int, seconds: float | None) -> None:
        """Take so many bytes, when there is room.

        Raises
        ------
        TooLarge
            There can never be.
        Busy
            There was none within ``seconds``.
        """
        if nbytes > self._limit:
            raise TooLarge(
                f"the tensors have {format_size(nbytes)}, and this backend receives at most {format_size(self._limit)}; "
                "give a larger receive_limit"
            )
        try:
            async with asyncio.timeout(seconds), self._turn:  # who came first is first, however much it needs
                while not self._took(nbytes):
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            raise Busy(
                "the items that are here fill this backend's receive_limit; release some", retry_after=1.0
            ) from None

    def _took(self, nbytes: int) -> bool:
        with self._guard:
            if self._used + nbytes > self._limit:
                return False
            self._used += nbytes
            return True

    def give(self, nbytes: int) -> None:
        """Give bytes back. May be called from any thread."""
        with self._guard:
            self._used -= nbytes
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._freed.set)


class Received:
    """The tensors of one item; a :class:`mmprep.item.Source`.

    Parameters
    ----------
    region:
        The tensor region.
    on_release:
        Called once, when the tensors are given up; from any thread.
    """

    def __init__(self, region: memoryview, on_release: Callable[[], None]) -> None:
        self._region: memoryview | None = region.toreadonly()
        self._on_release = on_release

    def _held(self) -> memoryview:
        if self._region is None:
            raise LeaseLost("the item was released; ask for it again")
        return self._region

    def check(self) -> None:
        self._held()

    def copy(self) -> memoryview:
        return memoryview(bytearray(self._held()))

    def hold_now(self) -> memoryview:
        return self._held()

    async def hold(self) -> memoryview:
        return self._held()

    async def let_go(self) -> None:
        return None

    def release(self) -> None:
        region, self._region = self._region, None  # arrays that were made of it keep its memory
        if region is not None:
            self._on_release()

    def __del__(self) -> None:
        self.release()
