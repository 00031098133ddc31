"""What the first request with a picture takes after the start, beside later ones that are as new to the service."""

from __future__ import annotations

import base64
import http.client
import json
import time
from contextlib import closing

from mmprep.bench.figures import median
from mmprep.bench.pictures import distinct
from mmprep.bench.running import Service
from mmprep.errors import ServiceUnavailable

_LATER = 12


def measure(running: Service, picture: bytes) -> dict[str, float]:
    """Return the time of the first request in ms, the median of later ones, and the one by the other.

    Every request has a picture of its own, as a data URL, on a connection of its own; tensors come in the answer.
    """
    times = [_one(running, distinct(picture, number)) for number in range(1 + _LATER)]
    later = median(times[1:])
    return {"first_ms": round(times[0], 2), "later_ms": round(later, 2), "first_by_later": round(times[0] / later, 3)}


def _one(running: Service, picture: bytes) -> float:
    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is on this picture?"}]
    body = json.dumps({"messages": [{"role": "user", "content": content}]})
    with closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=120.0)) as connection:
        connection.connect()
        started = time.perf_counter()
        connection.request("POST", "/v1/chat/completions/render", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        elapsed = time.perf_counter() - started
    if answer.status != 200:
        raise ServiceUnavailable(f"a request of the benchmark was answered with {answer.status}")
    return 1000 * elapsed
