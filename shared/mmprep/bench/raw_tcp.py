"""Raw ZeroMQ over tcp, for scale: a ROUTER in a process of its own that answers each message with so many bytes.

A message is the number of bytes, in decimal digits; the answer is one frame of them. With keys it speaks CURVE.
"""

from __future__ import annotations

import os
from typing import Any

import zmq

from mmprep.bench.running import answer_all, read_orders


def _answer(socket: zmq.Socket[bytes], data: bytes) -> None:
    identity, nbytes = socket.recv_multipart()
    socket.send_multipart([identity, memoryview(data)[: int(nbytes)]], copy=False)


def _serve(orders: dict[str, Any]) -> None:
    context: zmq.Context[Any] = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    if orders["secret"]:
        socket.curve_secretkey = orders["secret"].encode()
        socket.curve_server = True
    socket.bind(orders["endpoint"])
    data = os.urandom(orders["most"])
    answer_all(socket, lambda: _answer(socket, data))
    context.destroy(linger=0)


if __name__ == "__main__":
    _serve(read_orders())
