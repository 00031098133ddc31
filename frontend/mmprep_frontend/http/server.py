"""Serving the HTTP edge: the listening socket, its limits, and the graceful end.

Several frontend processes share one port: each binds its own socket with SO_REUSEPORT, and the kernel deals the
connections out. The supervisor keeps the port taken, and chooses it where 0 was asked for, with a socket that is bound
and never listens (:mod:`mmprep.ports`); the kernel gives such a one no connections.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiohttp import web
from aiohttp.log import access_logger

from mmprep.ports import reserve_port
from mmprep_frontend.http.app import RUNNING
from mmprep_frontend.http.connection import MAX_HEADERS, MAX_LINE, Connection

_BACKLOG: Final = 1024
#: Seconds that an answered request's unread body is still taken in, so that the client reads the answer.
_LINGER: Final = 3.0
#: Seconds between two looks for connections that have become idle, while the server ends.
_LOOK_AGAIN: Final = 0.01
#: Seconds that a cancelled request gets to end, once the grace is over.
_CLOSING: Final = 0.05
#: Bytes that are read ahead of a handler.
_READ_AHEAD: Final = 2**18


class HttpServer:
    """An application that is being served; made by :func:`serve_http`.

    Attributes
    ----------
    host, port: where it listens.
    """

    def __init__(self, runner: web.AppRunner, listener: asyncio.Server, address: tuple[Any, ...]) -> None:
        self._runner = runner
        self._listener = listener
        self.host: str = address[0]
        self.port: int = address[1]

    async def close(self, grace: float) -> None:
        """Stop listening at once, let requests under way end for ``grace`` seconds, then answer them with 503."""
        self._listener.close()
        # Requests that have arrived begin before connections without one are closed.
        await asyncio.sleep(0)
        server = self._runner.server
        if server is not None:
            await _until_idle(server, grace)
            self._runner.app[RUNNING].end()
            await _until_idle(server, _CLOSING)
            server.pre_shutdown()
            await server.shutdown(_CLOSING)
        await self._runner.cleanup()
        await self._listener.wait_closed()


async def serve_http(
    app: web.Application, host: str, port: int, *, keep_alive: float = 75.0, access_log: bool = False
) -> HttpServer:
    """Serve ``app`` and return at once.

    Parameters
    ----------
    app:
        From :func:`mmprep_frontend.http.app.make_app`.
    host, port:
        Where to listen, beside others that do with the same user's SO_REUSEPORT; port 0 lets the kernel choose.
    keep_alive:
        Seconds that a connection may wait for its next, or for its first, complete request head.
    access_log:
        Whether each request is written to the logger ``aiohttp.access``.

    Raises
    ------
    mmprep.errors.StartupError
        Nothing can listen there.
    """
    bound = reserve_port(host, port)
    runner = web.AppRunner(app, handler_cancellation=True)
    try:
        await runner.setup()
        server = runner.server
        assert server is not None

        def connection() -> Connection:
            return Connection(
                server,
                loop=loop,
                keepalive_timeout=keep_alive,
                access_log=access_logger if access_log else None,  # type: ignore[arg-type]
                max_line_size=MAX_LINE,
                max_field_size=MAX_LINE,
                max_headers=MAX_HEADERS,
                lingering_time=_LINGER,
                read_bufsize=_READ_AHEAD,
                auto_decompress=False,
            )

        loop = asyncio.get_running_loop()
        listener = await loop.create_server(connection, sock=bound, backlog=_BACKLOG)
    except BaseException:
        bound.close()
        await runner.cleanup()
        raise
    return HttpServer(runner, listener, listener.sockets[0].getsockname())


async def _until_idle(server: web.Server, seconds: float) -> None:
    """Close connections as they have no request, until there are none, for at most ``seconds``.

    The library's own shutdown stops reading from every connection at once: a body on its way would never arrive.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while True:
        busy = False
        for connection in server.connections:
            assert isinstance(connection, Connection)
            busy |= not connection.close_if_idle()
        if not busy or loop.time() >= deadline:
            return
        await asyncio.sleep(_LOOK_AGAIN)
