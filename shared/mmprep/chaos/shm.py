"""A /dev/shm of this process's own, which it may fill: a small tmpfs in a private mount name space."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

from mmprep.segment import SHM_DIRECTORY, free_space

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_FILLER = SHM_DIRECTORY / "chaos-filler"


def own_shm(nbytes: int) -> str | None:
    """Give this process, and those that it starts, an empty /dev/shm of that size; return why not, else ``None``.

    Call it before there is a second thread: mounts are a thread's own.
    """
    if os.geteuid() != 0:
        return "only root may mount one"
    libc = ctypes.CDLL(None, use_errno=True)
    steps: tuple[Callable[[], int], ...] = (
        lambda: libc.unshare(_CLONE_NEWNS),
        lambda: libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None),
        lambda: libc.mount(b"tmpfs", os.fsencode(SHM_DIRECTORY), b"tmpfs", 0, f"size={nbytes},mode=1777".encode()),
    )
    for step in steps:
        if step() != 0:
            return f"this machine does not allow it ({os.strerror(ctypes.get_errno())})"
    return None


def fill() -> int:
    """Take all that is free of /dev/shm, and return how many bytes."""
    taken = 0
    with Path(_FILLER).open("wb") as file:
        while (space := free_space()) is not None and space[0]:
            try:
                os.posix_fallocate(file.fileno(), taken, space[0])
            except OSError:  # somebody else was faster
                return taken
            taken += space[0]
    return taken


def empty() -> None:
    """Give it back."""
    _FILLER.unlink(missing_ok=True)


def fill_for(seconds: float) -> None:
    """Keep /dev/shm full for a while."""
    try:
        fill()
        time.sleep(seconds)
    finally:
        empty()
