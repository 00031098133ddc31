"""``python -m mmprep.bench``: measure the service, write JSON, print tables."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import msgspec

from mmprep import __version__
from mmprep.bench import answers, fetching, first, handover, pictures, queues, remote, report, requests, throughput
from mmprep.bench.processes import cpu_seconds, machine_facts, memory
from mmprep.bench.running import RING, SMALL_RING, Mode, Service, full_size_model, service
from mmprep.bench.throughput import Run
from mmprep.errors import MmprepError

PARTS = ("throughput", "handover", "answers", "memory", "startup", "fetch", "requests", "queues", "remote")
_LANES = 2


class Plan(msgspec.Struct, frozen=True):
    """How much is measured."""

    frontends: tuple[int, ...]
    runs: tuple[Run, ...]
    #: Only with one frontend: large pictures take long.
    large: tuple[Run, ...]
    tensors: tuple[handover.Tensor, ...]
    answers: answers.Amount
    fetch: fetching.Amount
    requests: tuple[requests.Run, ...]
    request_seconds: float
    queues: queues.Amount
    repeats: int
    starts: int
    memory_seconds: float
    ring: str = RING


def _runs(size: pictures.Size, seconds: float) -> tuple[Run, ...]:
    return tuple(Run(size, mode, in_flight, seconds) for mode in get_args(Mode) for in_flight in (1, 8))


FULL = Plan(
    frontends=(1, 2),
    runs=_runs(pictures.VGA, 6.0) + _runs(pictures.HD, 6.0) + _runs(pictures.FULL_HD, 6.0),
    large=(
        Run(pictures.TWELVE_MEGAPIXELS, "cold", 8, 10.0),
        Run(pictures.TWELVE_MEGAPIXELS, "cached", 1, 6.0),
        Run(pictures.TWELVE_MEGAPIXELS, "cached", 8, 6.0),
    ),
    tensors=handover.TENSORS,
    answers=answers.FULL,
    fetch=fetching.FULL,
    requests=requests.FULL,
    request_seconds=5.0,
    queues=queues.FULL,
    repeats=21,
    starts=3,
    memory_seconds=3.0,
)

QUICK = Plan(
    frontends=(1,),
    runs=_runs(pictures.VGA, 0.5),
    large=(),
    tensors=handover.TENSORS[:1],
    answers=answers.QUICK,
    fetch=fetching.QUICK,
    requests=requests.QUICK,
    request_seconds=0.3,
    queues=queues.QUICK,
    repeats=3,
    starts=1,
    memory_seconds=0.5,
    ring=SMALL_RING,
)


def _tell(line: str) -> None:
    sys.stderr.write(f"== {line}\n")
    sys.stderr.flush()


def _measure(plan: Plan, wanted: set[str], directory: Path, other_model: Path | None) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    model = full_size_model(directory / "mmprep-demo")
    if "startup" in wanted:
        _tell("start-up")
        parts["startup"] = _startup(model, directory, plan)
    if "answers" in wanted:
        _tell("answers over HTTP")
        parts["answers"] = answers.measure(model, plan.answers)
    if "fetch" in wanted:
        _tell("fetching")
        parts["fetch"] = fetching.measure(model, directory, plan.fetch)
    if "requests" in wanted:
        parts["requests"] = _requests(model, directory, plan)
    if "queues" in wanted:
        _tell("queues")
        parts["queues"] = queues.measure(model, directory, plan.queues)
    if "remote" in wanted:
        _tell("tensors to another host")
        parts["remote"] = remote.measure(model, directory, plan.tensors, plan.repeats, plan.ring)
    if {"throughput", "handover", "memory"} & wanted:
        parts |= _loaded(plan, wanted, model, directory, other_model)
    return parts


def _loaded(plan: Plan, wanted: set[str], model: Path, directory: Path, other_model: Path | None) -> dict[str, Any]:
    """Return the parts that are taken from services under the same load."""
    parts: dict[str, Any] = {}
    runs, memories = [], []
    paths = throughput.write_pictures(directory, list(dict.fromkeys(r.size for r in plan.runs + plan.large)))
    costs = throughput.moving_bytes(paths, f"ipc://{directory}/echo.sock")
    for frontends in plan.frontends:
        with service(model, frontends=frontends, lanes=_LANES, cache_size=plan.ring) as running:
            if "throughput" in wanted:
                runs += _throughput(running, frontends, plan, paths)
            if "memory" in wanted and frontends == plan.frontends[-1]:
                memories.append(_memory(running, "embedded", frontends, plan, paths))
            if "handover" in wanted and frontends == plan.frontends[0]:
                _tell("hand-over")
                parts["handover"] = handover.measure(running, directory, plan.tensors, plan.repeats)
    if "memory" in wanted and other_model is not None:
        copied = full_size_model(directory / "other" / other_model.name, other_model)
        with service(copied, frontends=plan.frontends[-1], lanes=_LANES, cache_size=plan.ring) as running:
            memories.append(_memory(running, other_model.name, plan.frontends[-1], plan, paths))
    if "throughput" in wanted:
        by_size = report.cached_by_size(runs, costs)
        parts["throughput"] = {"runs": runs, "cached_by_size": by_size, "reference": report.REFERENCE}
    if "memory" in wanted:
        parts["memory"] = memories
    return parts


def _throughput(running: Service, frontends: int, plan: Plan, paths: dict[str, list[Path]]) -> list[dict[str, Any]]:
    measured = []
    for run in plan.runs + (plan.large if frontends == 1 else ()):
        _tell(f"service with {frontends} frontends: {run.size.name} {run.mode}, {run.in_flight} in flight")
        measured.append(throughput.measure(running, frontends, run, paths[run.size.name]))
    return measured


def _requests(model: Path, directory: Path, plan: Plan) -> list[dict[str, Any]]:
    """Return what requests over HTTP cost a service as it is by default, with one frontend."""
    paths = throughput.write_pictures(directory, list(dict.fromkeys(r.size for r in plan.requests if r.size)))
    measured = []
    with service(model, frontends=1, lanes=_LANES, cache_size=plan.ring) as running:
        for run in plan.requests:
            _tell(f"requests: {run.name}")
            of_size = [] if run.size is None else paths[run.size.name]
            measured.append(requests.measure(running, run, of_size, plan.request_seconds))
    return measured


def _memory(running: Service, model: str, frontends: int, plan: Plan, paths: dict[str, list[Path]]) -> dict[str, Any]:
    """Return the memory of every process after a load of each size, cold and cached."""
    _tell(f"memory with the model {model}")
    for size in (pictures.VGA, pictures.FULL_HD):
        for mode in ("cold", "cached"):
            if size.name in paths:
                throughput.measure(running, frontends, Run(size, mode, 8, plan.memory_seconds), paths[size.name])
    processes = [
        {"role": role, "pid": pid, **msgspec.to_builtins(memory(pid))}
        for role, pids in running.pids().items()
        for pid in pids
    ]
    return {"model": model, "frontends": frontends, "ring_bytes": running.ring()["capacity"], "processes": processes}


def _startup(model: Path, directory: Path, plan: Plan) -> dict[str, list[dict[str, float]]]:
    """Return what starts took with empty caches of compiled code and tokenizers, and with those that this has filled.

    Each tells the seconds to ready, the CPU time of all processes until then, and the first cold request's time beside that of later ones.
    """
    picture = pictures.jpeg(pictures.VGA)
    starts: dict[str, list[dict[str, float]]] = {"empty": [], "filled": []}
    for repeat in range(plan.starts):
        kept = str(directory / f"kept-{repeat}")
        environment = {"NUMBA_CACHE_DIR": kept, "XDG_CACHE_HOME": kept}
        for measured in starts.values():
            with service(model, frontends=2, lanes=_LANES, cache_size=plan.ring, environment=environment) as running:
                spent = sum(cpu_seconds(pid) for pids in running.pids().values() for pid in pids)
                start = {"seconds": round(running.ready_seconds, 2), "cpu_seconds": round(spent, 2)}
                measured.append(start | first.measure(running, picture))
    return starts


def main() -> None:
    """Do what the module's first line says."""
    parser = argparse.ArgumentParser(prog="mmprep.bench", description="Measure the service; generates its pictures.")
    parser.add_argument("--output", type=Path, required=True, help="file for the result, JSON")
    parser.add_argument("--kernel", type=Path, help="result of python -m mmprep_worker.bench, to be joined")
    parser.add_argument("--model", type=Path, help="directory of a second model, whose memory is measured too")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, of %(default)s")
    parser.add_argument("--quick", action="store_true", help="a smoke run of some seconds a part")
    parsed = parser.parse_args()
    wanted = set(parsed.parts.split(","))
    if not wanted <= set(PARTS):
        parser.error(f"--parts: known are {', '.join(PARTS)}")
    if parsed.model is not None and not (parsed.model / "preprocessor_config.json").is_file():
        parser.error("--model: not the directory of a model of the Qwen2-VL family")
    result: dict[str, Any] = {"mmprep": __version__, "quick": parsed.quick, "machine": machine_facts(), "parts": {}}
    started = time.monotonic()
    if parsed.kernel is not None:
        result["parts"]["kernel"] = json.loads(parsed.kernel.read_text(encoding="utf-8"))
    try:
        # Sockets lie in it, whose paths must be short.
        with tempfile.TemporaryDirectory(prefix="mmprep-bench-", dir="/tmp") as directory:
            plan = QUICK if parsed.quick else FULL
            result["parts"] |= _measure(plan, wanted, Path(directory), parsed.model)
    except MmprepError as error:
        sys.exit(f"mmprep.bench: {error}")
    result["seconds"] = round(time.monotonic() - started, 1)
    result["machine"]["load_average_after"] = machine_facts()["load_average"]
    result["targets"] = report.targets(result["parts"])
    parsed.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(report.tables(result) + "\n")


if __name__ == "__main__":
    main()
