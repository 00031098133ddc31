"""One HTTP exchange with a media host: ask once, read the answer within its bounds, say in our words what went wrong.

What opens the sockets judges each address once more: whatever the client library does, nothing is dialled that was not
judged. What a host is asked is sent once: to try again is up to who asks here. No proxy from the environment, no cookies,
no credentials. A connection is kept for the next exchange with the same scheme, host and port, for a short time: it leads
to an address that was judged when it was made.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from weakref import WeakSet

import aiohttp
from yarl import URL

from mmprep.errors import FetchBadGateway, FetchError, FetchTimeout, MmprepError, TooLarge
from mmprep_frontend.media.inflate import inflater
from mmprep_frontend.media.keys import url_digest
from mmprep_frontend.media.memory import Loaded, MediaMemory, Share
from mmprep_frontend.media.names import JudgingResolver, Resolver
from mmprep_frontend.media.policy import Target, UrlPolicy
from mmprep_frontend.media.retry import read_retry_after
from mmprep_frontend.media.storing import Keeping, Validators, keeping, read_validators

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_NOT_MODIFIED: Final = 304
#: Seconds that an idle connection is kept.
_KEPT: Final = 15.0
_HEADERS: Final = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "mmprep"}

OpenSocket = Callable[[aiohttp.AddrInfoType], socket.socket]


@dataclass(frozen=True, slots=True)
class Condition:
    """A medium that is at hand already: its host need not send it again.

    Attributes
    ----------
    source: the digest of the URL that gave it, from :func:`mmprep_frontend.media.keys.url_digest`.
    """

    source: bytes
    validators: Validators


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Reply:
    """What came of a fetch; whoever uses the bytes keeps it, since it counts them.

    Attributes
    ----------
    data: the medium; ``None`` where the host says that the one at hand has not changed.
    hops: what led to it; the last one gave it.
    validators, keeping: what its headers say for a cache; ``None`` where a 304 says nothing of keeping.
    share: counts the bytes, where there are some.
    """

    data: bytes | None
    hops: tuple[Target, ...]
    validators: Validators
    keeping: Keeping | None
    share: Share | None = None


class PassingError(Exception):
    """A failure that another try may overcome.

    Attributes
    ----------
    error: what the client is told if there is no other try.
    retry_after: seconds for which the host asks to be left alone.
    lost: whether the connection ended before there was an answer, as one that was kept may do at any time.
    """

    def __init__(self, error: MmprepError, retry_after: float | None = None, *, lost: bool = False) -> None:
        super().__init__(error.message)
        self.error = error
        self.retry_after = retry_after
        self.lost = lost


class Exchange:
    """The connections to media hosts. To be made and used within one event loop.

    Parameters
    ----------
    policy:
        What may be dialled.
    max_bytes:
        Largest medium, in bytes.
    memory:
        What all media may take.
    connect_timeout, read_timeout:
        Seconds for one connection to stand, TLS included, and for the next bytes to arrive.
    most_open:
        Connections beyond which none is kept for later.
    resolver:
        What names mean.
    open_socket:
        Makes the socket for an address that is about to be dialled.
    """

    def __init__(
        self,
        policy: UrlPolicy,
        *,
        max_bytes: int,
        memory: MediaMemory,
        connect_timeout: float,
        read_timeout: float,
        most_open: int,
        resolver: Resolver,
        open_socket: OpenSocket | None = None,
    ) -> None:
        self._policy = policy
        self._max_bytes = max_bytes
        self._memory = memory
        self._most_open = most_open
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._resolver = JudgingResolver(policy, resolver)
        self._open_socket = open_socket or _open_socket
        timeouts = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout, sock_read=read_timeout)
        self._keeping = self._make_session(timeouts, keep=True)
        self._closing = self._make_session(timeouts, keep=False)

    def _make_session(self, timeouts: aiohttp.ClientTimeout, *, keep: bool) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=self._resolver,
                socket_factory=self._dial,
                use_dns_cache=False,
                force_close=not keep,
                keepalive_timeout=_KEPT if keep else None,
                limit=0,
            ),
            timeout=timeouts,
            headers=_HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            read_bufsize=2**18,
            middlewares=(_without_another_try,),
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._keeping.close()
        await self._closing.close()

    async def ask(
        self, hops: tuple[Target, ...], condition: Condition | None, grew: Callable[[int], None], *, anew: bool = False
    ) -> Reply | Target:
        """Ask one host once, over one connection; return the medium, or where it redirects to.

        Parameters
        ----------
        hops:
            What is asked, as the policy judged it, behind what led to it.
        condition:
            What is at hand. Nobody but who gave it is told.
        grew:
            Told how many bytes the medium has at least: as the host announces them, and as they come.
        anew:
            Not over a connection that was kept.

        Raises
        ------
        PassingError
            Another try makes sense.
        mmprep.errors.MmprepError
            None does.
        """
        target = hops[-1]
        headers = {}
        if condition is not None and condition.source == url_digest(target.url):
            headers = condition.validators.condition()
        try:
            session = self._closing if anew or self._is_full() else self._keeping
            async with session.get(URL(target.url, encoded=True), allow_redirects=False, headers=headers) as response:
                if response.status in _REDIRECTS:
                    return self._policy.judge_redirect(target, response.headers.get("Location", ""))
                validators, kept = _for_caches(response)
                if response.status == _NOT_MODIFIED and headers:
                    return Reply(None, hops, validators, kept if "Cache-Control" in response.headers else None)
                _check_status(response)
                read = await self._read(response, grew)
                return Reply(read.data, hops, validators, kept, read.share)
        except TimeoutError:
            raise silence() from None
        except aiohttp.ClientConnectorDNSError:
            raise FetchBadGateway("the name of the medium's host cannot be resolved") from None
        except (aiohttp.ClientSSLError, ssl.SSLError):
            raise FetchBadGateway(
                "no trusted TLS connection to the medium's host could be made: its certificate does not prove that name, has "
                "expired or is signed by nobody known, or it speaks no TLS there"
            ) from None
        except aiohttp.ClientConnectorError:
            raise PassingError(FetchBadGateway("the medium's host cannot be reached")) from None
        except aiohttp.ClientResponseError:
            raise FetchBadGateway("the medium's host did not answer with valid HTTP") from None
        except (aiohttp.ClientError, OSError):
            raise PassingError(_broken()) from None

    async def _read(self, response: aiohttp.ClientResponse, grew: Callable[[int], None]) -> Loaded:
        undo = inflater(response.headers.get("Content-Encoding", "identity"))
        announced = response.content_length or 0
        if announced > self._max_bytes:
            raise self._too_large()
        grew(announced)
        with self._memory.pieces() as pieces:
            async for chunk in response.content.iter_any():
                for piece in undo.pieces(chunk) if undo else (chunk,):
                    size = pieces.nbytes + len(piece)
                    if size > announced:
                        # First: who has less room left than any medium may have is told so, however much came at once.
                        grew(min(size, self._max_bytes + 1))
                    if size > self._max_bytes:
                        raise self._too_large()
                    pieces.add(piece)
                    if undo:
                        await asyncio.sleep(0)
            if undo:
                undo.end()
            if not pieces.nbytes:
                raise FetchError("the medium's host answered without content")
            return pieces.joined()

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the medium is larger than {self._max_bytes:,} bytes, this service's limit (--max-media-size)")

    def _dial(self, address_info: aiohttp.AddrInfoType) -> socket.socket:
        self._policy.judge_address(str(address_info[4][0]))
        opened = self._open_socket(address_info)
        self._sockets.add(opened)
        return opened

    def _is_full(self) -> bool:
        """Return whether there are as many connections as there may be, idle ones included."""
        if len(self._sockets) < self._most_open:
            return False
        for closed in [known for known in self._sockets if known.fileno() < 0]:
            self._sockets.discard(closed)
        return len(self._sockets) >= self._most_open


async def _without_another_try(
    request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Let no loss of a connection reach the client library, which would ask once more by itself, and nobody would count it."""
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise  # there was no connection
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
        raise PassingError(_broken(), lost=True) from None


def _broken() -> FetchBadGateway:
    return FetchBadGateway("the connection to the medium's host broke before the medium was complete")


def silence() -> FetchTimeout:
    """Return what is told of a host that takes too long."""
    return FetchTimeout("the medium's host did not answer, or not to the end, in time")


def _check_status(response: aiohttp.ClientResponse) -> None:
    status = response.status
    retry_after = read_retry_after(response.headers.get("Retry-After"), time.time())
    if 500 <= status < 600:
        raise PassingError(FetchBadGateway(f"the medium's host failed with status {status}"), retry_after)
    if status == 429:
        raise PassingError(FetchError(f"the medium's host answered with status {status}"), retry_after)
    # 203 is a 200 that a proxy has changed; anything else is not the whole medium.
    if status not in {200, 203}:
        raise FetchError(f"the medium's host answered with status {status}")


def _for_caches(response: aiohttp.ClientResponse) -> tuple[Validators, Keeping]:
    validators = read_validators(response.headers)
    control, vary = (", ".join(response.headers.getall(name, ())) for name in ("Cache-Control", "Vary"))
    return validators, keeping(control, vary, validators)


def _open_socket(address_info: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, *_ = address_info
    return socket.socket(family, kind, protocol)
