"""The reader of the hand-over's measurement, a process of its own: a registered backend that is sent addresses or tensors.

Each message is ``[header, body]``. The header is JSON: when it was sent (by the clock that all processes share), whether
the body is an address, to be viewed (``view``) or copied (``copy``), or the tensor itself (``inline``) with its dtype and
shape. The answer says how long after the sending the array was there, and how long after it every byte had been read.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from mmprep.backend import Backend
from mmprep.bench.running import answer_all, read_orders

_FIELD = "pixel_values"


def _read_all(array: NDArray[Any]) -> int:
    """Read every byte."""
    return int(array.reshape(-1).view(np.uint64).sum())


def _take(backend: Backend, header: dict[str, Any], body: zmq.Frame) -> dict[str, float]:
    if header["kind"] == "inline":
        array = np.frombuffer(body.buffer, header["dtype"]).reshape(header["shape"])
        return _times(header, time.monotonic(), array)
    item = backend.open(json.loads(body.bytes))
    opened = time.monotonic()
    try:
        if header["kind"] == "copy":
            copied = item.materialize()[_FIELD]
            return _times(header, time.monotonic(), copied, opened)
        with item.view() as arrays:
            return _times(header, time.monotonic(), arrays[_FIELD], opened)
    finally:
        item.release()


def _times(header: dict[str, Any], ready: float, array: NDArray[Any], opened: float | None = None) -> dict[str, float]:
    total = _read_all(array)
    read = time.monotonic()
    sent = header["sent"]
    times = {"ready_ms": 1000 * (ready - sent), "read_ms": 1000 * (read - sent), "sum": total}
    return times if opened is None else times | {"opened_ms": 1000 * (opened - sent)}


def _answer(backend: Backend, socket: zmq.Socket[bytes]) -> None:
    identity, header, body = socket.recv_multipart(copy=False)
    answer = _take(backend, json.loads(header.bytes), body)
    del body  # before the answer: giving back tens of megabytes would else be part of the next hand-over
    socket.send_multipart([identity, json.dumps(answer).encode()])


def _serve(orders: dict[str, Any]) -> None:
    context: zmq.Context[Any] = zmq.Context()
    with Backend(f"ipc://{orders['runtime_dir']}", id=orders["id"]) as backend, context.socket(zmq.ROUTER) as socket:
        socket.bind(orders["endpoint"])
        answer_all(socket, lambda: _answer(backend, socket))
    context.destroy(linger=0)


if __name__ == "__main__":
    _serve(read_orders())
