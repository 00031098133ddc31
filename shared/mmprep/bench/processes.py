"""What the kernel tells about processes and the machine: CPU time, memory, facts that a measurement depends on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

_TICKS = os.sysconf("SC_CLK_TCK")
_KIB = 1024
_PACKAGES = ("numpy", "numba", "pillow", "simplejpeg", "pyzmq", "msgspec", "msgpack", "tokenizers", "transformers")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used, user and system, in seconds; steps of a clock tick (10 ms)."""
    fields = stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS  # utime and stime, the line's fields 14 and 15


def stat_fields(pid: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` behind the command's name: the state, the parent's pid, and so on."""
    # The name stands in brackets and may hold spaces and brackets.
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()


class Memory(msgspec.Struct, frozen=True):
    """One process's memory, in bytes.

    Attributes
    ----------
    rss, pss: all resident pages; with shared pages divided by the number of those who map them.
    private: resident pages that are not shared memory (anonymous and of files): what the process costs beside the ring.
    shared: resident pages of shared memory: the part of the ring that this process has touched.
    """

    rss: int
    pss: int
    private: int
    shared: int


def memory(pid: int) -> Memory:
    """Return the memory of a process of this user."""
    rollup = _kib(f"/proc/{pid}/smaps_rollup")
    status = _kib(f"/proc/{pid}/status")
    return Memory(rollup["Rss"], rollup["Pss"], status["RssAnon"] + status["RssFile"], status["RssShmem"])


def forget_peak(pid: int) -> None:
    """Let the peak of a process's resident memory be what it is now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def peak(pid: int) -> int:
    """Return the most bytes that were resident in a process since :func:`forget_peak`, pages of the ring included."""
    return _kib(f"/proc/{pid}/status")["VmHWM"]


def pin(pid: int, cores: Iterable[int]) -> None:
    """Let all threads of a process, and those that they will start, run on these cores alone."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)


def _kib(path: str) -> dict[str, int]:
    """Return the lines ``Name: number kB`` of a file of /proc, in bytes."""
    sizes = {}
    for line in Path(path).read_text(encoding="ascii", errors="replace").splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            sizes[name] = int(rest.split()[0]) * _KIB
    return sizes


def machine_cpu_seconds() -> float:
    """Return the CPU time that everything has used, in seconds, with what other virtual machines took (steal)."""
    line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    user, nice, system, _idle, _waiting, hard_interrupts, soft_interrupts, steal, *_ = map(int, line.split()[1:])
    return (user + nice + system + hard_interrupts + soft_interrupts + steal) / _TICKS


def machine_facts() -> dict[str, Any]:
    """Return what the figures depend on; the load is that of the machine before anything was measured."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
