"""CURVE keys: in files, one key a file, in ZeroMQ's Z85 form of 40 characters.

The secret key stays with its owner: ``NAME.key``, readable by its owner alone. The public key is for the other side:
``NAME.pub``. The service lets in whoever has the secret key to one of the public keys in its directory of clients; the
name of that file is the client's name. Each side needs the other's public key and its own secret key, of which its own
public key follows.

WARNING: keys never stand on a command line, in an environment or in a log, where others can read them.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from pathlib import Path
from typing import Final, NamedTuple

import zmq
from zmq.utils import z85

from mmprep.errors import InvalidRequest, StartupError
from mmprep.remote.endpoint import TcpEndpoint

KEY_SUFFIX: Final = ".key"
PUBLIC_SUFFIX: Final = ".pub"
#: Clients of one service.
MOST_CLIENTS: Final = 1_000

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_LENGTH: Final = 40
_LARGEST_FILE: Final = 1024
_OTHERS: Final = stat.S_IRWXO


def make_pair(directory: Path, name: str) -> tuple[Path, Path]:
    """Make a new pair of keys in a directory, which is made where it is not there; return the secret key's file and the public one's.

    Raises
    ------
    StartupError
        The name is none, a file of the pair exists, or it cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise StartupError("a key's name has 1 to 64 letters, digits, '_', '.' and '-'")
    public, secret = zmq.curve_keypair()
    files = directory / f"{name}{KEY_SUFFIX}", directory / f"{name}{PUBLIC_SUFFIX}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if files[1].exists():
            raise FileExistsError(f"{files[1]} exists")
        for path, mode, key in ((files[0], 0o600, secret), (files[1], 0o644, public)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(key + b"\n")
    except FileExistsError as error:
        raise StartupError(f"{error.filename or files[1]} exists already; give another name, or remove it") from None
    except OSError as error:
        raise StartupError(f"{directory}: no key can be written there ({error.strerror})") from None
    return files


def read_secret(path: Path, option: str) -> tuple[bytes, bytes]:
    """Return the public and the secret key of a secret key's file, each 40 bytes.

    Raises
    ------
    StartupError
        The file cannot be read, other users may read it, or it holds no key.
    """
    key = _read(path, option)
    if stat.S_IMODE(path.stat().st_mode) & _OTHERS:
        raise StartupError(f"{option}: every user may use {path}, which holds a secret key; run `chmod o= {path}`")
    return bytes(zmq.curve_public(key)), key


def read_public(path: Path, option: str) -> bytes:
    """Return the key of a public key's file, 40 bytes; raises StartupError."""
    return _read(path, option)


def check_service_keys(
    endpoint: TcpEndpoint | None, key_file: Path | None, clients_dir: Path | None, *, allow_plain: bool
) -> None:
    """Check what a service is told about keys, before it starts.

    Raises
    ------
    StartupError
        The options do not go together, a file is wrong, or others than processes of this host could connect without a key.
    """
    if endpoint is None:
        given = {"--curve-key-file": key_file, "--curve-clients-dir": clients_dir, "--allow-plain-remote": allow_plain}
        for option, value in given.items():
            if value:
                raise StartupError(f"{option}: it is for backends on other hosts; give --remote-endpoint too")
        return
    if key_file is not None or clients_dir is not None:
        _check_files(key_file, clients_dir, allow_plain=allow_plain)
    elif not (endpoint.is_loopback or allow_plain):
        raise StartupError(
            f"--remote-endpoint {endpoint}: other hosts can connect there, and without keys everybody may; give "
            "--curve-key-file and --curve-clients-dir (make keys with: mmprep keys), or --allow-plain-remote"
        )


def _check_files(key_file: Path | None, clients_dir: Path | None, *, allow_plain: bool) -> None:
    if key_file is None:
        raise StartupError("--curve-key-file: give it too; it is what encrypts")
    if clients_dir is None:
        raise StartupError("--curve-clients-dir: give it too; without it nobody could be let in")
    if allow_plain:
        raise StartupError("--allow-plain-remote: leave it out; there are keys")
    read_secret(key_file, "--curve-key-file")
    if not clients_dir.is_dir():
        raise StartupError(f"--curve-clients-dir: {clients_dir} is no directory")
    clients = sorted(clients_dir.glob(f"*{PUBLIC_SUFFIX}"))
    if len(clients) > MOST_CLIENTS:
        raise StartupError(f"--curve-clients-dir: {clients_dir} has more than {MOST_CLIENTS:,} keys")
    for path in clients:
        read_public(path, "--curve-clients-dir")


class RemoteKeys(NamedTuple):
    """What a backend proves by who it is, and knows the service by.

    Attributes
    ----------
    public, secret: the backend's own keys; empty: none.
    server: the service's public key; empty: none.
    allow_plain: it may go without.
    """

    public: bytes
    secret: bytes
    server: bytes
    allow_plain: bool

    @classmethod
    def read(cls, own: Path | str | None, server: Path | str | None, *, allow_plain: bool) -> RemoteKeys:
        """Return the keys in two files, of which there are both or none.

        Raises
        ------
        InvalidRequest
            A file holds no key, or one of the two is missing.
        """
        if (own is None) != (server is None):
            raise InvalidRequest("give both, curve_key_file and curve_server_key_file", param="curve_key_file")
        if own is None or server is None:
            return cls(b"", b"", b"", allow_plain)
        if allow_plain:
            raise InvalidRequest("allow_plain is for connections without keys; leave one out", param="allow_plain")
        try:
            public, secret = read_secret(Path(own), "curve_key_file")
            return cls(public, secret, read_public(Path(server), "curve_server_key_file"), allow_plain)
        except StartupError as error:
            raise InvalidRequest(error.message) from None

    @property
    def given(self) -> bool:
        """Whether there are keys."""
        return bool(self.secret)

    def check(self, endpoint: TcpEndpoint) -> None:
        """Raise InvalidRequest where a connection to ``endpoint`` would be without keys and must not."""
        if not (self.given or self.allow_plain or endpoint.is_loopback):
            raise InvalidRequest(
                "a connection to another host needs keys: give curve_key_file and curve_server_key_file",
                param="endpoint",
            )

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Let a socket that was not connected yet use the keys."""
        if self.given:
            socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = (
                self.public,
                self.secret,
                self.server,
            )


def read_clients(directory: Path) -> tuple[dict[bytes, str], list[str]]:
    """Return the names of clients by their public keys, each 32 bytes, and the names of files that hold no key.

    A file that is gone meanwhile or is wrong lets nobody in, and keeps nobody else out.

    Raises
    ------
    OSError
        The directory cannot be read.
    """
    clients: dict[bytes, str] = {}
    wrong = []
    for path in sorted(directory.iterdir()):
        name = path.name.removesuffix(PUBLIC_SUFFIX)
        if name == path.name or len(clients) >= MOST_CLIENTS:
            continue
        try:
            key = _read(path, "clients")
        except StartupError:
            wrong.append(path.name)
            continue
        clients.setdefault(z85.decode(key), name)
    return clients, wrong


def _read(path: Path, option: str) -> bytes:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_FILE:
            raise StartupError(f"{option}: {path} is no file of a key")
        key = path.read_bytes().strip()
    except OSError as error:
        raise StartupError(f"{option}: {path} cannot be read ({error.strerror})") from None
    if not _is_key(key):
        raise StartupError(f"{option}: {path} holds no key of {_LENGTH} characters; make one with: mmprep keys")
    return key


def _is_key(text: bytes) -> bool:
    if len(text) != _LENGTH:
        return False
    try:
        z85.decode(text)
    except (KeyError, struct.error):
        return False
    return True
