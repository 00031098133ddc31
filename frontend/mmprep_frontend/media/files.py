"""Media in files below one directory of this machine, ``--allowed-local-media-path``.

What a URL names is compared with the directory's name first, component by component: whatever lies elsewhere is refused
without touching the file system. The rest is walked from the directory's descriptor, one component at a time, and no
component may be a symbolic link. So nothing that changes meanwhile leads out, and there is no check that could be
overtaken: what was opened is what is looked at. Only regular files are opened for reading; a FIFO or a device never is.

Every failure below the directory has the same message, so that a URL cannot ask what lies there.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from mmprep.errors import Busy, FetchError, Forbidden, TooLarge
from mmprep_frontend.media.allowance import Hold
from mmprep_frontend.media.memory import Loaded, MediaMemory
from mmprep_frontend.media.sources import FileSource

#: Bytes of one read.
_PIECE: Final = 1 << 20
_THREADS: Final = 4
_NONE_LEFT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_UNREADABLE: Final = (
    "there is no file that this service may read; it has to be a regular one, with no symbolic link on the way"
)


class LocalFiles:
    """Reads files below one directory, in threads of their own: a file system that hangs holds up nothing but files.

    Parameters
    ----------
    root:
        Absolute path of the directory. Links in it are followed: it is the operator's. URLs may name it as it is given,
        or as it is without links.
    max_bytes:
        Largest file, in bytes, ``--max-media-size``.
    memory:
        What all media may take.
    """

    def __init__(self, root: str, max_bytes: int, memory: MediaMemory) -> None:
        self._root = os.path.realpath(root)
        self._prefixes = tuple(dict.fromkeys(map(_components, (os.path.normpath(root), self._root))))
        self._max_bytes = max_bytes
        self._memory = memory
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="files")

    def close(self) -> None:
        """Give the threads back."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def beneath(self, source: FileSource) -> tuple[bytes, ...]:
        """Return the components of ``source`` below the directory. Pure: the file system is not asked.

        Raises
        ------
        mmprep.errors.Forbidden
            It lies elsewhere.
        """
        for prefix in self._prefixes:
            count = len(prefix)
            if len(source.components) > count and source.components[:count] == prefix:
                return source.components[count:]
        raise Forbidden(
            "the file is not below the directory that this service reads from (--allowed-local-media-path)",
            param=source.param,
        )

    async def read(self, source: FileSource, *, hold: Hold | None = None) -> Loaded:
        """Return the bytes of the file.

        Parameters
        ----------
        hold:
            Told the file's size before it is read, on a thread; what it raises is raised here.

        Raises
        ------
        mmprep.errors.Forbidden
            It does not lie below the directory.
        mmprep.errors.FetchError
            There is none, it is empty, or it is not a regular file that is reached without links.
        mmprep.errors.TooLarge
            More than ``max_bytes``.
        mmprep.errors.Busy
            The process has no descriptors left, or media take too much memory.
        """
        names = self.beneath(source)
        reading = asyncio.get_running_loop().run_in_executor(self._threads, self._read, names, source.param, hold)
        try:
            return await reading
        except Busy as error:
            raise error.at(source.param) if source.param is not None else error from None

    def _read(self, names: Sequence[bytes], param: str | None, hold: Hold | None) -> Loaded:
        try:
            file = _open_beneath(self._root, names)
            try:
                return self._content(file, param, hold)
            finally:
                os.close(file)
        except OSError as error:
            if error.errno in _NONE_LEFT:
                raise Busy("too many files are open at the moment; try again", retry_after=1.0) from None
            raise FetchError(_UNREADABLE, param=param) from None

    def _content(self, file: int, param: str | None, hold: Hold | None) -> Loaded:
        size = os.fstat(file).st_size
        if size > self._max_bytes:
            raise self._too_large(param)
        if hold is not None:
            hold(size)
        with self._memory.pieces() as pieces:
            while piece := os.read(file, _PIECE):
                if pieces.nbytes + len(piece) > self._max_bytes:  # it may have grown since
                    raise self._too_large(param)
                pieces.add(piece)
            if not pieces.nbytes:
                raise FetchError("the file is empty", param=param)
            return pieces.joined()

    def _too_large(self, param: str | None) -> TooLarge:
        return TooLarge(
            f"the medium is larger than {self._max_bytes:,} bytes, this service's limit (--max-media-size)", param=param
        )


def _open_beneath(root: str, names: Sequence[bytes]) -> int:
    """Return a descriptor of the regular file at ``names`` below ``root``."""
    here = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names[:-1]:
            below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = below
        # Not opened for reading yet: that alone would wake up a FIFO's writer or rewind a tape.
        found = os.open(names[-1], os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
    finally:
        os.close(here)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        # The very file that was looked at, whatever its name leads to by now.
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(found)


def _components(path: str) -> tuple[bytes, ...]:
    return tuple(filter(None, os.fsencode(path).split(b"/")))
