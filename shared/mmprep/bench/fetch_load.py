"""The load of the fetching measurement, a process of its own: chats with one picture each, at URLs of the media host.

Only plans are asked for: what is measured is fetching, and not the decoding of what was fetched.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

from mmprep.bench.load import Load, part_of
from mmprep.bench.running import read_orders, say_answer, say_ready
from mmprep.client import AsyncClient


async def _measure(orders: dict[str, Any]) -> None:
    numbers = itertools.cycle(range(orders["urls"]))
    async with AsyncClient(f"ipc://{orders['runtime_dir']}", request_timeout=120.0) as client:
        warm = Load(client, lambda: part_of(f"{orders['url']}-warm/0"), payload="none")
        for _ in range(orders["warm_up"]):
            await warm.one()
        load = Load(client, lambda: part_of(f"{orders['url']}/{next(numbers)}"), payload=orders.get("payload", "none"))
        await asyncio.to_thread(say_ready)
        started = time.perf_counter()
        await load.some(orders["requests"], in_flight=orders["in_flight"])
        elapsed = time.perf_counter() - started
    say_answer({"seconds": elapsed, "latencies_ms": [round(1000 * latency, 4) for latency in load.latencies]})


if __name__ == "__main__":
    asyncio.run(_measure(read_orders()))
