"""POSIX shared-memory segments: made whole or not at all, mapped once, unlinked by their owner alone.

Theory of operation: a segment is a file in ``/dev/shm``. Its creator reserves every page with ``posix_fallocate`` and
touches it, so that a memory file system that is too small is an error at the start and never a SIGBUS under load, and
so that the first copy into a page runs at the speed of all later ones. Readers map the whole segment once.

WARNING: ``multiprocessing.shared_memory`` must not be used beside this: its resource tracker unlinks, when a process
that merely attached ends, a segment that others still use.

WARNING: closing does not wait for anybody. Views made from :attr:`Segment.buffer` keep the mapping alive until the last
of them is gone; that is what makes it safe to close while an engine still reads, and it means that memory is returned
to the system only then.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Self

import posix_ipc

from mmprep.errors import ServiceUnavailable, StaleAddress, StartupError
from mmprep.sizes import format_size

#: Where Linux keeps POSIX segments, each a file.
SHM_DIRECTORY = Path("/dev/shm")  # noqa: S108 - not a temporary file, the place where shm_open(3) looks

#: ``madvise`` advice of Linux 5.14 that faults all pages in, writable; Python has no name for it yet.
_MADV_POPULATE_WRITE = 23

_NAME = re.compile(r"mmprep-[0-9]+-([0-9a-f]{8})-[0-9a-f]{8}", re.ASCII)


def segment_name(runtime_id: str, epoch: bytes) -> str:
    """Return the name of a segment: ``/mmprep-<uid>-<runtime id>-<start of the epoch>``.

    Parameters
    ----------
    runtime_id:
        Eight hexadecimal digits that stand for the runtime directory (:attr:`mmprep.runtime.RuntimeDir.runtime_id`).
    epoch:
        At least four random bytes, new for every segment.
    """
    return f"/mmprep-{os.geteuid()}-{runtime_id}-{epoch[:4].hex()}"


def sibling_name(name: str, epoch: bytes) -> str:
    """Return the name of the segment of ``epoch`` in the runtime directory to which the segment ``name`` belongs."""
    return f"{name.rpartition('-')[0]}-{epoch[:4].hex()}"


def segments_of(runtime_id: str) -> list[str]:
    """Return the names of this user's segments that exist and belong to the runtime directory ``runtime_id``."""
    prefix = f"mmprep-{os.geteuid()}-{runtime_id}-"
    try:
        entries = [entry.name for entry in SHM_DIRECTORY.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(f"/{entry}" for entry in entries if entry.startswith(prefix) and _NAME.fullmatch(entry))


class Segment:
    """One mapped segment; made by :meth:`create` or :meth:`attach`.

    Usable as a context manager, which closes it and does not unlink it.

    Attributes
    ----------
    name: as ``/mmprep-0-5f3a9c01-7be2d144``.
    size: bytes.
    """

    def __init__(self, name: str, mapping: mmap.mmap) -> None:
        self.name = name
        self.size = len(mapping)
        self._mapping: mmap.mmap | None = mapping
        self._buffer = memoryview(mapping)

    @classmethod
    def create(cls, name: str, size: int) -> Segment:
        """Make a segment, reserve all of its memory and touch it. Takes about 0.7 ms a MiB.

        Parameters
        ----------
        name:
            One that does not exist, from :func:`segment_name`.
        size:
            Bytes, more than 0.

        Raises
        ------
        mmprep.errors.StartupError
            The memory is not there, or the name exists. Nothing is left behind.
        """
        _check_space(size)
        try:
            shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
        except posix_ipc.ExistentialError:
            raise StartupError(f"the shared-memory segment {name} exists already; another service uses it") from None
        except OSError as error:
            raise _no_memory(size, error) from error
        try:
            os.posix_fallocate(shm.fd, 0, size)
            mapping = mmap.mmap(shm.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            _touch(mapping)
        except OSError as error:
            posix_ipc.unlink_shared_memory(name)
            raise _no_memory(size, error) from error
        except BaseException:
            posix_ipc.unlink_shared_memory(name)
            raise
        finally:
            shm.close_fd()
        return cls(name, mapping)

    @classmethod
    def attach(cls, name: str, *, writable: bool = False) -> Segment:
        """Map an existing segment, all of it.

        Parameters
        ----------
        name:
            As the creator gave it.
        writable:
            False maps the pages read-only: a stray write is then an error here, not another reader's wrong pixels.

        Raises
        ------
        mmprep.errors.StaleAddress
            There is no such segment (any more), or its creator has not finished it.
        mmprep.errors.ServiceUnavailable
            It is another user's.
        """
        try:
            shm = posix_ipc.SharedMemory(name, read_only=not writable)
        except posix_ipc.ExistentialError:
            raise StaleAddress(
                "the shared-memory segment is gone: the service has restarted; ask for the item again"
            ) from None
        except (posix_ipc.PermissionsError, PermissionError):
            raise ServiceUnavailable(
                "the shared-memory segment belongs to another user; run this process as the user of the service"
            ) from None
        try:
            size = os.fstat(shm.fd).st_size
            if size == 0:
                raise StaleAddress("the shared-memory segment is not ready yet; ask again")
            protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
            mapping = mmap.mmap(shm.fd, size, mmap.MAP_SHARED, protection)
        finally:
            shm.close_fd()
        return cls(name, mapping)

    @property
    def buffer(self) -> memoryview:
        """All bytes of the segment. Slices and arrays made of it may outlive :meth:`close`.

        Raises
        ------
        ValueError
            The segment was closed.
        """
        if self._mapping is None:
            raise ValueError("the segment is closed")
        return self._buffer

    def close(self) -> None:
        """Let go of the mapping: at once, or when the last view made from it goes. Idempotent, never fails."""
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        # Each raises BufferError while something made of it lives on; the mapping then goes with the last view.
        with contextlib.suppress(BufferError):
            self._buffer.release()
        self._buffer = memoryview(b"")
        with contextlib.suppress(BufferError):
            mapping.close()

    def unlink(self) -> None:
        """Remove the name: nobody can attach any more, who has attached reads on. Idempotent."""
        unlink(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._mapping is None else ""
        return f"<Segment {self.name} {format_size(self.size)}{state}>"


def unlink(name: str) -> None:
    """Remove the segment's name, if it exists."""
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(name)


def free_space() -> tuple[int, int] | None:
    """Return the free and total bytes of the shared-memory file system, or ``None`` where it has no limit.

    Raises
    ------
    mmprep.errors.StartupError
        There is no such file system.
    """
    try:
        stat = os.statvfs(SHM_DIRECTORY)
    except FileNotFoundError:
        raise StartupError("this machine has no /dev/shm; mount a tmpfs there") from None
    if stat.f_blocks == 0:
        return None
    return stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize


def _check_space(size: int) -> None:
    space = free_space()
    if space is not None and size > space[0]:
        raise _no_memory(size, None)


def _no_memory(size: int, cause: OSError | None) -> StartupError:
    if cause is not None and cause.errno not in {errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFAULT}:
        return StartupError(f"a shared-memory segment of {format_size(size)} cannot be made: {cause.strerror}")
    space = free_space()
    if space is None:
        return StartupError(f"the machine has no {format_size(size)} of memory left; give a smaller --cache-size")
    free, total = space
    return StartupError(
        f"shared memory is too small: {format_size(size)} are needed, /dev/shm has {format_size(free)} free of {format_size(total)}. "
        "Give a --cache-size that fits, or make the mount larger: mount -o remount,size=…, in Docker --shm-size, "
        "in Kubernetes an emptyDir with medium Memory on /dev/shm"
    )


def _touch(mapping: mmap.mmap) -> None:
    """Fault in every page of a new segment, which is all zeros."""
    try:
        mapping.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pages = -(-len(mapping) // mmap.PAGESIZE)
        with memoryview(mapping) as view:
            view[:: mmap.PAGESIZE] = bytes(pages)
