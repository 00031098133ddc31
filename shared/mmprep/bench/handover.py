"""Handing tensors to another process: an address of the ring against the bytes in a message.

The tensors are real items of a running service, float32. For every hand-over by address the service leases it anew to the
reader (through HTTP, as an engine's caller would, as the kind that the reader needs), outside of the time that is
measured; what is measured starts when the sender sends the address, or copies the tensor out of the ring to send it, and
ends in the reader.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import zmq

from mmprep.backend import Backend
from mmprep.bench import pictures
from mmprep.bench.figures import median
from mmprep.bench.pictures import Size
from mmprep.bench.running import Child, Service
from mmprep.client import Client
from mmprep.wire.messages import LeaseKind

READER = "bench-reader"
_FIELD = "pixel_values"

Kind = Literal["view", "copy", "inline"]
_LEASES: tuple[LeaseKind, ...] = ("view", "copy")


class Tensor(NamedTuple):
    """A tensor of about ``name`` and the picture that becomes it: 24 bytes a pixel (float32, three channels, twice)."""

    name: str
    picture: Size


TENSORS = (
    Tensor("1 MB", Size(224, 196, 8.5)),
    Tensor("10 MB", Size(644, 644, 8.5)),
    Tensor("50 MB", Size(1932, 1092, 4.6)),
)


class Requests:
    """Asks the service over HTTP for addresses that are leased to the reader."""

    def __init__(self, running: Service) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60.0)

    def address(self, picture: bytes, kind: LeaseKind) -> dict[str, Any]:
        """Return an address, freshly leased as ``kind``, of the item made of ``picture``."""
        body = {
            "messages": _messages("data:image/jpeg;base64," + base64.b64encode(picture).decode()),
            "mm_payload": "shm",
            "mm_dtype": "float32",
            "backend_id": READER,
            "lease_kind": kind,
        }
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/chat/completions/render", json.dumps(body), headers)
        answer = json.load(self._connection.getresponse())
        address: dict[str, Any] = answer["features"]["mm_addresses"]["image"][0]
        return address

    def close(self) -> None:
        self._connection.close()


def _messages(url: str | bytes) -> list[dict[str, Any]]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe it."}]
    return [{"role": "user", "content": content}]


def measure(running: Service, directory: Path, tensors: Sequence[Tensor], repeats: int) -> list[dict[str, Any]]:
    """Return for each tensor the medians of the ways to hand it over, in milliseconds, and their ratios."""
    endpoint = f"ipc://{directory}/reader.sock"
    context: zmq.Context[Any] = zmq.Context()
    requests = Requests(running)
    orders = {"runtime_dir": running.runtime_dir, "endpoint": endpoint, "id": READER}
    try:
        with Child("mmprep.bench.reader", orders) as reader, context.socket(zmq.DEALER) as socket:
            reader.wait_ready()
            socket.connect(endpoint)
            measured = [_one(running, requests, socket, tensor, repeats) for tensor in tensors]
            reader.go()
    finally:
        requests.close()
        context.destroy(linger=0)
    return measured


def _one(
    running: Service, requests: Requests, socket: zmq.Socket[bytes], tensor: Tensor, repeats: int
) -> dict[str, Any]:
    picture = pictures.jpeg(tensor.picture)
    times: dict[Kind, list[dict[str, float]]] = {"view": [], "copy": [], "inline": []}
    with Backend(f"ipc://{running.runtime_dir}") as sender:
        item = sender.acquire(requests.address(picture, "copy") | {"lease": None})
        with item.view() as arrays:
            pixels = arrays[_FIELD]
            header = {"dtype": pixels.dtype.str, "shape": pixels.shape}
            # Turn by turn, so that what else the machine does meets all of them.
            for _ in range(repeats):
                for kind in _LEASES:
                    address = json.dumps(requests.address(picture, kind)).encode()
                    times[kind].append(_hand_over(socket, {"kind": kind, "sent": time.monotonic()}, address))
                sent = {"kind": "inline", "sent": time.monotonic(), **header}
                times["inline"].append(_hand_over(socket, sent, pixels.tobytes()))
            nbytes = pixels.nbytes
        item.release()
    if len({answer["sum"] for answers in times.values() for answer in answers}) != 1:
        raise AssertionError("the reader did not read the same bytes by every way")
    return {"tensor": tensor.name, "bytes": nbytes, **_figures(times), "client": _client(running, picture, repeats)}


def _hand_over(socket: zmq.Socket[bytes], header: dict[str, Any], body: bytes) -> dict[str, float]:
    socket.send_multipart([json.dumps(header).encode(), body], copy=False)
    answer: dict[str, float] = json.loads(socket.recv())
    return answer


def _figures(times: dict[Kind, list[dict[str, float]]]) -> dict[str, Any]:
    def middle(kind: Kind, stage: str) -> float:
        return round(median([answer[stage] for answer in times[kind]]), 4)

    figures: dict[str, Any] = {
        # The first view of an item finds its pages not yet in the reader's page table.
        "first_view": {stage: round(times["view"][0][stage], 4) for stage in ("ready_ms", "read_ms")},
        "address_opened_ms": middle("view", "opened_ms"),
    }
    for kind in times:
        figures[kind] = {stage: middle(kind, stage) for stage in ("ready_ms", "read_ms")}
    for stage in ("ready", "read"):
        ratio = figures["view"][f"{stage}_ms"] / figures["inline"][f"{stage}_ms"]
        figures[f"view_to_inline_{stage}"] = round(ratio, 4)
    return figures


def _client(running: Service, picture: bytes, repeats: int) -> dict[str, float]:
    """Return what a whole cached request takes with the tensors by address and with them in the answer, until viewed."""
    times: dict[Literal["shm", "tensors"], list[float]] = {"shm": [], "tensors": []}
    with Client(f"ipc://{running.runtime_dir}") as client:
        for _ in range(repeats):
            for payload, taken in times.items():
                started = time.perf_counter()
                result = client.chat(_messages(picture), payload=payload, mm_dtype="float32")
                with result.items["image"][0].view():
                    taken.append(time.perf_counter() - started)
                result.release()
    return {f"{payload}_ms": round(1000 * median(taken), 3) for payload, taken in times.items()}
