"""What the demonstration asks the service over HTTP, as any client would: one kept connection, JSON, data URLs."""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from mmprep.errors import ServiceUnavailable

_SECONDS = 60.0
QUESTION = "What do these two pictures show?"


def chat(photos: Sequence[Path], backend_id: str) -> bytes:
    """Return the body of a chat with JPEG pictures, whose tensors are leased to ``backend_id``."""
    parts: list[dict[str, Any]] = []
    for photo in photos:
        encoded = base64.b64encode(photo.read_bytes()).decode("ascii")
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}})
    parts.append({"type": "text", "text": QUESTION})
    request = {"messages": [{"role": "user", "content": parts}], "mm_payload": "shm", "backend_id": backend_id}
    return json.dumps(request).encode()


class HttpClient:
    """One connection to the service; a context manager."""

    def __init__(self, host: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def render(self, body: bytes) -> tuple[dict[str, Any], float]:
        """Send a chat; return its answer, and the seconds from the first byte sent to the last one read.

        Raises
        ------
        ServiceUnavailable
            The answer is an error; with its message.
        """
        started = time.perf_counter()
        content = self._ask("POST", "/v1/chat/completions/render", body)
        seconds = time.perf_counter() - started
        answer: dict[str, Any] = json.loads(content)
        return answer, seconds

    def metrics(self) -> dict[str, float]:
        """Return the samples of ``/metrics``, by name with labels."""
        samples = {}
        for line in self._ask("GET", "/metrics").decode().splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            self._connection.request(method, path, body, headers)
            with self._connection.getresponse() as response:
                status, content = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServiceUnavailable(f"{method} {path}: {type(error).__name__} {error}") from None
        if status != http.client.OK:
            raise ServiceUnavailable(f"{method} {path} was answered with {status}: {_message(content)}")
        return content


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace")
