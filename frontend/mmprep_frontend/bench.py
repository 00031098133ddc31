"""``python -m mmprep_frontend.bench``: what media take in a frontend's loop, without the requests; a child of the benchmark.

Hits of the disk cache, from the URL to the checked bytes: policy, index, file, digest, and the way to a thread and back;
one at a time, as fast as they come. And downloads of different URLs, from the URL to the bytes, as many at a time as a
fetcher lets one host have.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop

from mmprep.bench.running import read_orders, say_answer, say_ready
from mmprep.digest import Hasher
from mmprep.metrics import Metrics
from mmprep_frontend.media.cache import Fetched, MediaCache
from mmprep_frontend.media.cache_disk import CacheDisk
from mmprep_frontend.media.fetch import Fetcher
from mmprep_frontend.media.memory import MediaMemory
from mmprep_frontend.media.policy import UrlPolicy

_LARGEST = 64 << 20
_SCOPE = bytes(32)
_SECONDS = 60.0
_AT_A_TIME = 16
_POLICY = UrlPolicy(allow_private=True)
#: As in a frontend.
_SWITCH_SECONDS = 0.0005


async def _measure(orders: dict[str, Any]) -> dict[str, Any]:
    return await (_hits(orders) if orders["what"] == "hits" else _downloads(orders))


async def _hits(orders: dict[str, Any]) -> dict[str, Any]:
    async with _caching(orders["directory"]) as cache:
        first = await _fetch(cache, orders["url"])
        assert first.keepable is not None
        cache.keep(first.keepable, first.data, Hasher("blake3").content_digest(first.data), "blake3")
    async with _caching(orders["directory"]) as cache:
        assert not (await _fetch(cache, orders["url"])).asked
        await asyncio.to_thread(say_ready)
        times = []
        for _ in range(orders["requests"]):
            started = time.perf_counter()
            hit = await _fetch(cache, orders["url"])
            times.append(1000 * (time.perf_counter() - started))
            assert not hit.asked
    return {"bytes": len(first.data), "latencies_ms": [round(value, 4) for value in times]}


async def _downloads(orders: dict[str, Any]) -> dict[str, Any]:
    async with _fetching() as (fetcher, _):
        await _download(fetcher, f"{orders['url']}-warm", orders["warm_up"])
        await asyncio.to_thread(say_ready)
        started, used = time.perf_counter(), time.process_time()
        await _download(fetcher, orders["url"], orders["requests"])
        return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}


async def _download(fetcher: Fetcher, url: str, count: int) -> None:
    numbers = iter(range(count))

    async def some() -> None:
        for number in numbers:
            await fetcher.fetch(f"{url}/{number}")

    async with asyncio.TaskGroup() as group:
        for _ in range(_AT_A_TIME):
            group.create_task(some())


@asynccontextmanager
async def _fetching() -> AsyncIterator[tuple[Fetcher, dict[str, Any]]]:
    limits: dict[str, Any] = {"max_bytes": _LARGEST, "memory": MediaMemory(_LARGEST), "metrics": Metrics()}
    async with Fetcher(_POLICY, **limits) as fetcher:
        yield fetcher, limits


@asynccontextmanager
async def _caching(directory: str) -> AsyncIterator[MediaCache]:
    disk = CacheDisk(Path(directory), max_bytes=_LARGEST, ttl=3600.0)
    async with _fetching() as (fetcher, limits):
        cache = MediaCache(disk, fetcher, _POLICY, **limits)
        yield cache
        await cache.close()


async def _fetch(cache: MediaCache, url: str) -> Fetched:
    return await cache.fetch(url, scope=_SCOPE, param=None, timeout=_SECONDS)


def main() -> None:
    """Do what the module's first line says."""
    orders = read_orders()
    sys.setswitchinterval(_SWITCH_SECONDS)
    say_answer(uvloop.run(_measure(orders)))


if __name__ == "__main__":
    main()
