"""A process that stands for an engine: is given addresses, holds them for a while, and checks every byte it reads.

It takes one address a connection on a unix socket, ``{"picture": …, "address": …}`` and a newline, and answers ``taken`` or
``full``. Each is read in one way of several, some of them late or after the lease was let go: then an error is right, and
other bytes are not.
"""

from __future__ import annotations

import os
import queue
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mmprep.backend import Backend
from mmprep.chaos import events, pictures
from mmprep.chaos.asking import refused
from mmprep.chaos.pictures import Picture
from mmprep.errors import MmprepError
from mmprep.item import Item

_THREADS = 4
_WAITING = 3
_LONGEST_LINE = 64 * 1024
_LONGEST_HOLD = 2.5
_POLL = 0.2


class Orders(msgspec.Struct, forbid_unknown_fields=True):
    """What a backend is to do; ``lease_seconds`` are the service's."""

    name: str
    seed: int
    runtime_dir: str
    socket: str
    lease_seconds: float


class _Given(msgspec.Struct):
    picture: Picture
    address: dict[str, Any]


class Reader:
    """Holds and reads; one for all threads."""

    def __init__(self, orders: Orders, backend: Backend) -> None:
        self._backend = backend
        self._lease_seconds = orders.lease_seconds
        self._random = random.Random(orders.seed)  # noqa: S311 -- repeatable, not secret
        self._given: queue.Queue[_Given] = queue.Queue(maxsize=_WAITING)
        self._stopped = threading.Event()
        self._ways: dict[str, Callable[[_Given, Callable[[Any], None]], None]] = {
            "copy": self._copy,
            "view": self._view,
            "acquired": self._acquired,
            "late": self._late,
            "after release": self._after_release,
        }

    def take(self, given: _Given) -> bool:
        """Read it soon; false where too many wait."""
        try:
            self._given.put_nowait(given)
        except queue.Full:
            return False
        return True

    def stop(self) -> None:
        """End holds soon, and then :meth:`work`."""
        self._stopped.set()

    def work(self) -> None:
        """Read what was given, one after the other, until stopped and nothing is left."""
        while not (self._stopped.is_set() and self._given.empty()):
            try:
                given = self._given.get(timeout=_POLL)
            except queue.Empty:
                continue
            self._read(given)

    def _read(self, given: _Given) -> None:
        way = self._random.choices(list(self._ways), (4, 4, 2, 1, 1))[0]
        held = events.Held(way, 0, 0)
        started = time.monotonic()

        def check(fields: Any) -> None:
            held.wrong += pictures.wrong_bytes(given.picture, fields)
            held.reads += 1

        try:
            self._ways[way](given, check)
        except MmprepError as failure:
            error = refused(failure)
            now = time.monotonic()
            events.tell(events.Failed("read", error.type, str(error), error.retryable, started, now))
        finally:
            # What went wrong may have left the lease; again is no error.
            self._backend.release(given.address)
            events.tell(held)

    # --- ways -----------------------------------------------------------------------------------------------------

    def _for_a_while(self, read: Callable[[], None]) -> None:
        end = time.monotonic() + self._random.uniform(0.0, _LONGEST_HOLD)
        read()
        while time.monotonic() < end and not self._stopped.wait(self._random.uniform(0.01, 0.4)):
            read()

    def _copy(self, given: _Given, check: Callable[[Any], None]) -> None:
        item = self._backend.open(given.address)
        self._for_a_while(lambda: check(item.materialize()))
        item.release()

    def _view(self, given: _Given, check: Callable[[Any], None]) -> None:
        self._in_view(self._backend.open(given.address), check)

    def _in_view(self, item: Item, check: Callable[[Any], None]) -> None:
        with item.view() as fields:
            self._for_a_while(lambda: check(fields))
        item.release()

    def _acquired(self, given: _Given, check: Callable[[Any], None]) -> None:
        """Take a second lease, let the first one go, and read on under the second."""
        item = self._backend.acquire(given.address, kind="view" if self._random.getrandbits(1) else "copy")
        self._backend.release(given.address)
        self._in_view(item, check)

    def _late(self, given: _Given, check: Callable[[Any], None]) -> None:
        """Open an address whose lease has run out: a copy's content may be gone, a view's may not."""
        self._stopped.wait(self._lease_seconds * 1.3)
        self._copy(given, check)

    def _after_release(self, given: _Given, check: Callable[[Any], None]) -> None:
        """Read copies on without a lease: the right bytes, or an error."""
        item = self._backend.open(given.address)
        check(item.materialize())
        item.release()
        self._for_a_while(lambda: check(item.materialize()))


def _listen(orders: Orders) -> socket.socket:
    Path(orders.socket).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(orders.socket)
    listener.listen(64)
    return listener


def _serve(listener: socket.socket, reader: Reader) -> None:
    """Take addresses until the socket is closed. A client that is stopped or dead holds nobody up for long."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(_POLL)
            try:
                with connection.makefile("rb") as lines:
                    given = msgspec.json.decode(lines.readline(_LONGEST_LINE), type=_Given)
                connection.sendall(b"taken\n" if reader.take(given) else b"full\n")
            except (OSError, msgspec.MsgspecError):
                continue


def _registered(orders: Orders) -> Backend:
    """Return a registered backend, however long its service takes, or the one of its name to be gone."""
    while True:
        try:
            return Backend(f"ipc://{orders.runtime_dir}", id=orders.name)
        except MmprepError as error:
            now = time.monotonic()
            events.tell(events.Failed("connect", type(error).__name__, error.message, error.retryable, now, now))
            time.sleep(_POLL)


def _work(orders: Orders) -> None:
    with _registered(orders) as backend:
        reader = Reader(orders, backend)
        listener = _listen(orders)
        threads = [threading.Thread(target=reader.work) for _ in range(_THREADS)]
        for thread in threads:
            thread.start()
        threading.Thread(target=_serve, args=(listener, reader), daemon=True).start()
        events.tell(events.Started(time.monotonic()))
        sys.stdin.buffer.read()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        Path(orders.socket).unlink(missing_ok=True)
        reader.stop()
        for thread in threads:
            thread.join()
    events.tell(events.Ended(0))


if __name__ == "__main__":
    _work(msgspec.json.decode(os.read(0, 1 << 20).partition(b"\n")[0], type=Orders))
