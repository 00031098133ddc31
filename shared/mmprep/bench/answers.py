"""Answers over HTTP that hold tensors: as JSON and as MessagePack, of the same cached picture, by turns in one run.

What is compared is the service's CPU time a request, all its processes together, and the time until the last byte has come.
The turns are short, so that whatever else the machine does falls on both; trust their ratio.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from mmprep.bench import pictures
from mmprep.bench.figures import median, percentiles
from mmprep.bench.pictures import Size
from mmprep.bench.processes import cpu_seconds
from mmprep.bench.running import RING, SMALL_RING, Service, service

_LANES: Final = 2
_PATH: Final = "/v1/chat/completions/render"
_ENCODINGS: Final = {"json": "application/json", "msgpack": "application/msgpack"}
_READ: Final = 1 << 20


class Amount(NamedTuple):
    """How much is measured: sizes of the pictures, turns of each encoding, requests a turn, and the ring."""

    sizes: tuple[Size, ...]
    turns: int
    requests: int
    ring: str = RING


FULL = Amount((pictures.VGA, pictures.FULL_HD), 15, 20)
QUICK = Amount((pictures.VGA,), 2, 3, SMALL_RING)


def measure(model: Path, amount: Amount) -> list[dict[str, Any]]:
    """Return the figures of each size and encoding.

    Parameters
    ----------
    model:
        Its tensors come as uint8, the default.
    """
    rows = []
    with service(model, frontends=1, lanes=_LANES, cache_size=amount.ring) as running:
        for size in amount.sizes:
            rows += _one_size(running, size, amount)
    return rows


def _one_size(running: Service, size: Size, amount: Amount) -> list[dict[str, Any]]:
    url = "data:image/jpeg;base64," + base64.b64encode(pictures.jpeg(size)).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    body = json.dumps({"messages": [{"role": "user", "content": parts}], "mm_payload": "tensors"}).encode()
    pids = [pid for of_role in running.pids().values() for pid in of_role]
    connection = http.client.HTTPConnection("127.0.0.1", running.port)
    latencies: dict[str, list[float]] = {name: [] for name in _ENCODINGS}
    used: dict[str, list[float]] = {name: [] for name in _ENCODINGS}
    sizes: dict[str, int] = {}
    for turn in range(-1, amount.turns):  # the first one fills the cache and does not count
        for name, media_type in _ENCODINGS.items():
            before = sum(map(cpu_seconds, pids))
            taken = []
            for _ in range(amount.requests):
                started = time.perf_counter()
                sizes[name] = _ask(connection, body, media_type)
                taken.append(1000 * (time.perf_counter() - started))
            if turn >= 0:
                used[name].append(1000 * (sum(map(cpu_seconds, pids)) - before) / amount.requests)
                latencies[name] += taken
    connection.close()
    return [
        {
            "size": size.name,
            "encoding": name,
            "bytes": sizes[name],
            "requests": len(latencies[name]),
            "cpu_ms": round(sum(used[name]) / len(used[name]), 3),
            "cpu_to_json": round(sum(used[name]) / sum(used["json"]), 3) if sum(used["json"]) else None,
            "latency_ms": percentiles(latencies[name]),
            "latency_to_json": _ratio(latencies[name], latencies["json"]),
        }
        for name in _ENCODINGS
    ]


def _ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return round(median(values) / median(others), 3)


def _ask(connection: http.client.HTTPConnection, body: bytes, media_type: str) -> int:
    """Send one request, read its answer, and return how many bytes it has."""
    connection.request("POST", _PATH, body, {"Content-Type": "application/json", "Accept": media_type})
    answer = connection.getresponse()
    count = 0
    while part := answer.read(_READ):
        count += len(part)
    if answer.status != 200 or answer.headers["Content-Type"] != media_type:
        raise ConnectionError(f"the service answered with {answer.status} as {answer.headers['Content-Type']}")
    return count
