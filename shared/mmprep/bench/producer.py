"""The producer of the queues' measurement, a process of its own: posts chats with cached pictures, some at a time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmprep.bench.load import part_of
from mmprep.bench.running import read_orders, say_answer, say_ready
from mmprep.client import AsyncClient

_IN_FLIGHT = 8
_TEXT = {"type": "text", "text": "What is on this picture? Answer in one sentence."}


async def _post(client: AsyncClient, queue: str, pictures: Iterator[bytes], left: Iterator[int]) -> None:
    for _ in left:
        content = [part_of(next(pictures)), _TEXT]
        await client.post([{"role": "user", "content": content}], queue=queue)


async def _run(orders: dict[str, Any], known: list[bytes]) -> None:
    async with AsyncClient(f"ipc://{orders['runtime_dir']}", request_timeout=120.0) as client:
        for picture in known:
            await client.chat([{"role": "user", "content": [part_of(picture), _TEXT]}], payload="tensors")
        await asyncio.to_thread(say_ready)
        pictures, left = itertools.cycle(known), iter(range(orders["jobs"]))
        async with asyncio.TaskGroup() as group:
            for _ in range(_IN_FLIGHT):
                group.create_task(_post(client, orders["queue"], pictures, left))
    say_answer({"posted": orders["jobs"]})


if __name__ == "__main__":
    given = read_orders()
    asyncio.run(_run(given, [Path(path).read_bytes() for path in given["pictures"]]))
