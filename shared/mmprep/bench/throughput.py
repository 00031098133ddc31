"""Requests a second, latency, CPU time by role, and what ``/health`` takes meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from mmprep.bench import pictures
from mmprep.bench.figures import median, percentiles
from mmprep.bench.pictures import Size
from mmprep.bench.processes import cpu_seconds, machine_cpu_seconds
from mmprep.bench.running import Child, Mode, Service

#: Different pictures of a cached run. Few large ones: all of them must fit into half of the ring.
_CACHED = {pictures.TWELVE_MEGAPIXELS.name: 3}
_CACHED_OTHERS = 8
_WARM_UP = 8
_REPEATS = 40


class Run(NamedTuple):
    """One measurement."""

    size: Size
    mode: Mode
    in_flight: int
    seconds: float


def write_pictures(directory: Path, sizes: Sequence[Size]) -> dict[str, list[Path]]:
    """Write the pictures of each size that cached runs ask for, and return their paths by the size's name."""
    written: dict[str, list[Path]] = {}
    for size in sizes:
        picture = pictures.jpeg(size)
        written[size.name] = []
        for number in range(_CACHED.get(size.name, _CACHED_OTHERS)):
            path = directory / f"{size.name}-{number}.jpg"
            path.write_bytes(pictures.distinct(picture, number))
            written[size.name].append(path)
    return written


def measure(running: Service, frontends: int, run: Run, paths: Sequence[Path]) -> dict[str, Any]:
    """Put one load on the service and return what came of it.

    One load generator a frontend, as far as there are requests in flight: a generator is one Python process as well, and
    a single one would be what is measured where frontends are many. ``other_cores_busy`` is what else the machine did
    meanwhile, in cores: above a few hundredths, the rates and latencies are not the service's own.
    """
    generators = min(frontends, run.in_flight)
    pids = running.pids()
    with contextlib.ExitStack() as stack:
        loads = [
            stack.enter_context(
                Child(
                    "mmprep.bench.load",
                    {
                        "runtime_dir": running.runtime_dir,
                        "pictures": [str(path) for path in paths],
                        "mode": run.mode,
                        "in_flight": run.in_flight // generators,
                        "seconds": run.seconds,
                        "warm_up": _WARM_UP,
                    },
                )
            )
            for _ in range(generators)
        ]
        probe = stack.enter_context(Child("mmprep.bench.probe", {"port": running.port}))
        for child in (*loads, probe):
            child.wait_ready()
        pids["client"] = [load.pid for load in loads]
        pids["probe"] = [probe.pid]
        before, machine, started = _cpu(pids), machine_cpu_seconds(), time.monotonic()
        for child in (probe, *loads):
            child.go()
        answers = [load.answer() for load in loads]
        elapsed = time.monotonic() - started
        cpu = {role: seconds - before[role] for role, seconds in _cpu(pids).items()}
        others = (machine_cpu_seconds() - machine - sum(cpu.values())) / elapsed
        probe.stop()
        health = probe.answer()
    return _figures(frontends, run, answers, health, cpu) | {"other_cores_busy": round(max(0.0, others), 2)}


def _cpu(pids: dict[str, list[int]]) -> dict[str, float]:
    return {role: sum(map(cpu_seconds, of_role)) for role, of_role in pids.items()}


def _figures(
    frontends: int, run: Run, answers: list[dict[str, Any]], health: dict[str, Any], cpu: dict[str, float]
) -> dict[str, Any]:
    latencies = list(itertools.chain.from_iterable(answer["latencies_ms"] for answer in answers))
    count = len(latencies)
    # Generators end within one request of each other; each one's rate holds for its own time.
    rate = sum(len(answer["latencies_ms"]) / answer["seconds"] for answer in answers)
    return {
        "size": run.size.name,
        "mode": run.mode,
        "in_flight": run.in_flight,
        "frontends": frontends,
        "generators": len(answers),
        "requests": count,
        "hits": sum(answer["hits"] for answer in answers),
        "requests_per_second": round(rate, 1),
        "latency_ms": percentiles(latencies),
        "cpu_ms_per_request": {role: round(1000 * seconds / count, 3) for role, seconds in cpu.items()},
        "health_ms": percentiles(health["latencies_ms"]) | {"questions": len(health["latencies_ms"])},
        "probe_delay_ms": percentiles(health["delays_ms"]),
    }


def moving_bytes(paths: dict[str, list[Path]], endpoint: str) -> dict[str, dict[str, float]]:
    """Return by size what moving the encoded bytes to another process takes, and hashing them there, in milliseconds.

    It is a request with the bytes as a frame and an empty answer over ipc, less the same with an empty frame. The bytes
    are hashed as a frontend does it: just received, so that no cache of the hashing core holds them.
    """
    costs = {}
    context: zmq.Context[Any] = zmq.Context()
    with Child("mmprep.bench.echo", {"endpoint": endpoint}) as echo, context.socket(zmq.DEALER) as socket:
        echo.wait_ready()
        socket.connect(endpoint)
        nothing = _round_trip_ms(socket, b"", b"")
        for name, (path, *_) in paths.items():
            data = path.read_bytes()
            costs[name] = {
                "bytes": len(data),
                "moved_ms": round(max(0.0, _round_trip_ms(socket, b"", data) - nothing), 4),
                "moved_and_hashed_ms": round(max(0.0, _round_trip_ms(socket, b"hash", data) - nothing), 4),
            }
        echo.go()
    context.destroy(linger=0)
    return costs


def _round_trip_ms(socket: zmq.Socket[bytes], first: bytes, data: bytes) -> float:
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        socket.send(first, zmq.SNDMORE)
        socket.send(data, copy=False)
        socket.recv()
        times.append(time.perf_counter() - started)
    return 1000 * median(times)
