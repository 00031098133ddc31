"""What all our ZeroMQ sockets share, on a loop or without one."""

from __future__ import annotations

from typing import Any

import zmq

from mmprep.wire.codec import CONTROL_LIMIT

RECONNECT_MS = 20
_HIGH_WATER = 1000


def configure(socket: zmq.Socket[bytes], *, frame_limit: int = CONTROL_LIMIT) -> None:
    """Set what all our sockets share: no lingering, bounded queues, a cap on frames, no sending into the void."""
    socket.linger = 0
    socket.sndhwm = _HIGH_WATER
    socket.rcvhwm = _HIGH_WATER
    socket.maxmsgsize = frame_limit
    socket.immediate = 1
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    if socket.type == zmq.ROUTER:
        socket.router_mandatory = True


def router(context: zmq.Context[Any], endpoint: str, *, frame_limit: int = CONTROL_LIMIT) -> zmq.Socket[bytes]:
    """Return a ROUTER bound to ``endpoint``. The caller holds the lock that makes this path its own.

    Raises
    ------
    zmq.ZMQError
        The endpoint cannot be bound.
    """
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    configure(socket, frame_limit=frame_limit)
    socket.bind(endpoint)
    return socket
