"""What host names mean: resolved once a connection, and every address judged before the client library sees it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from aiohttp.abc import AbstractResolver, ResolveResult

from mmprep_frontend.media.policy import UrlPolicy

#: Addresses of one name that are tried; all are judged.
_MAX_ADDRESSES: Final = 8


class Resolver(Protocol):
    """Turns a host name into addresses."""

    async def resolve(self, host: str) -> Sequence[str]:
        """Return the addresses of ``host``, in the order to try them; raise :class:`OSError` where there are none."""

    def close(self) -> None:
        """Give back what the resolver holds."""


class SystemResolver:
    """The system's resolver, in a few threads of its own: a name server that hangs holds up nothing but fetches."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="resolve")

    async def resolve(self, host: str) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, _getaddrinfo, host)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class JudgingResolver(AbstractResolver):
    """Gives the client library only addresses that were judged. It is not asked about hosts that are addresses.

    A name with one address that must not be dialled is refused whole.
    """

    def __init__(self, policy: UrlPolicy, resolver: Resolver) -> None:
        self._policy = policy
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        del family  # of the connector: unspecified
        addresses = await self._resolver.resolve(host)
        if not addresses:
            raise OSError("no address")
        for address in addresses:
            self._policy.judge_address(address)
        return [_resolved(host, address, port) for address in addresses[:_MAX_ADDRESSES]]

    async def close(self) -> None:
        """Nothing: whoever made the resolver closes it."""


def _resolved(host: str, address: str, port: int) -> ResolveResult:
    return ResolveResult(
        hostname=host,
        host=address,
        port=port,
        family=socket.AF_INET6 if ":" in address else socket.AF_INET,
        proto=0,
        flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
    )


def _getaddrinfo(host: str) -> list[tuple[object, object, object, object, tuple[object, ...]]]:
    try:
        return list(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG))
    except UnicodeError:
        raise OSError("not a host name") from None
