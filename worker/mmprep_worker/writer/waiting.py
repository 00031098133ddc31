"""Waits for messages on ZeroMQ sockets and for file descriptors, in one system call a turn.

``zmq.Poller`` asks the kernel about every socket several times a turn, which costs more than a small message. Here their
descriptors stay with the kernel. Rules of ZeroMQ's descriptors:

* One says that something has happened to its socket, perhaps that a message has come. Looking at the socket takes that back.
* Sending looks, too: then a message that has come meanwhile has no signal any more.

So a socket that was used since it was last seen to be empty is looked at before the next wait: whoever sends on one says so
by :meth:`Waiting.used`, and who has seen that nothing more is there, by :meth:`Waiting.emptied`.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

import zmq

from mmprep.wire.frames import readable


class Waiting:
    """Sockets and descriptors, each with who is called when something has come; in the order in which they were added."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._sockets: dict[int, zmq.Socket[Any]] = {}
        #: Those that have to be looked at before the next wait.
        self._used: set[int] = set()

    def add(self, fd: int, handler: Callable[[], None]) -> None:
        """Call ``handler`` when a descriptor is readable."""
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Wait for a descriptor no more; before it is closed, because its number may come again."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def add_socket(self, socket: zmq.Socket[Any], handler: Callable[[], None]) -> int:
        """Call ``handler`` when a socket may have messages, until it was emptied; return what the socket is called here."""
        fd = int(socket.getsockopt(zmq.FD))
        self._sockets[fd] = socket
        self._used.add(fd)
        self.add(fd, handler)
        return fd

    def used(self, socket: int) -> None:
        """Something was sent, or received and more may be there."""
        self._used.add(socket)

    def emptied(self, socket: int) -> None:
        """The socket was looked at, and has nothing more."""
        self._used.discard(socket)

    def wait(self, seconds: float) -> list[Callable[[], None]]:
        """Wait for so long at most, and return the handlers of what has come."""
        used = self._used
        if used:
            used &= {fd for fd in used if readable(self._sockets[fd])}
        events = self._epoll.poll(0 if used else seconds)
        if not used and len(events) < 2:  # as mostly
            return [self._handlers[fd] for fd, _ in events]
        ready = used.union([fd for fd, _ in events])
        return [handler for fd, handler in self._handlers.items() if fd in ready]

    def close(self) -> None:
        """End; the descriptors are their owners'."""
        self._epoll.close()
