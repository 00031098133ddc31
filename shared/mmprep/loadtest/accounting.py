"""What a load test costs and what the cache gave: CPU time of processes, and counters of ``/metrics``, over a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from mmprep.bench.processes import cpu_seconds, stat_fields

#: Names of one counter: ours, and the one that other servers have.
_QUERIES: Final = ("mmprep_mm_cache_queries_total", "vllm:mm_cache_queries_total", "vllm:mm_cache_queries")
_HITS: Final = ("mmprep_mm_cache_hits_total", "vllm:mm_cache_hits_total", "vllm:mm_cache_hits")


class CpuTime:
    """The CPU time of processes and of all that descend from them.

    A process that ends takes what it used with it; its share counts up to the last look.

    Parameters
    ----------
    pids:
        Of the processes; their descendants are found at each look.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._roots = tuple(pids)
        self._first = {pid: _used(pid) for pid in with_descendants(self._roots)}
        self._last = dict(self._first)

    def look(self) -> float:
        """Return the seconds that were used since this was made."""
        for pid in with_descendants(self._roots):
            self._last[pid] = max(_used(pid), self._last.get(pid, 0.0))
        return sum(used - self._first.get(pid, 0.0) for pid, used in self._last.items())


def with_descendants(pids: Sequence[int]) -> set[int]:
    """Return those of ``pids`` that live, with their children, and theirs."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(int(entry.name))) is not None:
            parents.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    waiting = [pid for pid in pids if _parent(pid) is not None]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += parents.get(pid, [])
    return found


def cache_counters(metrics: str) -> tuple[float, float] | None:
    """Return lookups in the cache of preprocessed media and hits from the text of ``/metrics``; None without them."""
    totals: dict[str, float] = {}
    for line in metrics.splitlines():
        if line.startswith(("mmprep_mm_cache_", "vllm:mm_cache_")):
            series, _, value = line.rpartition(" ")
            name = series.partition("{")[0]
            try:
                totals[name] = totals.get(name, 0.0) + float(value)
            except ValueError:
                continue
    for queries, hits in zip(_QUERIES, _HITS, strict=True):
        if queries in totals:
            return totals[queries], totals.get(hits, 0.0)
    return None


def _parent(pid: int) -> int | None:
    try:
        fields = stat_fields(pid)
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[1])


def _used(pid: int) -> float:
    try:
        return cpu_seconds(pid)
    except OSError:
        return 0.0
