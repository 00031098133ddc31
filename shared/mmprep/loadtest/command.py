"""The command ``mmprep bench``: one run as its options say, and what it leaves.

Only what people say and read is here; asks, times, sending and counting are the other modules'.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
import uvloop

from mmprep.backend import AsyncBackend
from mmprep.cli.desk import DeskClient
from mmprep.client import AsyncClient
from mmprep.errors import InvalidRequest, ServiceUnavailable
from mmprep.loadtest import arrivals
from mmprep.loadtest.accounting import CpuTime, cache_counters
from mmprep.loadtest.arguments import KEY
from mmprep.loadtest.page import page
from mmprep.loadtest.run import Record, Run
from mmprep.loadtest.summary import Summary, compare, read_summary, summarise, table
from mmprep.loadtest.targets import OK, HttpTarget, NativeTarget, QueueTarget, Target
from mmprep.loadtest.workloads import SIZES, WORKLOADS, Ask, Shape, trace

#: Seconds between two lines of progress where they are not written over each other.
_EVERY: Final = 10
#: Jobs of a queue that are here at a time.
_CREDITS: Final = 128


def run(parsed: argparse.Namespace) -> int:
    """Run the command as :func:`.arguments.parse` read it; returns the exit status: 1 where no request was answered."""
    if parsed.compare:
        runs = [read_summary(Path(name)) for name in parsed.compare]
        _say_comparison(runs)
    else:
        if parsed.target is None and parsed.runtime_dir is not None:
            parsed.target = str(Path(parsed.runtime_dir).absolute())
        settings = _check(parsed)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runs = [runner.run(_measure(parsed, settings))]
        print(table(runs[0]))
    _write(parsed, runs)
    return 0 if all(run.latency.count for run in runs) else 1


@dataclass(frozen=True, slots=True)
class _Loop:
    """How requests come: ``rate`` a second, or from ``users``, or as their trace says."""

    rate: float | None
    users: int | None


def _check(parsed: argparse.Namespace) -> _Loop:
    if parsed.size not in SIZES:
        raise InvalidRequest(f"--size must be one of {', '.join(SIZES)}, not {parsed.size}")
    if parsed.queued and (_is_http(parsed) or parsed.payload == "tensors"):
        raise InvalidRequest("--queued goes with a runtime directory, and with tensors in shared memory or none")
    if (parsed.workload == "trace") != (parsed.trace is not None):
        raise InvalidRequest("--workload trace and --trace FILE belong together")
    if parsed.workload == "trace":
        if parsed.rate or parsed.users:
            raise InvalidRequest("a trace says itself when requests are due; leave out --rate and --users")
        return _Loop(None, None)
    if parsed.rate and parsed.users:
        raise InvalidRequest("--rate is an open loop, --users a closed one; give one of them")
    if (parsed.arrivals == "ramp") != (parsed.to_rate is not None):
        raise InvalidRequest("--arrivals ramp and --to-rate belong together")
    if parsed.to_rate and not parsed.rate:
        raise InvalidRequest("a ramp begins at --rate")
    return _Loop(parsed.rate, None if parsed.rate else parsed.users or 8)


# --- measuring --------------------------------------------------------------------------------------------------------


async def _measure(parsed: argparse.Namespace, loop: _Loop) -> Summary:
    seed = parsed.seed if parsed.seed is not None else Random().randrange(1 << 20)
    asks, target = _asks(parsed, seed), await _open_target(parsed)
    desk = _Desk(parsed)
    try:
        if parsed.warm_up and loop != _Loop(None, None):
            await _drive(Run(target, asks, timeout=parsed.timeout), parsed, loop, parsed.warm_up, seed)
        before, cpu = await _counters(parsed, target, desk), CpuTime(pids) if (pids := desk.pids()) else None
        run = Run(target, asks, timeout=parsed.timeout, max_in_flight=parsed.max_in_flight)
        progress = asyncio.create_task(_show_progress(run))
        with suppress(NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, run.stop)
        try:
            record = await _drive(run, parsed, loop, parsed.seconds, seed + 1)
        finally:
            progress.cancel()
        used = None if cpu is None else cpu.look()
        after = await _counters(parsed, target, desk)
    finally:
        desk.close()
        await target.close()
    return summarise(
        record,
        name=parsed.name or parsed.workload,
        settings=_settings(parsed, loop, seed),
        cache=(after[0] - before[0], after[1] - before[1]) if before and after else None,
        cpu=used,
    )


async def _drive(run: Run, parsed: argparse.Namespace, loop: _Loop, seconds: float, seed: int) -> Record:
    if loop.users:
        return await run.closed_loop(loop.users, seconds, think=parsed.think)
    if loop.rate is None:
        return await run.replay(seconds)
    kinds: dict[str, Callable[[float], Iterator[float]]] = {
        "constant": lambda rate: arrivals.constant(rate, seconds),
        "poisson": lambda rate: arrivals.poisson(rate, seconds, Random(seed)),
        "ramp": lambda rate: arrivals.ramp(rate, parsed.to_rate, seconds),
    }
    return await run.open_loop(kinds[parsed.arrivals](loop.rate))


def _asks(parsed: argparse.Namespace, seed: int) -> Iterator[Ask]:
    shape = Shape(
        size=SIZES[parsed.size],
        pictures=parsed.pictures,
        words=parsed.words,
        population=parsed.population,
        exponent=parsed.exponent,
        turns=parsed.turns,
        conversations=parsed.conversations,
        seed=seed,
    )
    if parsed.trace is not None:
        return trace(Path(parsed.trace), shape, speed=parsed.speed)
    return WORKLOADS[parsed.workload](shape)


async def _open_target(parsed: argparse.Namespace) -> Target:
    fields = dict(map(_field, parsed.field))
    if _is_http(parsed):
        return HttpTarget(
            parsed.target,
            path=parsed.path,
            fields={"mm_payload": parsed.payload or "tensors", **fields},
            key=os.environ.get(KEY),
            accept="application/msgpack" if parsed.msgpack else "application/json",
        )
    client = AsyncClient(parsed.target, request_timeout=parsed.timeout)
    await client.open()
    if not parsed.queued:
        return NativeTarget(client, payload=parsed.payload or "shm", fields=fields)
    queue = f"bench-{os.urandom(6).hex()}"
    backend = AsyncBackend(parsed.target, queue=queue, credits=_CREDITS)
    try:
        await backend.connect()
    except BaseException:
        await client.close()
        raise
    return QueueTarget(client, backend, queue, payload=parsed.payload or "shm", fields=fields)


def _is_http(parsed: argparse.Namespace) -> bool:
    return parsed.target is not None and "://" in parsed.target and not parsed.target.startswith("ipc://")


class _Desk:
    """What a service on this machine says of itself, where there is one that was named."""

    def __init__(self, parsed: argparse.Namespace) -> None:
        self._given: list[int] = parsed.pid
        self._desk: DeskClient | None = None
        native = not _is_http(parsed)
        directory = parsed.target.removeprefix("ipc://") if native and parsed.target else parsed.runtime_dir
        if native or directory:
            self._desk = DeskClient(directory)

    def pids(self) -> list[int]:
        """Return the processes whose CPU time counts; their descendants do, too."""
        if self._given or self._desk is None:
            return self._given
        return [self._desk.status()["supervisor"]["pid"]]

    def counters(self) -> tuple[float, float] | None:
        """Return lookups in the cache and hits."""
        if self._desk is None:
            return None
        totals = self._desk.status().get("metrics", {})
        return totals.get("mmprep_mm_cache_queries_total", 0.0), totals.get("mmprep_mm_cache_hits_total", 0.0)

    def close(self) -> None:
        if self._desk is not None:
            self._desk.close()


async def _counters(parsed: argparse.Namespace, target: Target, desk: _Desk) -> tuple[float, float] | None:
    if not isinstance(target, HttpTarget):
        return await asyncio.to_thread(desk.counters)
    try:
        async with asyncio.timeout(parsed.timeout):
            reply = await target.client.get("/metrics", **target.headers)
    except (ServiceUnavailable, TimeoutError):
        return None
    return cache_counters(reply.body.decode(errors="replace")) if reply.status == 200 else None


async def _show_progress(run: Run) -> None:
    """Say each second what happens: on a terminal in one line, elsewhere now and then in another one."""
    live, number = sys.stderr.isatty(), 0
    while True:
        await asyncio.sleep(1.0)
        number += 1
        record = run.record
        last = record.seconds[-2] if len(record.seconds) > 1 else None
        if last is None or not (live or number % _EVERY == 2):
            continue
        failed = record.outcomes.total() - record.outcomes[OK]
        line = (
            f"{number:4} s  {last.due:5} due  {last.answered:5} answered a second  p50 "
            f"{1000 * last.latency.percentile(50):.1f} ms  p99 {1000 * last.latency.percentile(99):.1f} ms  "
            f"{record.in_flight} under way  {failed} failed"
        )
        print(f"\r\x1b[2K{line}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)


# --- results ----------------------------------------------------------------------------------------------------------


def _settings(parsed: argparse.Namespace, loop: _Loop, seed: int) -> dict[str, Any]:
    """Return what makes the run what it was; never a key, a path or the names of fields' values that may hold one."""
    http = _is_http(parsed)
    settings: dict[str, Any] = {
        "target": parsed.target if http else "a queue" if parsed.queued else "native client",
        "workload": parsed.workload,
    }
    if loop.users:
        settings |= {"users": loop.users, "think": parsed.think}
    elif loop.rate:
        settings |= {"rate": loop.rate, "arrivals": parsed.arrivals}
        settings |= {"to_rate": parsed.to_rate} if parsed.to_rate else {}
    if parsed.workload == "trace":
        settings |= {"speed": parsed.speed}
    else:
        settings |= {"size": parsed.size, "pictures": parsed.pictures, "words": parsed.words}
    if parsed.workload == "zipf":
        settings |= {"population": parsed.population, "exponent": parsed.exponent}
    if parsed.workload == "multi-turn":
        settings |= {"turns": parsed.turns, "conversations": parsed.conversations}
    settings |= {"payload": parsed.payload or ("tensors" if http else "shm"), "seconds": parsed.seconds, "seed": seed}
    return settings | ({"path": parsed.path, "msgpack": parsed.msgpack} if http else {})


def _write(parsed: argparse.Namespace, runs: list[Summary]) -> None:
    files: dict[str, bytes] = {}
    if parsed.output is not None:
        files[parsed.output] = msgspec.json.format(msgspec.json.encode(runs[0]), indent=1) + b"\n"
    if parsed.html is not None:
        files[parsed.html] = page(runs).encode()
    for name, content in files.items():
        try:
            Path(name).write_bytes(content)
        except OSError as error:
            raise InvalidRequest(f"{name} cannot be written: {error.strerror}") from None


def _say_comparison(runs: list[Summary]) -> None:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    print(f"{'':38} {runs[0].name[:14]:>14} {runs[1].name[:14]:>14} {'ratio':>8}")
    for name, one, other, ratio in compare(*runs):
        print(f"{name:38} {shown(one):>14} {shown(other):>14} {shown(ratio):>8}")


# --- options ----------------------------------------------------------------------------------------------------------


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        if not name or not equals:
            raise ValueError(text)
        return name, json.loads(value)
    except ValueError:
        raise InvalidRequest(
            f"--field {name}: give it as NAME=JSON, a text with its quotes: model='\"name\"'"
        ) from None
