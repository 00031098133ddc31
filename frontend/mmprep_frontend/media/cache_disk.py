"""The disk cache's files: bodies beside an index, in a directory that several processes share. Blocking.

A body is written to a partial file, synced and renamed, and then named by the index; its name is never used twice, so a
row and a file can never be of different media. Who writes holds a lock on the file, which the kernel releases when the
process dies: files that are in no index and whose lock is free are nobody's, and are swept.

Whatever the disk does is an exception here and a miss for the caller. A broken index is thrown away and begun anew; the
bodies that it knew are swept later.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mmprep.digest import Hasher
from mmprep_frontend.media.cache_index import Change, Index, Kept
from mmprep_frontend.media.memory import Share
from mmprep_frontend.media.storing import Validators

#: Beneath the directory that the operator names; another layout gets another name.
HOME: Final = "mmprep-media-1"
#: In that: the index, and the directory of the bodies.
INDEX: Final = "index.db"
BODIES: Final = "bodies"
#: Seconds to wait for another process at the index.
_BUSY: Final = 0.25
#: Seconds to wait for another that opens the index, which makes it where there is none.
_OPENING: Final = 1.0
_PAUSE: Final = 0.005
_RETRY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_ERROR}


class Damaged(Exception):
    """A body is not what the index says: gone, cut, or changed."""

    def __init__(self, name: str) -> None:
        super().__init__("a medium in the cache is damaged")
        self.name = name


@dataclass(frozen=True, slots=True)
class Found:
    """A medium from the disk, whose bytes are those that were written.

    Attributes
    ----------
    fresh: whether it may be used without asking its host.
    share: counts the bytes.
    seconds: that reading and checking them took.
    """

    kept: Kept
    data: bytes
    fresh: bool
    share: Share
    seconds: float


class CacheDisk:
    """What lies on the disk. :meth:`find` and :meth:`look_up` may be called from any thread, all else from one at a
    time.

    Parameters
    ----------
    directory:
        As the operator names it; what is in it beside the cache's own directory is left alone.
    max_bytes, ttl:
        As of :class:`~mmprep_frontend.media.cache_index.Index`.
    clock:
        Seconds of the wall clock, which survives restarts.

    Attributes
    ----------
    home: the cache's own directory; it is there once the index was used.
    now: the clock.
    """

    def __init__(self, directory: Path, *, max_bytes: int, ttl: float, clock: Callable[[], float] = time.time) -> None:
        self.home = directory / HOME
        self._bodies = self.home / BODIES
        self._ttl = ttl
        self.now = clock
        self._reading, self._writing = (_Connection(self.home, max_bytes=max_bytes, ttl=ttl) for _ in range(2))

    def find(self, key: bytes, *, max_bytes: int, share: Share) -> Found | None:
        """Return the medium under ``key``, unless it is larger than ``max_bytes``; ``share`` grows by its bytes before.

        Raises
        ------
        Damaged
            Its body is not what it was; to be dropped.
        mmprep.errors.Busy
            There is no memory for it.
        """
        with self._reading.use() as index:
            kept = index.find(key)
        if kept is None or kept.nbytes > max_bytes:
            return None
        share.grow(kept.nbytes)
        started = time.monotonic()
        data = self._read(kept)
        if data is None or Hasher(kept.hash_name).content_digest(data) != kept.digest:
            raise Damaged(kept.name)
        return Found(kept, data, kept.is_fresh(self.now(), self._ttl), share, time.monotonic() - started)

    def look_up(self, key: bytes) -> Kept | None:
        """Return what the index says is under ``key``."""
        with self._reading.use() as index:
            return index.find(key)

    def keep(self, kept: Kept, data: bytes | memoryview, *, fetched: float) -> Change:
        """Keep a medium; its ``name``, ``written`` and ``used`` are given here."""
        now = self.now()
        with self._writing.use() as index:
            known = index.find(kept.key)
        if known is not None and fetched <= known.written <= now:
            return Change(False)
        name = f"{kept.key.hex()}-{secrets.token_hex(8)}"
        with self._written(name, data):
            now = self.now()
            named = replace(kept, name=name, nbytes=len(data), written=now, used=now)
            with self._writing.use() as index:
                change = index.put(named, fetched=fetched, now=now)
        self._unlink(change.gone)
        return change

    def touch(self, names: Iterable[str]) -> None:
        """Note that media were used."""
        with self._writing.use() as index:
            index.touch(names, self.now())

    def renew(self, name: str, validators: Validators, *, ask: bool) -> None:
        """Note that a medium has not changed."""
        with self._writing.use() as index:
            index.renew(name, validators, ask=ask, now=self.now())

    def drop(self, name: str) -> None:
        """Forget a medium."""
        with self._writing.use() as index:
            index.drop([name])
        self._unlink([name])

    def clear(self) -> list[Kept]:
        """Drop all media, and whatever else lies there; return the media."""
        with self._writing.use() as index:
            gone = index.clear()
        self._unlink(kept.name for kept in gone)
        self.sweep()
        return gone

    def sweep(self) -> int:
        """Drop what is of no use; return how many partial and strange files were there."""
        with self._writing.use() as index:
            dead = index.drop_dead(self.now())
            known = index.names()
        self._unlink(dead)
        with os.scandir(self._bodies) as entries:
            present = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
        swept = sum(self._sweep_one(name) for name in present - known)
        lost = [name for name in known - present if not os.path.lexists(self._bodies / name)]
        with self._writing.use() as index:
            index.drop(lost)
        return swept

    def close(self) -> None:
        """Let go of the index."""
        self._reading.close()
        self._writing.close()

    def _read(self, kept: Kept) -> bytes | None:
        try:
            # NONBLOCK: what lies there may be a pipe.
            fd = os.open(self._bodies / kept.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ELOOP, errno.ENXIO}:
                return None
            raise
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size != kept.nbytes:
                return None
            data = os.read(fd, kept.nbytes)
            return data if len(data) == kept.nbytes else None
        finally:
            os.close(fd)

    @contextmanager
    def _written(self, name: str, data: bytes | memoryview) -> Iterator[None]:
        """Write a body; an exception in the block removes it. The lock is held until the block ends."""
        body, partial = self._bodies / name, self._bodies / f"{name}.part"
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
            partial.rename(body)
            yield
        except BaseException:
            self._unlink([body.name, partial.name])
            raise
        finally:
            os.close(fd)

    def _sweep_one(self, name: str) -> bool:
        path = self._bodies / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in {errno.ELOOP, errno.ENXIO}:
                return False
            self._unlink([name])
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with self._writing.use() as index:
                if index.knows(name):
                    return False
            self._unlink([name])
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def _unlink(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError):
                (self._bodies / name).unlink()


class _Connection:
    """One connection to the index, opened when it is needed, and again when the index was replaced. Under a lock."""

    def __init__(self, home: Path, *, max_bytes: int, ttl: float) -> None:
        self._home = home
        self._path = home / INDEX
        self._max_bytes = max_bytes
        self._ttl = ttl
        self._lock = threading.Lock()
        self._open: tuple[sqlite3.Connection, Index, tuple[int, int]] | None = None

    @contextmanager
    def use(self) -> Iterator[Index]:
        with self._lock:
            if self._open is not None and self._identity() != self._open[2]:
                self._close()
            if self._open is None:
                self._open = self._connect()
            try:
                yield self._open[1]
            except sqlite3.Error as error:
                code = _code(error)
                if code not in _RETRY:
                    identity = self._open[2]
                    self._close()
                    if code in _BROKEN:
                        self._begin_anew(identity)
                raise

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._open is not None:
            connection = self._open[0]
            self._open = None
            with suppress(sqlite3.Error):
                connection.close()

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _connect(self) -> tuple[sqlite3.Connection, Index, tuple[int, int]]:
        _make_home(self._home)
        with self._alone():
            connection = sqlite3.connect(self._path, timeout=_BUSY, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                # The last commits may be lost with the machine, not the index: their bodies are swept then.
                connection.execute("PRAGMA synchronous = NORMAL")
                index = Index(connection, max_bytes=self._max_bytes, ttl=self._ttl)
                index.prepare()
                identity = self._identity()
                if identity is None:
                    raise FileNotFoundError(errno.ENOENT, "the index is gone")
            except BaseException as error:
                connection.close()
                if isinstance(error, sqlite3.Error) and _code(error) in _BROKEN:
                    self._remove()
                raise
            return connection, index, identity

    def _begin_anew(self, broken: tuple[int, int]) -> None:
        with suppress(OSError), self._alone():
            if self._identity() == broken:
                self._remove()

    def _remove(self) -> None:
        for suffix in ("-wal", "-shm", ""):
            with suppress(FileNotFoundError):
                Path(f"{self._path}{suffix}").unlink()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of those who open or remove the index; raises BlockingIOError where another does not let go."""
        fd = os.open(self._home / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            patience = time.monotonic() + _OPENING
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > patience:
                        raise
                    time.sleep(_PAUSE)
            yield
        finally:
            os.close(fd)


def _make_home(home: Path) -> None:
    """Make the cache's directory; raises OSError where somebody else could put something into it."""
    (home / BODIES).mkdir(mode=0o700, parents=True, exist_ok=True)
    for directory in (home, home / BODIES):
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "the cache's directory is not of this user")
        if stat.S_IMODE(found.st_mode) & 0o077:
            directory.chmod(0o700)


def _code(error: sqlite3.Error) -> int:
    """Return SQLite's primary code; -1 where the error is not SQLite's."""
    return int(getattr(error, "sqlite_errorcode", -1)) & 0xFF
