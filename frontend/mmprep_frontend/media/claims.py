"""Who of several processes downloads a URL: claims on keys of the disk cache that they share.

A claim is a lock of the kernel's on one byte of a file beside the index, at the place that the key gives: it falls with the
process that has it, no claim can be left behind, and there is no file a key. It only spares downloads. Whoever does not
get one in time, or at all, downloads by itself.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Final
from weakref import WeakValueDictionary, finalize

#: In the cache's directory.
CLAIMS: Final = "claims"
#: ``struct flock`` of Linux on 64 bits: type, whence, start, length, pid, which the kernel wants to be 0.
_FLOCK: Final = struct.Struct("@hhqqi4x")


class Claim:
    """The right to download what belongs under a key, until nothing refers to this any more."""

    __slots__ = ("__weakref__",)


class Claims:
    """The claims of this process. May be used from any thread.

    Parameters
    ----------
    home:
        The cache's directory; there has to be one when the first claim is made.
    """

    def __init__(self, home: Path) -> None:
        self._path = home / CLAIMS
        self._lock = threading.Lock()
        #: Places of claims that have ended, which a thread works off. A claim may end anywhere, within the collection of garbage
        #: too, where whoever is interrupted may hold any lock: nothing else is done there than to put its place here.
        self._ended: SimpleQueue[int | None] = SimpleQueue()
        self._worker: threading.Thread | None = None
        self._file: int | None = None
        self._held: WeakValueDictionary[int, Claim] = WeakValueDictionary()

    def held(self, key: bytes) -> Claim | None:
        """Return this process's claim on ``key``, where it has one; does not touch the disk."""
        return self._held.get(_place(key))

    def claim(self, key: bytes) -> Claim | None:
        """Return a claim on ``key``; ``None`` where another process has it. Raises OSError where there is no locking."""
        place = _place(key)
        with self._lock:
            if (held := self._held.get(place)) is not None:
                return held
            if self._file is None:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
            except BlockingIOError:
                return None
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="claims", daemon=True)
                self._worker.start()
            claim = self._held[place] = Claim()
            finalize(claim, self._ended.put, place).atexit = False
            return claim

    def close(self) -> None:
        """Let all claims go."""
        self._ended.put(None)
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _work(self) -> None:
        while (place := self._ended.get()) is not None:
            self._free(place)

    def _free(self, place: int) -> None:
        with self._lock, suppress(OSError):
            # Another claim on the same place may have been made meanwhile.
            if self._file is not None and place not in self._held:
                fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, place, 1, 0))


def _place(key: bytes) -> int:
    return int.from_bytes(key[:8], "big") >> 2
