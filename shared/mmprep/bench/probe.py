"""The health probe, a process of its own: asks ``/health`` about a hundred times a second over kept connections.

Frontends share the port and the kernel deals connections out among them, so several connections take turns. Beside the
latency it measures how late the machine let the probe itself ask: on a machine whose cores are all busy that is not zero,
and the same delay is in the latency once more, when the answer has come.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from typing import Any

from mmprep.bench.running import read_orders, say_answer, say_ready

_QUESTION = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
_CONNECTIONS = 4
_EVERY = 0.01
_MOST_BYTES = 65536


def _ask(connection: socket.socket) -> None:
    connection.sendall(_QUESTION)
    answer = b""
    while b"\r\n\r\n" not in answer:
        received = connection.recv(_MOST_BYTES)
        if not received:
            raise ConnectionError("the service closed a connection of the health probe")
        answer += received
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise ConnectionError("the service is not healthy: " + head.decode(errors="replace")[:100])
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    while len(body) < length:
        body += connection.recv(_MOST_BYTES)


def _probe(port: int) -> dict[str, Any]:
    connections = [socket.create_connection(("127.0.0.1", port), timeout=30.0) for _ in range(_CONNECTIONS)]
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _ask(connection)
    say_ready()
    latencies: list[float] = []
    delays: list[float] = []
    due = time.perf_counter()
    while not select.select([sys.stdin], [], [], max(0.0, due - time.perf_counter()))[0]:
        asked = time.perf_counter()
        _ask(connections[len(latencies) % _CONNECTIONS])
        answered = time.perf_counter()
        latencies.append(round(1000 * (answered - asked), 4))
        delays.append(round(1000 * (asked - due), 4))
        due = max(due + _EVERY, answered)
    for connection in connections:
        connection.close()
    return {"latencies_ms": latencies, "delays_ms": delays}


if __name__ == "__main__":
    say_answer(_probe(read_orders()["port"]))
