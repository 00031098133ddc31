"""Lets a process end with the one that has started it, however that one ends."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the thread that has started it ends.

    Whoever calls this looks afterwards whether the parent is still there: one that has ended before sends nothing.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
