"""What the benchmark's figures say about its targets, and tables for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from mmprep.bench.figures import median
from mmprep.bench.pictures import FULL_HD, TWELVE_MEGAPIXELS, VGA

_MIB = 1 << 20

#: Requests a second of the engine's own renderer, in one process on two cores of a similar machine, 8 at once, taken on
#: another run: the scale of the thing, not a comparison.
REFERENCE = {
    "remark": "vLLM's renderer in one process on 2 cores of a similar machine, on another run; 8 in flight, no HTTP",
    "cold": {"640x480": 137, "1280x720": 70, "1920x1080": 30, "4032x3024": 3.8},
    "cached": {"640x480": 418, "1280x720": 204, "1920x1080": 178, "4032x3024": 13},
}


def targets(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every target that the parts which were measured allow to judge.

    Returns
    -------
    Dictionaries with ``target`` (what), ``limit`` (``<= 0.7``), ``reached``, ``ratio`` (reached by the limit) and ``met``.
    """
    judged = []
    for part, judge in _JUDGES.items():
        if part in parts:
            judged += list(judge(parts[part]))
    return judged


def _target(what: str, limit: float, reached: float, *, at_most: bool) -> dict[str, Any]:
    reached = round(reached, 3)
    return {
        "target": what,
        "limit": f"{'<=' if at_most else '>='} {limit:g}",
        "reached": reached,
        "ratio": round(reached / limit, 3),
        "met": reached <= limit if at_most else reached >= limit,
    }


def _kernel(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    limits = {"float32": 0.7, "uint8": 0.6}
    for row in part["runs"]:
        what = f"kernel {row['size']} {row['dtype']} from {row['source']}: time by transformers' time"
        yield _target(what, limits[row["dtype"]], row["ratio"], at_most=True)


def _throughput(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for run in part["runs"]:
        where = f"{run['size']} {run['mode']}, {run['in_flight']} in flight, {run['frontends']} frontends"
        if run["in_flight"] < 8:
            continue
        if run["mode"] == "cold":
            if run["size"] == VGA.name:
                yield _target(f"{where}: requests/s", 200, run["requests_per_second"], at_most=False)
            yield _target(f"{where}: /health p99 ms", 20, run["health_ms"]["p99"], at_most=True)
        elif run["size"] == VGA.name:
            each = run["requests_per_second"] / run["frontends"]
            yield _target(f"{where}: requests/s a frontend", 1000, each, at_most=False)
    yield from _same_for_large(part)


def _same_for_large(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A hit costs the same whatever the picture's size, apart from hashing and moving its bytes."""
    rest = {row["size"]: row for row in part["cached_by_size"]}
    for size in (FULL_HD.name, TWELVE_MEGAPIXELS.name):
        if size in rest and VGA.name in rest:
            ratio = rest[size]["rest_ms"] / rest[VGA.name]["rest_ms"]
            yield _target(f"{size} cached: latency less hash and transfer, by {VGA.name}'s", 1.2, ratio, at_most=True)


def _handover(part: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in part:
        if row["tensor"] == "50 MB":
            yield _target("50 MB by address until viewed: ms", 0.5, row["view"]["ready_ms"], at_most=True)


def _memory(part: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for service in part:
        for role, limit in (("frontends", 350), ("lanes", 250)):
            largest = max(process["private"] for process in service["processes"] if process["role"] == role)
            what = f"{service['model']}: MiB of the largest of the {role}, without the ring"
            yield _target(what, limit, largest / _MIB, at_most=True)


def _startup(part: dict[str, list[dict[str, float]]]) -> Iterator[dict[str, Any]]:
    for cache, starts in part.items():
        seconds = median([start["seconds"] for start in starts])
        yield _target(f"{cache} cache of compiled code: seconds to ready", 5, seconds, at_most=True)
        ratio = median([start["first_by_later"] for start in starts])
        yield _target(f"{cache} cache of compiled code: first cold request by later ones", 1.5, ratio, at_most=True)


def _requests(part: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in part:
        if row["limit_ms"] is not None:
            yield _target(f"{row['run']}: CPU ms a request", row["limit_ms"], row["cpu_ms"], at_most=True)
        if row["health_limit_ms"] is not None:
            yield _target(
                f"{row['run']}: /health p99 ms", row["health_limit_ms"], row["health_ms"]["p99"], at_most=True
            )


def _fetch(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in part["distinct"]:
        what = f"{row['urls']} URLs of {row['size']}, one core"
        yield _target(f"{what}: fetches/s", 300, row["in_loop_per_second"], at_most=False)
        yield _target(f"{what}: fetches/s as whole requests", 300, row["per_second"], at_most=False)
        yield _target(f"{what}: /health p99 ms", 20, row["health_ms"]["p99"], at_most=True)
    for row in part["same"]:
        what = f"one URL, {row['requests']} requests at once, {row['frontends']} frontends"
        yield _target(f"{what}: downloads", 1, row["downloads"], at_most=True)
        yield _target(f"{what}: /health p99 ms", 20, row["health_ms"]["p99"], at_most=True)
    hits = part["hits"]
    yield _target(f"hit of the disk cache, {hits['size']}: median ms", 1, hits["in_loop_ms"]["p50"], at_most=True)


def _queues(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    what = "cached one-picture jobs through a queue"
    yield _target(f"{what}: jobs by CPU seconds of the writer", 3000, part["jobs_per_writer_second"], at_most=False)
    yield _target(f"{what}: from one to the next, median ms", 0.5, part["next_job_ms"]["p50"], at_most=True)


def _remote(part: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in part:
        if row["tensor"] == "10 MB" and row["curve"]:
            what = "10 MB to another host: bandwidth by raw ZeroMQ's over tcp, both with CURVE"
            yield _target(what, 0.6, row["pull_to_raw"], at_most=False)


_JUDGES: dict[str, Callable[[Any], Iterator[dict[str, Any]]]] = {
    "kernel": _kernel,
    "throughput": _throughput,
    "handover": _handover,
    "memory": _memory,
    "startup": _startup,
    "fetch": _fetch,
    "requests": _requests,
    "queues": _queues,
    "remote": _remote,
}


def cached_by_size(runs: Iterable[dict[str, Any]], costs: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return by size what is left of a cached request's latency without hashing and moving its bytes.

    Parameters
    ----------
    runs:
        Of these, the ones with one request in flight and one frontend count.
    costs:
        Of :func:`mmprep.bench.throughput.moving_bytes`.
    """
    rows = []
    for run in runs:
        if (run["mode"], run["in_flight"], run["frontends"]) == ("cached", 1, 1):
            cost = costs[run["size"]]
            latency = run["latency_ms"]["p50"]
            rest = latency - cost["moved_and_hashed_ms"]
            rows.append({"size": run["size"], "latency_ms": latency, **cost, "rest_ms": round(rest, 4)})
    return rows


def tables(result: dict[str, Any]) -> str:
    """Return the whole result as text."""
    parts = result["parts"]
    machine = result["machine"]
    load = machine["load_average"][0]
    sections = [f"{machine['cores']} cores, {machine['cpu']}, Python {machine['python']}, load before the run {load}"]
    for name, show in _TABLES.items():
        if name in parts:
            sections.append(show(parts[name]))
    rows = [[t["target"], t["limit"], t["reached"], t["ratio"], "yes" if t["met"] else "NO"] for t in result["targets"]]
    sections.append(_table("targets", ["what", "target", "reached", "ratio", "met"], rows))
    return "\n\n".join(sections)


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"== {title}", *text])


def _kernel_table(part: dict[str, Any]) -> str:
    columns = ("size", "dtype", "source", "ours_ms", "theirs_ms", "ratio", "cpu_ratio", "user_ratio")
    rows = [[row[column] for column in columns] for row in part["runs"]]
    return _table("kernel and transformers' PIL backend; ratios of wall, CPU and user time", columns, rows)


def _throughput_table(part: dict[str, Any]) -> str:
    head = ["size", "mode", "flight", "fronts", "req/s", "p50", "p95", "p99"]
    head += ["cpu/req: front", "writer", "lanes", "client", "health p50", "p99", "max", "others"]
    rows = []
    for run in part["runs"]:
        latency, cpu, health = run["latency_ms"], run["cpu_ms_per_request"], run["health_ms"]
        rows.append(
            [run["size"], run["mode"], run["in_flight"], run["frontends"], run["requests_per_second"]]
            + [latency[name] for name in ("p50", "p95", "p99")]
            + [cpu[role] for role in ("frontends", "writer", "lanes", "client")]
            + [health[name] for name in ("p50", "p99", "max")]
            + [run["other_cores_busy"]]
        )
    text = [
        _table(
            "service, native client, shm; latency, CPU and /health in ms; others: cores that were busy with other things",
            head,
            rows,
        )
    ]
    columns = ("size", "bytes", "latency_ms", "moved_ms", "moved_and_hashed_ms", "rest_ms")
    rows = [[row[column] for column in columns] for row in part["cached_by_size"]]
    text.append(_table("cached, one in flight: what moving and hashing the bytes take", columns, rows))
    reference = part["reference"]
    rows = [[mode, *reference[mode].values()] for mode in ("cold", "cached")]
    text.append(_table(f"for scale, req/s: {reference['remark']}", ["", *reference["cold"]], rows))
    return "\n\n".join(text)


def _handover_table(part: list[dict[str, Any]]) -> str:
    head = [
        "tensor",
        "opened",
        "view",
        "view+read",
        "copy",
        "inline",
        "inline+read",
        "view/inline",
        "+read",
        "client shm",
        "tensors",
    ]
    ways = (
        ("view", "ready_ms"),
        ("view", "read_ms"),
        ("copy", "ready_ms"),
        ("inline", "ready_ms"),
        ("inline", "read_ms"),
    )
    rows = [
        [
            r["tensor"],
            r["address_opened_ms"],
            *(r[kind][stage] for kind, stage in ways),
            r["view_to_inline_ready"],
            r["view_to_inline_read"],
            r["client"]["shm_ms"],
            r["client"]["tensors_ms"],
        ]
        for r in part
    ]
    return _table("hand-over, ms", head, rows)


def _answers_table(part: list[dict[str, Any]]) -> str:
    columns = ("size", "encoding", "bytes", "requests", "cpu_ms", "cpu_to_json", "latency_to_json")
    rows = [
        [row[column] for column in columns] + [row["latency_ms"][name] for name in ("p50", "p95", "p99")]
        for row in part
    ]
    title = "answers with tensors over HTTP, cached, one in flight; ms: CPU of the service a request, and latency"
    return _table(title, [*columns, "p50", "p95", "p99"], rows)


def _memory_table(part: list[dict[str, Any]]) -> str:
    rows = [
        [service["model"], process["role"]]
        + [round(process[name] / _MIB, 1) for name in ("private", "shared", "rss", "pss")]
        for service in part
        for process in service["processes"]
    ]
    return _table("memory after the load, MiB", ["model", "process", "private", "ring touched", "rss", "pss"], rows)


def _startup_table(part: dict[str, list[dict[str, float]]]) -> str:
    columns = ("seconds", "cpu_seconds", "first_ms", "later_ms", "first_by_later")
    rows = [[cache, *(start[column] for column in columns)] for cache, starts in part.items() for start in starts]
    head = ["cache of compiled code", "s to ready", "CPU s", "first request ms", "later", "first by later"]
    return _table("start-up, and the first cold request after it", head, rows)


def _requests_table(part: list[dict[str, Any]]) -> str:
    head = ["requests over HTTP", "CPU ms", "limit", "engine's", "frontends", "writer", "lanes", "supervisor"]
    rows = [
        [row["run"], row["cpu_ms"], row["limit_ms"] or "", row["rival_ms"] or ""]
        + [row["cpu_ms_by_role"][role] for role in ("frontends", "writer", "lanes", "supervisor")]
        + [row["requests_per_second"], row["requests"], row["refused"], row["answer_bytes"]]
        + [row["latency_ms"]["p50"], "" if row["health_ms"] is None else row["health_ms"]["p99"]]
        + [row["other_cores_busy"]]
        for row in part
    ]
    title = "CPU time of all processes of the service; the engine's own server for scale, on another run"
    return _table(title, [*head, "req/s", "requests", "refused", "bytes", "p50", "health p99", "others"], rows)


def _fetch_table(part: dict[str, Any]) -> str:
    latency, health = ("p50", "p99"), ("p50", "p99", "max")
    rows = [
        [row["size"], row["bytes"], row["urls"], row["in_loop_per_second"], row["in_loop_cpu_ms"]]
        + [row["per_second"], row["frontend_cpu_ms"]]
        + [row["latency_ms"][name] for name in latency]
        + [round(row[name] / _MIB, 1) for name in ("rss_before", "rss_peak")]
        + [row["health_ms"][name] for name in health]
        + [row["other_cores_busy"]]
        for row in part["distinct"]
    ]
    head = [
        "size",
        "bytes",
        "urls",
        "alone/s",
        "cpu ms",
        "requests/s",
        "cpu ms",
        "p50",
        "p99",
        "MiB before",
        "MiB peak",
        "health p50",
        "p99",
        "max",
    ]
    text = [_table("distinct URLs, one frontend on one core; ms", [*head, "others"], rows)]
    rows = [
        [row["frontends"], row["requests"], row["downloads"]]
        + [row["latency_ms"][name] for name in latency]
        + [row["health_ms"][name] for name in health]
        for row in part["same"]
    ]
    head = ["frontends", "requests", "downloads", "p50", "p99", "health p50", "p99", "max"]
    text.append(_table("one URL, all requests at once; ms", head, rows))
    hits = part["hits"]
    rows = [
        [where, hits["size"], hits["bytes"], hits["hits"], *(hits[times][name] for name in ("p50", "p95", "p99"))]
        for where, times in (("in a loop", "in_loop_ms"), ("whole request", "latency_ms"))
    ]
    text.append(
        _table("hits of the disk cache, one at a time; ms", ["", "size", "bytes", "hits", "p50", "p95", "p99"], rows)
    )
    return "\n\n".join(text)


def _queues_table(part: dict[str, Any]) -> str:
    rows = []
    nothing: dict[str, float] = {}
    for ends, run, next_job in (("not waited for", part, nothing), ("waited for", part["waited"], part["next_job_ms"])):
        row = [ends, run["jobs"], run["jobs_per_second"], run["jobs_per_writer_second"]]
        row += [run["cpu_ms_per_job"][role] for role in ("writer", "frontends")]
        rows.append(row + [next_job.get(name, "") for name in ("p50", "p95", "p99")])
    head = ["ends", "jobs", "jobs/s", "jobs/writer s", "writer cpu ms", "frontend cpu ms", "next job p50", "p95", "p99"]
    return _table("cached one-picture jobs through a queue; ms", head, rows)


def _remote_table(part: list[dict[str, Any]]) -> str:
    columns = (
        "tensor",
        "bytes",
        "curve",
        "raw_ms",
        "pull_ms",
        "raw_mb_per_second",
        "pull_mb_per_second",
        "pull_to_raw",
    )
    rows = [[row[column] for column in columns] for row in part]
    return _table("tensors over tcp on the loopback: raw ZeroMQ, and a remote backend's pull", columns, rows)


_TABLES: dict[str, Callable[[Any], str]] = {
    "kernel": _kernel_table,
    "throughput": _throughput_table,
    "handover": _handover_table,
    "answers": _answers_table,
    "memory": _memory_table,
    "startup": _startup_table,
    "fetch": _fetch_table,
    "requests": _requests_table,
    "queues": _queues_table,
    "remote": _remote_table,
}
