"""Fetching: URLs a second with a frontend on one core, one URL wanted by many at once, and hits of the disk cache.

Downloads and hits are also measured in a loop of their own, without the requests that they are part of.

Media host and load are processes of their own. Where there are several cores, frontends get one of them and everything
else the others, so that what is measured is one core's worth of fetching.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmprep.bench import pictures
from mmprep.bench.figures import percentiles
from mmprep.bench.pictures import Size
from mmprep.bench.processes import cpu_seconds, forget_peak, machine_cpu_seconds, memory, peak, pin
from mmprep.bench.running import RING, SMALL_RING, Child, Service, service

_FRONTENDS = (1, 2)
_LANES = 2
_WARM_UP = 20
_IN_FLIGHT = 64
_AT_ONCE = 100
_PRIVATE = ("--allow-private-networks",)
#: The picture of the measurement of hits, about 500 kB.
_HIT = pictures.FULL_HD


class Amount(NamedTuple):
    """How much is measured: sizes of the pictures, distinct URLs, hits, and the ring."""

    sizes: tuple[Size, ...]
    urls: int
    hits: int
    ring: str = RING


FULL = Amount((pictures.VGA, pictures.FULL_HD), 1000, 1000)
QUICK = Amount((pictures.VGA,), 40, 20, SMALL_RING)


def measure(model: Path, directory: Path, amount: Amount) -> dict[str, Any]:
    """Return the figures of all three.

    Parameters
    ----------
    directory:
        For pictures and disk caches.
    """
    return {
        "distinct": [_distinct(model, _picture(directory, size), size, amount) for size in amount.sizes],
        "same": [_same(model, _picture(directory, pictures.VGA), frontends, amount.ring) for frontends in _FRONTENDS],
        "hits": _hits(model, directory, amount),
    }


def _picture(directory: Path, size: Size) -> Path:
    path = directory / f"fetched-{size.name}.jpg"
    if not path.exists():
        path.write_bytes(pictures.jpeg(size))
    return path


# --- the three ----------------------------------------------------------------------------------------------------------


def _distinct(model: Path, picture: Path, size: Size, amount: Amount) -> dict[str, Any]:
    """Fetch many URLs through one frontend that has one core."""
    urls = amount.urls
    cores = sorted(os.sched_getaffinity(0))
    alone, others = (cores[:1], cores[1:]) if len(cores) > 1 else (cores, cores)
    with _media_host(picture, others) as host:
        in_loop = _in_loop(
            {"what": "downloads", "url": f"{host.url}/loop", "warm_up": _WARM_UP, "requests": urls}, alone
        )
        with service(model, frontends=1, lanes=_LANES, cache_size=amount.ring, options=_PRIVATE) as running:
            loaded = _distinct_requests(running, host, urls, alone, others)
        asked = host.stop()["distinct"]
    return {
        "size": size.name,
        "bytes": picture.stat().st_size,
        "urls": urls,
        "downloads": asked["asked"],
        "cores": {"frontend": len(alone), "others": len(others)},
        "in_loop_per_second": round(urls / in_loop["seconds"], 1),
        "in_loop_cpu_ms": round(1000 * in_loop["cpu_seconds"] / urls, 3),
        **loaded,
    }


def _distinct_requests(
    running: Service, host: _MediaHost, urls: int, alone: Sequence[int], others: Sequence[int]
) -> dict[str, Any]:
    pids = running.pids()
    for role, of_role in pids.items():
        for pid in of_role:
            pin(pid, alone if role == "frontends" else others)
    (frontend,) = pids["frontends"]
    forget_peak(frontend)
    before, busy = cpu_seconds(frontend), memory(frontend).rss
    loaded = _load(running, host, "distinct", cores=others, urls=urls, requests=urls, in_flight=_IN_FLIGHT)
    used = cpu_seconds(frontend) - before
    return {
        "per_second": round(urls / loaded["seconds"], 1),
        "frontend_cpu_ms": round(1000 * used / urls, 3),
        "rss_before": busy,
        "rss_peak": peak(frontend),
        **loaded["figures"],
    }


def _same(model: Path, picture: Path, frontends: int, ring: str) -> dict[str, Any]:
    """Ask for one URL many times at once."""
    with (
        _media_host(picture) as host,
        service(model, frontends=frontends, lanes=_LANES, cache_size=ring, options=_PRIVATE) as running,
    ):
        loaded = _load(running, host, "same", urls=1, requests=_AT_ONCE, in_flight=_AT_ONCE)
        downloads = host.stop()["same"]["asked"]
    return {"frontends": frontends, "requests": _AT_ONCE, "downloads": downloads, **loaded["figures"]}


def _hits(model: Path, directory: Path, amount: Amount) -> dict[str, Any]:
    """Time hits of the disk cache, in a loop of their own and as whole requests."""
    hits = amount.hits
    cached = directory / "media-cache"
    with _media_host(_picture(directory, _HIT)) as host:
        orders = {"what": "hits", "directory": str(cached / "loop"), "url": f"{host.url}/loop/0", "requests": hits}
        in_loop = _in_loop(orders)
        options = (*_PRIVATE, "--media-cache-dir", str(cached / "service"))
        with service(model, frontends=1, lanes=_LANES, cache_size=amount.ring, options=options) as running:
            # Kept is only what was decoded.
            _load(running, host, "service", urls=1, requests=1, in_flight=1, payload="shm")
            loaded = _load(running, host, "service", urls=1, requests=hits, in_flight=1)
        asked = host.stop()["service"]["asked"]
    return {
        "size": _HIT.name,
        "bytes": in_loop["bytes"],
        "hits": hits,
        "downloads": asked,
        "in_loop_ms": percentiles(in_loop["latencies_ms"]),
        **loaded["figures"],
    }


# --- what they share ----------------------------------------------------------------------------------------------------


class _MediaHost(NamedTuple):
    url: str
    child: Child

    def stop(self) -> dict[str, dict[str, int]]:
        """End it; return by name how often it was asked, and at how many paths."""
        self.child.stop()
        asked: dict[str, dict[str, int]] = self.child.answer()
        return asked


@contextlib.contextmanager
def _media_host(picture: Path, cores: Sequence[int] = ()) -> Iterator[_MediaHost]:
    with Child("mmprep.bench.media_host", {"picture": str(picture)}) as child:
        child.wait_ready()
        child.go()
        if cores:
            pin(child.pid, cores)
        yield _MediaHost(f"http://127.0.0.1:{child.answer()['port']}", child)


def _in_loop(orders: dict[str, Any], cores: Sequence[int] = ()) -> Any:
    """Return what is measured in a loop like a frontend's."""
    with Child("mmprep_frontend.bench", orders) as child:
        if cores:
            pin(child.pid, cores)
        child.wait_ready()
        child.go()
        return child.answer()


def _load(running: Service, host: _MediaHost, name: str, *, cores: Sequence[int] = (), **orders: Any) -> dict[str, Any]:
    """Ask, and probe ``/health`` meanwhile; return the seconds and the figures of both.

    ``other_cores_busy`` is what else the machine did meanwhile, in cores.
    """
    told = {"runtime_dir": running.runtime_dir, "url": f"{host.url}/{name}", "warm_up": _WARM_UP, **orders}
    with Child("mmprep.bench.fetch_load", told) as load, Child("mmprep.bench.probe", {"port": running.port}) as probe:
        for child in (load, probe):
            if cores:
                pin(child.pid, cores)
            child.wait_ready()
        ours = [*itertools.chain.from_iterable(running.pids().values()), host.child.pid, load.pid, probe.pid]
        busy, machine, started = sum(map(cpu_seconds, ours)), machine_cpu_seconds(), time.monotonic()
        probe.go()
        load.go()
        answer = load.answer()
        others = machine_cpu_seconds() - machine - (sum(map(cpu_seconds, ours)) - busy)
        others /= time.monotonic() - started
        probe.stop()
        health = probe.answer()
    figures = {
        "latency_ms": percentiles(answer["latencies_ms"]),
        "health_ms": percentiles(health["latencies_ms"]) | {"questions": len(health["latencies_ms"])},
        "other_cores_busy": round(max(0.0, others), 2),
    }
    return {"seconds": answer["seconds"], "figures": figures}
