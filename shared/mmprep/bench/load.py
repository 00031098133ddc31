"""The load generator, a process of its own: asks one service for pictures through the native client.

Every request is a chat with one picture as raw bytes; the tensors stay in shared memory and are released at once. *cold*:
every picture has bytes of its own, so that nothing is in the cache. *cached*: a few pictures, all seen before.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmprep.bench.pictures import distinct
from mmprep.bench.running import read_orders, say_answer, say_ready
from mmprep.client import AsyncClient, Payload

_TEXT = "What is on this picture? Answer in one sentence."


class Load:
    """Some requests in flight, for some seconds or so many of them.

    Parameters
    ----------
    picture:
        Gives the bytes of the next request's picture, or its URL.
    payload:
        What is asked for.
    """

    def __init__(
        self, client: AsyncClient, picture: Callable[[], bytes] | Callable[[], str], *, payload: Payload = "shm"
    ) -> None:
        self._client = client
        self._picture = picture
        self._payload: Payload = payload
        self.latencies: list[float] = []
        self.hits = 0

    async def one(self) -> None:
        """Send one request and wait for its answer."""
        content = [{"type": "image_url", "image_url": {"url": self._picture()}}, {"type": "text", "text": _TEXT}]
        started = time.perf_counter()
        result = await self._client.chat([{"role": "user", "content": content}], payload=self._payload)
        self.latencies.append(time.perf_counter() - started)
        self.hits += result.items["image"][0].cached
        result.release()

    async def run(self, in_flight: int, *, seconds: float) -> None:
        """Keep ``in_flight`` requests under way for ``seconds``."""
        end = time.perf_counter() + seconds
        await self._keep(in_flight, lambda: time.perf_counter() < end)

    async def some(self, requests: int, *, in_flight: int) -> None:
        """Send so many requests, ``in_flight`` at a time."""
        left = iter(range(requests))
        await self._keep(in_flight, lambda: next(left, None) is not None)

    async def _keep(self, in_flight: int, more: Callable[[], bool]) -> None:
        async def keep_asking() -> None:
            while more():
                await self.one()

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(keep_asking())


async def _measure(orders: dict[str, Any], pictures: list[bytes]) -> None:
    source = itertools.cycle(pictures)
    # The high bits are this process's, so that no two load generators send the same picture.
    numbers = itertools.count(os.getpid() << 32)
    cold = orders["mode"] == "cold"
    async with AsyncClient(f"ipc://{orders['runtime_dir']}", request_timeout=120.0) as client:
        load = Load(client, lambda: distinct(next(source), next(numbers)) if cold else next(source))
        for _ in range(orders["warm_up"] if cold else 2 * len(pictures)):
            await load.one()
        load.latencies.clear()
        load.hits = 0
        await asyncio.to_thread(say_ready)
        started = time.perf_counter()
        await load.run(orders["in_flight"], seconds=orders["seconds"])
        elapsed = time.perf_counter() - started
        say_answer(
            {
                "seconds": elapsed,
                "latencies_ms": [round(1000 * latency, 4) for latency in load.latencies],
                "hits": load.hits,
            }
        )


if __name__ == "__main__":
    given = read_orders()
    asyncio.run(_measure(given, [Path(path).read_bytes() for path in given["pictures"]]))
