"""The other end of an ipc socket: answers every message with an empty one, until its parent tells it to go.

A message is ``[what to do first, data]``: ``hash`` the data, which have just been received, or nothing.
"""

from __future__ import annotations

from typing import Any

import zmq
from blake3 import blake3

from mmprep.bench.running import answer_all, read_orders


def _answer(socket: zmq.Socket[bytes]) -> None:
    identity, first, data = socket.recv_multipart(copy=False)
    if first.bytes == b"hash":
        blake3(data.buffer).digest()
    socket.send_multipart([identity, b""])


def _serve(endpoint: str) -> None:
    context: zmq.Context[Any] = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    socket.bind(endpoint)
    answer_all(socket, lambda: _answer(socket))
    context.destroy(linger=0)


if __name__ == "__main__":
    _serve(read_orders()["endpoint"])
