"""``python -m mmprep_frontend.bench``: what a hit of the disk cache takes in a frontend's loop; a child of the benchmark.

From the URL to the checked bytes: policy, index, file, digest, and the way to a thread and back. One at a time, as fast
as they come.
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
#: As in a frontend.
_SWITCH_SECONDS = 0.0005


async def _measure(orders: dict[str, Any]) -> dict[str, Any]:
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


@asynccontextmanager
async def _caching(directory: str) -> AsyncIterator[MediaCache]:
    policy = UrlPolicy(allow_private=True)
    limits: dict[str, Any] = {"max_bytes": _LARGEST, "memory": MediaMemory(_LARGEST), "metrics": Metrics()}
    disk = CacheDisk(Path(directory), max_bytes=_LARGEST, ttl=3600.0)
    async with Fetcher(policy, **limits) as fetcher:
        cache = MediaCache(disk, fetcher, policy, **limits)
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
