"""The runtime directory: where the processes of one service meet, and what belongs to it.

It holds the sockets, the service lock, and ``locks/`` with one lock file for each process that must be known to live.
One service owns one directory: the supervisor holds ``service.lock`` from before the first socket is bound (binding an
ipc path that a live socket holds *succeeds*, and steals it) until after the last one is closed.

Lock files in ``locks/`` are taken by whoever they stand for: lanes, writer, and backends, which are other programs and
outlive the service. Nothing here ever removes the lock file of a process that lives.

Segments are tied to the directory by :attr:`RuntimeDir.runtime_id`, which is part of their names. It is made of the
directory's device and inode, not of its path: two containers that share /dev/shm use the same path for two directories,
and neither must remove the other's segments.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

from mmprep import segment
from mmprep.errors import InvalidRequest, ServiceUnavailable, StartupError
from mmprep.process_lock import ProcessLock, holder

#: How a program names a service: ``ipc://`` and its runtime directory, or the path of that alone.
Endpoint: TypeAlias = str | os.PathLike[str]

#: Bytes of the longest path of a unix socket on Linux: ``sun_path`` has 108, and one ends the string.
MAX_SOCKET_PATH = 107

#: One more than the largest number of a frontend; bounds the longest socket name.
MAX_FRONTENDS = 10_000

_FIXED_SOCKETS = ("writer.sock", "writer-bulk.sock", "tensors.sock", "lanes.sock", "lanes-bulk.sock", "supervisor.sock")
_LONGEST_SOCKET = f"frontend-{MAX_FRONTENDS - 1}.sock"
_FRONTEND_SOCKET = re.compile(r"frontend-[0-9]{1,4}\.sock", re.ASCII)
_LOCK_FILE = re.compile(r"([a-z]+)-([A-Za-z0-9_.-]{1,64})\.lock", re.ASCII)
_ROLE = re.compile(r"[a-z]+", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_ENDPOINT = "the endpoint must be ipc:// and the absolute path of a runtime directory, as ipc:///run/user/0/mmprep"


class Holder(NamedTuple):
    """A living process that holds a lock of the directory; ``pid`` is 0 where it is in another pid namespace."""

    role: str
    id: str
    pid: int


class RuntimeDir:
    """The files of one service; made by :meth:`prepare` (a service) or :func:`parse_endpoint` (a client).

    Attributes
    ----------
    path: absolute.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self._service_lock = ProcessLock(self.path / "service.lock")
        self._made_here = False

    @classmethod
    def prepare(cls, path: Path | str | None = None) -> RuntimeDir:
        """Make the directory with mode 0700 unless it exists, and check that a service can use it.

        Parameters
        ----------
        path:
            The value of ``--runtime-dir``; ``None`` is :func:`default_path`.

        Raises
        ------
        mmprep.errors.StartupError
            It cannot be made, is another user's, can be written by others, or its path is too long for sockets.
        """
        runtime = cls(default_path() if path is None else path)
        runtime.check()
        try:
            runtime._made_here = not runtime.path.exists()
            runtime.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(runtime.path)
            (runtime.path / "locks").mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StartupError(
                f"--runtime-dir: {runtime.path} cannot be used ({error.strerror}); give a directory that this user may write"
            ) from error
        return runtime

    def check(self) -> None:
        """Check whether a service can use the directory or make it; changes nothing.

        Raises
        ------
        mmprep.errors.StartupError
            As :meth:`prepare`.
        """
        _check_length(self.path)
        try:
            if os.path.lexists(self.path):
                _check_owner(self.path)
                place = self.path
            else:
                place = next(parent for parent in self.path.parents if parent.exists())
        except OSError as error:
            raise StartupError(
                f"--runtime-dir: {self.path} cannot be used ({error.strerror}); give another one"
            ) from error
        if not os.access(place, os.W_OK | os.X_OK):
            raise StartupError(f"--runtime-dir: this user may not write in {place}; give a directory that it may write")

    def take(self) -> None:
        """Take the service lock, for as long as this process lives or until :meth:`clean` or :meth:`leave`.

        Raises
        ------
        mmprep.errors.StartupError
            Another service runs in this directory.
        """
        if self._service_lock.acquire():
            return
        pid = self.service_pid()
        if pid:
            raise StartupError(
                f"--runtime-dir: a service runs in {self.path} already (pid {pid}); stop it with `kill {pid}`, "
                "or give this one another --runtime-dir and --port"
            )
        raise StartupError(
            f"--runtime-dir: a service in another container runs in {self.path} already; give this one another --runtime-dir"
        )

    def leave(self) -> None:
        """Let the service lock go and leave every file where it is."""
        self._service_lock.release()

    def service_pid(self) -> int | None:
        """Return the pid of the service that runs here: ``None`` for no service, 0 for one in another pid namespace."""
        return holder(self._service_lock.path)

    @property
    def runtime_id(self) -> str:
        """Eight hexadecimal digits that stand for this directory in the names of its segments."""
        status = self.path.stat()
        return hashlib.sha256(f"{status.st_dev}:{status.st_ino}".encode()).hexdigest()[:8]

    @property
    def writer(self) -> str:
        """The endpoint of the writer's control socket."""
        return self._endpoint("writer.sock")

    @property
    def writer_bulk(self) -> str:
        """The endpoint of the writer's bulk socket: tensors and media."""
        return self._endpoint("writer-bulk.sock")

    @property
    def tensors(self) -> str:
        """The endpoint where frontends fetch tensors that travel inline from the writer."""
        return self._endpoint("tensors.sock")

    @property
    def lanes(self) -> str:
        """The endpoint where the writer talks to its lanes."""
        return self._endpoint("lanes.sock")

    @property
    def lanes_bulk(self) -> str:
        """The endpoint where lanes send the writer tensors that travel inline."""
        return self._endpoint("lanes-bulk.sock")

    @property
    def supervisor(self) -> str:
        """The endpoint of the supervisor: status, resets, draining."""
        return self._endpoint("supervisor.sock")

    def frontend(self, number: int) -> str:
        """Return the endpoint of the native socket of frontend ``number``.

        Raises
        ------
        ValueError
            Not in 0 … :data:`MAX_FRONTENDS` - 1.
        """
        if not 0 <= number < MAX_FRONTENDS:
            raise ValueError(f"there is no frontend {number}")
        return self._endpoint(f"frontend-{number}.sock")

    def frontends(self) -> list[str]:
        """Return the endpoints of the frontends whose sockets are there."""
        return [self._endpoint(path.name) for path in self._sockets() if _FRONTEND_SOCKET.fullmatch(path.name)]

    def _endpoint(self, name: str) -> str:
        return f"ipc://{self.path / name}"

    def lock_path(self, role: str, identifier: str) -> Path:
        """Return the path of the lock that proves that the process ``identifier`` lives.

        Parameters
        ----------
        role:
            Lower-case letters, as ``backend``, ``lane``, ``writer``.
        identifier:
            1 to 64 of ``A-Z a-z 0-9 _ . -``, unique within the role.

        Raises
        ------
        mmprep.errors.InvalidRequest
            The identifier has other characters or another length.
        """
        if not _ROLE.fullmatch(role):
            raise ValueError(f"{role!r} is not a role")
        if not _IDENTIFIER.fullmatch(identifier):
            raise InvalidRequest(f"the {role} id must be 1 to 64 characters of A-Z, a-z, 0-9, '_', '.', '-'")
        return self.path / "locks" / f"{role}-{identifier}.lock"

    def holders(self) -> list[Holder]:
        """Return the living processes that hold a lock in ``locks/``, by role and id."""
        found = []
        for path, role, identifier in self._lock_files():
            pid = holder(path)
            if pid is not None:
                found.append(Holder(role, identifier, pid))
        return found

    def remove_leftovers(self) -> list[str]:
        """Remove what a service that died here left: sockets, locks that nobody holds, segments of this directory.

        Call it after :meth:`take` and after the dead service's own processes are gone (:meth:`holders` names those
        that are not), before anything is bound.

        Returns
        -------
        list of str
            The names of what was removed, for the log.

        Raises
        ------
        RuntimeError
            The service lock is not held.
        """
        if not self._service_lock.held:
            raise RuntimeError("only the holder of the service lock may remove leftovers")
        removed = []
        for path in self._sockets():
            path.unlink(missing_ok=True)
            removed.append(path.name)
        for path, _, _ in list(self._lock_files()):
            lock = ProcessLock(path)
            if lock.acquire():
                lock.remove()
                removed.append(path.name)
        for name in segment.segments_of(self.runtime_id):
            segment.unlink(name)
            removed.append(name)
        return removed

    def clean(self) -> None:
        """Remove the service's files at a clean stop, the service lock last.

        Locks of living backends stay, and so does a directory that was there before :meth:`prepare`.

        Raises
        ------
        RuntimeError
            The service lock is not held.
        """
        self.remove_leftovers()
        with contextlib.suppress(OSError):  # not empty: the lock of a living backend is in it
            (self.path / "locks").rmdir()
        self._service_lock.remove()
        if self._made_here:
            with contextlib.suppress(OSError):  # not empty, as above, or a new service has started in it
                self.path.rmdir()

    def _sockets(self) -> list[Path]:
        found = []
        for entry in self.path.iterdir():
            known = entry.name in _FIXED_SOCKETS or _FRONTEND_SOCKET.fullmatch(entry.name)
            if known and stat.S_ISSOCK(entry.lstat().st_mode):
                found.append(entry)
        return sorted(found)

    def _lock_files(self) -> Iterator[tuple[Path, str, str]]:
        try:
            paths = sorted((self.path / "locks").iterdir())
        except FileNotFoundError:
            return
        for path in paths:
            match = _LOCK_FILE.fullmatch(path.name)
            if match:
                yield path, match[1], match[2]

    def __repr__(self) -> str:
        return f"<RuntimeDir {self.path}>"


def default_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the directory that is used where none is named.

    It is ``$XDG_RUNTIME_DIR/mmprep``, else ``/run/user/<uid>/mmprep``, else ``/tmp/mmprep-<uid>``: the first whose
    parent this user may write.
    """
    uid = os.geteuid()
    for parent in (environment.get("XDG_RUNTIME_DIR", ""), f"/run/user/{uid}"):
        if parent.startswith("/") and os.access(parent, os.W_OK | os.X_OK):
            return Path(parent) / "mmprep"
    return Path(f"/tmp/mmprep-{uid}")  # noqa: S108 - checked for its owner before use


def endpoint_text(endpoint: Endpoint) -> str:
    """Return an endpoint as text; raises InvalidRequest for what is neither a text nor a path."""
    if isinstance(endpoint, os.PathLike):
        endpoint = os.fspath(endpoint)
    if not isinstance(endpoint, str):
        raise InvalidRequest(_ENDPOINT, param="endpoint")
    return endpoint


def parse_endpoint(endpoint: Endpoint | None) -> RuntimeDir:
    """Return the runtime directory that a client's ``endpoint`` names. Makes nothing.

    Parameters
    ----------
    endpoint:
        ``ipc:///run/user/0/mmprep`` or the path alone, also as a :class:`~pathlib.Path`; ``None`` is :func:`default_path`.

    Raises
    ------
    mmprep.errors.InvalidRequest
        Neither ``ipc://`` and an absolute path nor a path.
    mmprep.errors.ServiceUnavailable
        There is no such directory, or it is another user's: no service of this user runs there.
    """
    endpoint = f"ipc://{default_path()}" if endpoint is None else endpoint_text(endpoint)
    path = endpoint.removeprefix("ipc://")
    if not path.startswith("/"):
        raise InvalidRequest(_ENDPOINT, param="endpoint")
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        status = None
    if status is None or not stat.S_ISDIR(status.st_mode):
        raise ServiceUnavailable(
            f"no service runs at {endpoint}; start one with: mmprep serve --runtime-dir {shlex.quote(path)}"
        )
    if status.st_uid != os.geteuid() and os.geteuid() != 0:
        raise ServiceUnavailable(f"the service at {endpoint} is another user's; run this process as that user")
    return RuntimeDir(path)


def _check_length(path: Path) -> None:
    length = len(os.fsencode(path / _LONGEST_SOCKET))
    if length > MAX_SOCKET_PATH:
        raise StartupError(
            f"--runtime-dir: the path is {length - MAX_SOCKET_PATH} bytes too long for the sockets in it; "
            f"give one of at most {MAX_SOCKET_PATH - len(_LONGEST_SOCKET) - 1} bytes, as /run/mmprep"
        )


def _check_owner(path: Path) -> None:
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise StartupError(f"--runtime-dir: {path} is not a directory; give the directory itself, no link to it")
    if status.st_uid != os.geteuid():
        raise StartupError(
            f"--runtime-dir: {path} belongs to user {status.st_uid}, this service runs as user {os.geteuid()}; give another one"
        )
    if status.st_mode & 0o022:
        raise StartupError(
            f"--runtime-dir: {path} can be written by other users; run `chmod 700 {shlex.quote(str(path))}` or give another one"
        )
