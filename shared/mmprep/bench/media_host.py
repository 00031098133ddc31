"""A media host, a process of its own: gives one picture at every path, each time with other bytes, as fast as it can.

The first part of a path names who asks; the host tells how often each has asked, and at how many paths. ``/NAME/7`` always
gives the same bytes.
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from pathlib import Path
from typing import cast

from mmprep.bench.pictures import distinct
from mmprep.bench.running import read_orders, say_answer, say_ready

_END = b"\r\n\r\n"


class _Host(asyncio.Protocol):
    """One connection; requests come one after another."""

    _transport: asyncio.Transport

    def __init__(self, picture: bytes, asked: dict[str, list[str]]) -> None:
        self._picture = picture
        self._asked = asked
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no class of asyncio's

    def data_received(self, data: bytes) -> None:
        self._received += data
        while _END in self._received:
            request, _, self._received = self._received.partition(_END)
            path = request.split(b" ", 2)[1].decode()
            _, name, number = path.split("/")
            self._asked[name].append(number)
            body = distinct(self._picture, int(number))
            head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(body)
            self._transport.writelines((head, body))


async def _serve(picture: bytes) -> None:
    loop = asyncio.get_running_loop()
    asked: dict[str, list[str]] = defaultdict(list)
    server = await loop.create_server(lambda: _Host(picture, asked), "127.0.0.1", 0)
    say_answer({"port": server.sockets[0].getsockname()[1]})
    stopped = asyncio.Event()
    loop.add_reader(sys.stdin, stopped.set)
    await stopped.wait()
    server.close()
    say_answer({name: {"asked": len(paths), "paths": len(set(paths))} for name, paths in asked.items()})


def main() -> None:
    """Serve until told to stop."""
    picture = Path(read_orders()["picture"]).read_bytes()
    say_ready()
    import uvloop  # noqa: PLC0415 -- of the extra that the benchmark needs

    uvloop.run(_serve(picture))


if __name__ == "__main__":
    main()
