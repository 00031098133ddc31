"""The other end of an ipc socket: answers every message with an empty one, until its parent tells it to go.

A message is ``[what to do first, data]``: ``hash`` the data, which have just been received, or nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import zmq
from blake3 import blake3

from mmprep.bench.running import read_orders


def _answer_all(endpoint: str) -> None:
    context: zmq.Context[Any] = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    socket.bind(endpoint)
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    print("ready", flush=True)  # noqa: T201 -- the protocol with the parent
    while sys.stdin.fileno() not in (ready := dict(poller.poll())):
        if socket in ready:
            identity, first, data = socket.recv_multipart(copy=False)
            if first.bytes == b"hash":
                blake3(data.buffer).digest()
            socket.send_multipart([identity, b""])
    context.destroy(linger=0)


if __name__ == "__main__":
    _answer_all(read_orders()["endpoint"])
