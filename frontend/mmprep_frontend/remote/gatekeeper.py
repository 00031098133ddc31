"""Who may connect: answers ZeroMQ's question, of each CURVE handshake, whether it knows the client's key (ZAP, RFC 27).

The public keys of clients are files of one directory, which is looked at again and again: a key that is put there lets its
owner in within a second, and one that is removed ends the connections that were made with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any, Final

import zmq

from mmprep.remote.curve import PUBLIC_SUFFIX, read_clients
from mmprep.wire.sockets import Pump

#: The domain of the door's socket; libzmq asks about no others here.
DOMAIN: Final = "mmprep"
_ENDPOINT: Final = "inproc://zeromq.zap.01"
_VERSION: Final = b"1.0"
#: Seconds for which the keys are remembered.
_REMEMBERED: Final = 1.0
#: identity, delimiter, version, request id, domain, address, identity of the peer, mechanism, the client's key
_FRAMES: Final = 9

_log = logging.getLogger("mmprep.remote")


class Gatekeeper:
    """Lets in whose public key is in a directory. To be made before the door's socket is bound.

    Parameters
    ----------
    directory:
        With the public keys of clients.
    """

    def __init__(self, context: zmq.Context[Any], directory: Path) -> None:
        self._directory = directory
        #: Names by keys. The key is part of a name: another key under the same one is another one's.
        self._users: dict[bytes, str] = {}
        self._known: frozenset[str] = frozenset()
        self._wrong: list[str] = []
        self._seen: list[tuple[str, int, int, int]] | None = None
        self._read_at = float("-inf")
        socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.bind(_ENDPOINT)
        self._pump = Pump(socket, self._asked)

    def close(self) -> None:
        """Close the socket."""
        self._pump.close()

    def knows(self, user: str) -> bool:
        """Whether the key of a user, as named by :meth:`_asked`, still lets in."""
        self._look()
        return user in self._known

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._read_at < _REMEMBERED:
            return
        self._read_at = now
        try:
            files = self._files()
            if files == self._seen:
                return
            clients, wrong = read_clients(self._directory)
        except (FileNotFoundError, NotADirectoryError):
            files, clients, wrong = [], {}, ["the directory, which is gone"]
        except OSError as error:  # as of a process without free descriptors: what was known stays
            _log.error("--curve-clients-dir cannot be read: %s", error.strerror)
            return
        self._seen = files
        if wrong != self._wrong:
            self._wrong = wrong
            _log.warning("--curve-clients-dir: no public key in %s", ", ".join(wrong))
        self._users = {key: f"{name}:{key.hex()}" for key, name in clients.items()}
        self._known = frozenset(self._users.values())

    def _files(self) -> list[tuple[str, int, int, int]]:
        """Return what tells whether a file has changed, of each; raises OSError where the directory cannot be read."""
        found = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.endswith(PUBLIC_SUFFIX):
                    with contextlib.suppress(FileNotFoundError):  # gone meanwhile, or a link to nothing
                        status = entry.stat()
                        found.append((entry.name, status.st_mtime_ns, status.st_ino, status.st_size))
        return sorted(found)

    def _asked(self, frames: list[bytes]) -> None:
        if len(frames) != _FRAMES or frames[2] != _VERSION or frames[7] != b"CURVE":
            self._answer(frames, b"400", b"only CURVE is spoken here", "")
            return
        self._look()
        user = self._users.get(frames[8])
        if user is None:
            self._answer(frames, b"400", b"the key is not known", "")
        else:
            self._answer(frames, b"200", b"", user)

    def _answer(self, frames: list[bytes], status: bytes, text: bytes, user: str) -> None:
        if len(frames) > 3:
            self._pump.send([frames[0], b"", _VERSION, frames[3], status, text, user.encode(), b""])
