"""Jobs through a queue: what one costs the writer, and how long it takes from one job's end to having the next.

Each job is a chat with one picture that is cached. Producer and consumer are processes of their own, whose time is not
counted: jobs a second *of the writer* are jobs by the CPU seconds that the writer used for them, from the offer of their
keys to the end of their leases. They are measured with a consumer that does not wait for the answer when it says that a job
is done, and with one that does. The hand-over is that of a consumer that waits and may have one job at a time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from mmprep.bench import pictures, throughput
from mmprep.bench.figures import percentiles
from mmprep.bench.processes import cpu_seconds
from mmprep.bench.running import RING, SMALL_RING, Child, Service, service

_QUEUE = "bench"
_LANES = 2


class Amount(NamedTuple):
    """How many jobs are posted while others are pulled, how many wait for the measurement of the hand-over, and the ring."""

    streamed: int
    handed_over: int
    ring: str = RING


FULL = Amount(6000, 2000)
QUICK = Amount(60, 30, SMALL_RING)


def measure(model: Path, directory: Path, amount: Amount) -> dict[str, Any]:
    """Return what jobs cost each process, and the hand-over in milliseconds."""
    with tempfile.TemporaryDirectory(dir=directory) as drawn:
        paths = throughput.write_pictures(Path(drawn), [pictures.VGA])[pictures.VGA.name]
        options = [
            "--queues",
            _QUEUE,
            "--queue-jobs",
            str(2 * (amount.streamed + amount.handed_over)),
            "--job-expiry",
            "1h",
        ]
        with service(model, frontends=1, lanes=_LANES, cache_size=amount.ring, options=options) as running:
            streamed = _stream(running, paths, amount.streamed, waits=False)
            waited = _stream(running, paths, amount.streamed, waits=True)
            _produce(running, paths, amount.handed_over)
            with _consumer(running, amount.handed_over, credits_=1, waits=True) as consumer:
                consumer.wait_ready()
                consumer.go()
                handed_over = consumer.answer()
    times = handed_over["next_ms"]
    return {**streamed, "waited": waited, "next_job_ms": percentiles(times), "handed_over": len(times)}


def _stream(running: Service, paths: list[Path], jobs: int, *, waits: bool) -> dict[str, Any]:
    pids = running.pids()
    with _producer(running, paths, jobs) as producer, _consumer(running, jobs, credits_=64, waits=waits) as consumer:
        producer.wait_ready()
        consumer.wait_ready()
        before = {role: sum(map(cpu_seconds, pids[role])) for role in ("writer", "frontends")}
        producer.go()
        consumer.go()
        producer.answer()
        seconds = consumer.answer()["seconds"]
        cpu = {role: sum(map(cpu_seconds, pids[role])) - before[role] for role in before}
    return {
        "jobs": jobs,
        "jobs_per_second": round(jobs / seconds, 1),
        "jobs_per_writer_second": round(jobs / max(cpu["writer"], 1e-9), 1),
        "cpu_ms_per_job": {role: round(1000 * used / jobs, 3) for role, used in cpu.items()},
    }


def _produce(running: Service, paths: list[Path], jobs: int) -> None:
    with _producer(running, paths, jobs) as producer:
        producer.wait_ready()
        producer.go()
        producer.answer()


def _producer(running: Service, paths: list[Path], jobs: int) -> Child:
    orders = {"runtime_dir": running.runtime_dir, "queue": _QUEUE, "pictures": list(map(str, paths)), "jobs": jobs}
    return Child("mmprep.bench.producer", orders)


def _consumer(running: Service, jobs: int, *, credits_: int, waits: bool) -> Child:
    orders = {"runtime_dir": running.runtime_dir, "queue": _QUEUE, "jobs": jobs, "credits": credits_, "waits": waits}
    return Child("mmprep.bench.consumer", orders)
