"""Files that a start makes and the next one need not make again, in this user's cache: tokenizers, machine code.

- A key says all that the content depends on, so nothing ever becomes stale: what has another key is made anew.
- A directory or file that another user owns or may write is as if it were not there.
- The bytes carry their own digest. A file appears whole, under a name that nothing else has.
- Whatever the disk does, work goes on as if there were no cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

_DIGEST = 32
#: Bytes of one file that is read.
_MOST_BYTES = 256 << 20
#: Seconds that others are waited for, and between two looks at them. Then it is done without: twice is better than never.
_PATIENCE = 120.0
_LOOK_AGAIN = 0.005


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return ``$XDG_CACHE_HOME/mmprep``, else ``~/.cache/mmprep``; ``None`` where this user has no home. Makes nothing."""
    named = environment.get("XDG_CACHE_HOME", "")
    if named.startswith("/"):
        return Path(named) / "mmprep"
    try:
        return Path.home() / ".cache" / "mmprep"
    except RuntimeError:
        return None


class KeptFiles:
    """Files of one kind, which several processes may share; the directory is made when one is put into it.

    Parameters
    ----------
    directory:
        Of this kind alone; ``None``: nothing is kept.
    most:
        As many stay as this, those that were used last.
    """

    def __init__(self, directory: Path | None, most: int) -> None:
        self._directory = directory
        self._most = most

    def get(self, key: bytes) -> bytes | None:
        """Return what is kept under ``key``."""
        if self._directory is None:
            return None
        path = self._directory / key.hex()
        try:
            if not _is_ours(self._directory):
                return None
            with open(path, "rb", opener=_open_alone) as file:
                found = os.fstat(file.fileno())
                if not _is_private(found) or found.st_size > _MOST_BYTES:
                    return None
                whole = file.read(found.st_size)  # as much memory is taken before anything is read
            os.utime(path)
        except OSError:
            return None
        data = whole[_DIGEST:]
        return data if hashlib.sha256(data).digest() == whole[:_DIGEST] else None

    def put(self, key: bytes, data: bytes) -> None:
        """Keep ``data``, and let those go that were not used for longest."""
        if self._directory is None or len(data) + _DIGEST > _MOST_BYTES:
            return
        with contextlib.suppress(OSError):
            self._make()
            if _is_ours(self._directory):
                _write(self._directory, key.hex(), data)
                self._sweep(self._directory)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes that ask for it from this block meanwhile; a dead one keeps nobody."""
        try:
            self._make()
            lock = None if self._directory is None else os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # nothing can be kept, so nothing is worth waiting for
            lock = None
        try:
            if lock is not None:
                _wait_for(lock)
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def _make(self) -> None:
        if self._directory is not None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _sweep(self, directory: Path) -> None:
        """Remove all but the latest files, also what a process that died has left half written."""
        dated = []
        for path in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                dated.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(dated, reverse=True)[self._most :]:
            path.unlink(missing_ok=True)


def _write(directory: Path, name: str, data: bytes) -> None:
    number, new = tempfile.mkstemp(dir=directory, prefix="new-")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(hashlib.sha256(data).digest())
            file.write(data)
        Path(new).replace(directory / name)
    except BaseException:
        Path(new).unlink(missing_ok=True)
        raise


def _wait_for(lock: int) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                return  # this file system has no locks
        else:
            return
        time.sleep(_LOOK_AGAIN)


def _open_alone(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def _is_ours(directory: Path) -> bool:
    found = directory.lstat()
    return stat.S_ISDIR(found.st_mode) and _is_private(found)


def _is_private(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022
