"""The consumer of the queues' measurement, a process of its own: a backend that acknowledges each job at once.

It says how long it took from each acknowledgement to having the next job. Where it ``waits`` for the answer to the one, it
comes with the other.
"""

from __future__ import annotations

import time
from typing import Any

from mmprep.backend import Backend
from mmprep.bench.running import read_orders, say_answer, say_ready


def _run(orders: dict[str, Any]) -> None:
    say_ready()
    endpoint = f"ipc://{orders['runtime_dir']}"
    started, times = time.perf_counter(), []
    with Backend(endpoint, queue=orders["queue"], credits=orders["credits"]) as backend:
        job = backend.pull()
        for _ in range(orders["jobs"] - 1):
            assert job is not None
            done = time.perf_counter()
            job.ack(wait=orders["waits"])
            job = backend.pull()
            times.append(1000 * (time.perf_counter() - done))
        assert job is not None
        job.ack(wait=orders["waits"])
        seconds = time.perf_counter() - started
    say_answer({"seconds": seconds, "next_ms": times})


if __name__ == "__main__":
    _run(read_orders())
