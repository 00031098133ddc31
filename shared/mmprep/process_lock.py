"""Locks that prove that a process lives: the kernel releases them when it ends, however it ends.

A lock is a POSIX record lock (``fcntl(F_SETLK)``) on a file. Record locks belong to a process and are not inherited, so
a forked child never keeps a dead parent's lock; ``flock`` locks belong to the open file and would be kept.

WARNING: closing *any* descriptor of the file in the process that holds the lock drops it. Lock files are therefore opened
by this module only: never read one, copy one, or list a directory by opening what is in it. :func:`holder` is safe in the
holder itself because it looks into a table of the locks held here before it opens anything.

WARNING: F_GETLK never reports a lock of the asking process; the same table answers for it. It keeps a second lock on the
same file in the same process from being granted, too, which the kernel would allow.

WARNING: a holder in another pid namespace (another container) has no number here, and :func:`holder` answers 0; one in a
child namespace has another number here than it has itself. Ask ``holder(path) is not None``, never ``if holder(path)``, and
compare no numbers.

Lock files may be removed by whoever holds their lock. A process that opened the file before and locks it after that has
a lock on a file without a name; :meth:`ProcessLock.acquire` notices and tries again with the new file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

#: ``struct flock`` of 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")

#: The locks that this process holds, by device and inode of their files.
_held: dict[tuple[int, int], ProcessLock] = {}
#: Opening, locking and closing must not interleave: a close in one thread would drop the lock of another.
_guard = threading.Lock()


def _forget() -> None:
    """Start a forked child without locks, as the kernel does; closing its descriptors leaves the parent's lock alone."""
    global _guard  # noqa: PLW0603 - the parent's may be taken by a thread that the child does not have
    _guard = threading.Lock()
    for lock in list(_held.values()):
        lock.release()


os.register_at_fork(after_in_child=_forget)


class ProcessLock:
    """A lock that lives as long as this process, or until :meth:`release`.

    Parameters
    ----------
    path:
        The lock file; made with mode 0600 if it does not exist, and left behind when the lock is released.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._fd = -1
        self._key: tuple[int, int] | None = None

    @property
    def held(self) -> bool:
        """Whether this process holds the lock through this object; false in a forked child."""
        return self._key is not None and _held.get(self._key) is self

    def acquire(self) -> bool:
        """Take the lock if it is free, without waiting.

        Returns
        -------
        bool
            False where another process, or another lock object of this process, holds it.

        Raises
        ------
        OSError
            The file cannot be opened or locked.
        """
        with _guard:
            while not self.held:
                if _identity(self.path) in _held:
                    return False
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                _give_to_owner(fd, self.path.parent)
                key = _file_key(os.fstat(fd))
                try:
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(fd)
                    return False
                except BaseException:
                    os.close(fd)
                    raise
                if _identity(self.path) != key:
                    os.close(fd)
                    continue
                self._fd, self._key = fd, key
                _held[key] = self
            return True

    def note(self, data: bytes) -> None:
        """Write ``data`` into the file, for :func:`noted`; the lock is held."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)

    def release(self) -> None:
        """Let the lock go; does nothing where it is not held. The file stays."""
        with _guard:
            fd, self._fd = self._fd, -1
            if self._key is not None and _held.get(self._key) is self:
                del _held[self._key]
            self._key = None
            if fd >= 0:
                os.close(fd)

    def remove(self) -> None:
        """Remove the file and let the lock go, in this order: nobody can be granted the removed file.

        Raises
        ------
        RuntimeError
            The lock is not held.
        """
        if not self.held:
            raise RuntimeError("only the holder of a lock may remove its file")
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<ProcessLock {self.path.name} {'held' if self.held else 'not held'}>"


def holder(path: Path | str) -> int | None:
    """Return the pid of the process that holds the lock at ``path``, without taking it.

    Returns
    -------
    int or None
        ``None`` where the lock is free or the file missing; 0 where the holder has no number here, as one in another
        container, or where the file is not this user's to open.

    Raises
    ------
    OSError
        The file cannot be opened.
    """
    with _guard:
        if _identity(Path(path)) in _held:
            return os.getpid()
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except PermissionError:  # whoever made it can be asked nothing; better to wait for him than to forget him
            return 0
        try:
            question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, question))
        finally:
            os.close(fd)
    return None if kind == fcntl.F_UNLCK else int(pid)


def noted(path: Path | str, most: int) -> bytes:
    """Return up to ``most`` bytes of what the holder of another process's lock has noted in its file.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    with _guard:
        if _identity(Path(path)) in _held:
            raise ValueError("the lock is this process's own, and closing its file would end it")
        with Path(path).open("rb") as file:
            return file.read(most)


def _give_to_owner(fd: int, directory: Path) -> None:
    """Let the owner of a directory look at a lock file that root made in it: the service runs as that user."""
    owner = directory.stat()
    if os.geteuid() == 0 and os.fstat(fd).st_uid != owner.st_uid:
        os.fchown(fd, owner.st_uid, owner.st_gid)


def _file_key(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        return _file_key(path.lstat())
    except FileNotFoundError:
        return None
