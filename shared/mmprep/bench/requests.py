"""What a request over HTTP costs: CPU time of all processes of the service, and of each role, in milliseconds.

The load comes from the same machine and counts for nothing; its processes' time is told apart. CPU time is in steps of a
clock tick, so a run has to be long enough for some hundred requests.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmprep.bench.figures import percentiles
from mmprep.bench.pictures import FULL_HD, VGA, Size
from mmprep.bench.processes import cpu_seconds, machine_cpu_seconds
from mmprep.bench.running import Child, Service

#: Requests of a mode before those that are measured.
_WARM_UP = 8


class Run(NamedTuple):
    """One measurement.

    Attributes
    ----------
    mode, payload: as :mod:`mmprep.bench.http_load` has them, and ``mm_payload``.
    size: of the pictures, ``None`` for text.
    limit: ms of CPU time a request that are to be reached, ``None`` where nothing is promised.
    rival: what the engine's own server takes on a similar machine, for scale; ``None`` where it was not taken.
    in_flight: requests at once.
    health: ms in which 99 of 100 questions to ``/health`` are to be answered meanwhile.
    """

    mode: str
    size: Size | None
    payload: str
    limit: float | None
    rival: float | None
    in_flight: int = 8
    health: float | None = None

    @property
    def name(self) -> str:
        """For people."""
        what = "200 words" if self.size is None else self.size.name
        return f"{self.mode} {what} {self.payload}, {self.in_flight} in flight"


FULL = (
    Run("cached", VGA, "none", 1.0, 4.3),
    Run("cached", VGA, "shm", 1.3, None),
    Run("cached", VGA, "tensors", 3.0, 7.5),
    Run("cached", FULL_HD, "none", 1.3, 12.0),
    Run("cached", FULL_HD, "tensors", 12.0, 37.0),
    Run("uuid", VGA, "none", 0.7, 2.1),
    Run("text", None, "none", 0.8, None),
    Run("cold", VGA, "none", 9.0, 20.0),
    Run("cold", VGA, "shm", 9.0, 16.0),
    Run("turns", VGA, "none", 2.0, 10.0),
    Run("cached", FULL_HD, "tensors", None, None, in_flight=32, health=10.0),
)
QUICK = (
    Run("cached", VGA, "shm", 1.3, None),
    Run("text", None, "none", 0.8, None),
    Run("turns", VGA, "none", 2.0, 10.0),
)


def measure(running: Service, run: Run, paths: Sequence[Path], seconds: float) -> dict[str, Any]:
    """Put one load on the service and return what it cost.

    ``other_cores_busy`` is what else the machine did meanwhile, in cores: it makes latencies longer, and CPU time too,
    since it takes caches.
    """
    pids = running.pids()
    orders = {
        "runtime_dir": running.runtime_dir,
        "port": running.port,
        "pictures": [str(path) for path in paths],
        "mode": run.mode,
        "payload": run.payload,
        "in_flight": run.in_flight,
        "seconds": seconds,
        "warm_up": _WARM_UP,
    }
    with contextlib.ExitStack() as stack:
        load = stack.enter_context(Child("mmprep.bench.http_load", orders))
        probe = None
        if run.health is not None:
            probe = stack.enter_context(Child("mmprep.bench.probe", {"port": running.port}))
            probe.wait_ready()
        load.wait_ready()
        others = [child.pid for child in (load, probe) if child is not None]
        before, client, machine = _cpu(pids), sum(map(cpu_seconds, others)), machine_cpu_seconds()
        started = time.monotonic()
        for child in (probe, load):
            if child is not None:
                child.go()
        answer = load.answer()
        elapsed = time.monotonic() - started
        cpu = {role: spent - before[role] for role, spent in _cpu(pids).items()}
        client = sum(map(cpu_seconds, others)) - client
        busy = (machine_cpu_seconds() - machine - sum(cpu.values()) - client) / elapsed
        health = None
        if probe is not None:
            probe.stop()
            health = percentiles(probe.answer()["latencies_ms"])
    return _figures(run, answer, cpu) | {"health_ms": health, "other_cores_busy": round(max(0.0, busy), 2)}


def _cpu(pids: dict[str, list[int]]) -> dict[str, float]:
    return {role: sum(map(cpu_seconds, of_role)) for role, of_role in pids.items()}


def _figures(run: Run, answer: dict[str, Any], cpu: dict[str, float]) -> dict[str, Any]:
    count = len(answer["latencies_ms"])
    return {
        "run": run.name,
        "limit_ms": run.limit,
        "rival_ms": run.rival,
        "health_limit_ms": run.health,
        "requests": count,
        "refused": answer["refused"],
        "requests_per_second": round(count / answer["seconds"], 1),
        "answer_bytes": answer["bytes"] // count,
        "latency_ms": percentiles(answer["latencies_ms"]),
        "cpu_ms": round(1000 * sum(cpu.values()) / count, 3),
        "cpu_ms_by_role": {role: round(1000 * seconds / count, 3) for role, seconds in cpu.items()},
    }
