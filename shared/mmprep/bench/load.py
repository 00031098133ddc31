"""The load generator, a process of its own: asks one service for pictures through the native client.

Every request is a chat with one picture as raw bytes; the tensors stay in shared memory and are released at once. *cold*:
every picture has bytes of its own, so that nothing is in the cache. *cached*: a few pictures, all seen before. *by uuid*:
these again, but only named.
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
from mmprep.bench.running import Mode, read_orders, say_answer, say_ready
from mmprep.client import AsyncClient, Payload

_TEXT = "What is on this picture? Answer in one sentence."


class Load:
    """Some requests in flight, for some seconds or so many of them.

    Parameters
    ----------
    part:
        Gives the part with the next request's picture.
    payload:
        What is asked for.
    """

    def __init__(self, client: AsyncClient, part: Callable[[], dict[str, Any]], *, payload: Payload = "shm") -> None:
        self._client = client
        self._part = part
        self._payload: Payload = payload
        self.latencies: list[float] = []
        self.hits = 0

    async def one(self, part: dict[str, Any] | None = None) -> None:
        """Send one request, with the next picture or that of ``part``, and wait for its answer."""
        content = [part or self._part(), {"type": "text", "text": _TEXT}]
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
    names = itertools.cycle(map(str, range(len(pictures))))
    cold = orders["mode"] == "cold"
    parts: dict[Mode, Callable[[], dict[str, Any]]] = {
        "cold": lambda: part_of(distinct(next(source), next(numbers))),
        "cached": lambda: part_of(next(source)),
        "by uuid": lambda: part_of(None, next(names)),
    }
    async with AsyncClient(f"ipc://{orders['runtime_dir']}", request_timeout=120.0) as client:
        load = Load(client, parts[orders["mode"]])
        for _ in range(orders["warm_up"] if cold else 2 * len(pictures)):
            await load.one(None if cold else part_of(next(source), next(names)))
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


def part_of(picture: bytes | str | None, uuid: str | None = None) -> dict[str, Any]:
    """Return the part with a picture, as bytes or as its URL, or with its name alone."""
    return {"type": "image_url", "image_url": {"url": picture}, "uuid": uuid}


if __name__ == "__main__":
    given = read_orders()
    asyncio.run(_measure(given, [Path(path).read_bytes() for path in given["pictures"]]))
