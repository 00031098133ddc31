"""Fetching media over http(s) without being led inside. A thin shell around :mod:`mmprep_frontend.media.policy`.

For each hop: judge the URL, take a slot, resolve the name once, judge every address it gave, and hand those addresses
to the connection, so that there is no second resolution which could answer otherwise. A name with one bad address is
refused whole. Redirects are followed by hand, each judged like a first URL. What opens the sockets judges once more:
whatever the library below does, nothing is dialled that was not judged.

No proxy from the environment, no cookies, no credentials. A connection is kept for the next fetch from the same scheme,
host and port, for a short time: it leads to an address that was judged when it was made.

Who asks for a URL that is on its way already waits for that one flight. It goes on while anybody waits, so its deadline is
the latest of theirs; everybody leaves at their own. A host that fails or is overloaded, and a connection that is lost,
get another try, as :mod:`mmprep_frontend.media.retry` decides.

Bounds: bytes (announced and counted, after decompression), time (total, connecting, between two reads), redirects,
tries, connections in all and per host, idle ones, and fetches that wait for one.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol, Self, TypeAlias
from weakref import WeakSet

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from mmprep.errors import Busy, FetchBadGateway, FetchError, FetchTimeout, MmprepError, ServiceUnavailable, TooLarge
from mmprep_frontend.media.allowance import Hold
from mmprep_frontend.media.policy import Target, UrlPolicy
from mmprep_frontend.media.retry import RetryPolicy, read_retry_after
from mmprep_frontend.media.storing import Keeping, Validators, keeping, read_validators

MAX_REDIRECTS: Final = 5
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_NOT_MODIFIED: Final = 304
#: Addresses of one name that are tried; all are judged.
_MAX_ADDRESSES: Final = 8
#: Seconds that an idle connection is kept.
_KEPT: Final = 15.0
_BUSY: Final = "too many media are being fetched at the moment; try again"
#: Largest step of decompression, bytes; between two steps the event loop moves on.
_PIECE: Final = 2**18
_HEADERS: Final = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "mmprep"}

OpenSocket = Callable[[aiohttp.AddrInfoType], socket.socket]


@dataclass(frozen=True, slots=True)
class Condition:
    """A medium that is at hand already, from ``url``: its host need not send it again."""

    url: str
    validators: Validators


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a fetch.

    Attributes
    ----------
    data: the medium; ``None`` where the host says that the one at hand has not changed.
    hops: the URLs that led to it, in normal form; the last one gave it.
    validators, keeping: what its headers say for a cache; ``None`` where a 304 says nothing of keeping.
    """

    data: bytes | None
    hops: tuple[str, ...]
    validators: Validators
    keeping: Keeping | None


#: What a flight is shared by: who has something at hand does not wait with those who have not.
_Course: TypeAlias = tuple[str, Condition | None]


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


class Fetcher:
    """Fetches media, as far as a policy lets it. To be made and used within one event loop.

    Parameters
    ----------
    policy:
        What may be read.
    max_bytes:
        Largest medium, in bytes, ``--max-media-size``.
    timeout:
        Seconds for one fetch in all, redirects and waiting included.
    connect_timeout, read_timeout:
        Seconds for one connection to stand, TLS included, and for the next bytes to arrive.
    connections, connections_per_host:
        At most so many in use at a time. None is kept for later while twice ``connections`` are open.
    waiting:
        At most so many fetches wait for a connection; the next one is refused at once.
    retry:
        Which failures get another try, and when.
    chance:
        Gives random numbers from 0 up to and without 1.
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
        timeout: float = 30.0,
        connect_timeout: float = 5.0,
        read_timeout: float = 10.0,
        connections: int = 64,
        connections_per_host: int = 16,
        waiting: int = 1024,
        retry: RetryPolicy | None = None,
        chance: Callable[[], float] = random.random,
        resolver: Resolver | None = None,
        open_socket: OpenSocket | None = None,
    ) -> None:
        self._policy = policy
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._slots = _Slots(connections, connections_per_host, waiting)
        self._flights: dict[_Course, _Flight] = {}
        self._retry = retry or RetryPolicy()
        self._chance = chance
        # As many idle ones as may be in use; beyond, a connection serves one request.
        self._most_open = 2 * connections
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._resolver = resolver or SystemResolver()
        self._open_socket = open_socket or _open_socket
        timeouts = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout, sock_read=read_timeout)
        self._keeping = self._make_session(timeouts, keep=True)
        self._closing = self._make_session(timeouts, keep=False)

    def _make_session(self, timeouts: aiohttp.ClientTimeout, *, keep: bool) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=_JudgingResolver(self._policy, self._resolver),
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
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection. Fetches under way fail."""
        flights = [flight.task for flight in self._flights.values()]
        for task in flights:
            task.cancel()
        if flights:
            await asyncio.wait(flights)
        await self._keeping.close()
        await self._closing.close()
        self._resolver.close()

    async def fetch(
        self, url: str, *, param: str | None = None, timeout: float | None = None, hold: Hold | None = None
    ) -> bytes:
        """Return the bytes that lie at ``url``. Where the last who waits for them is cancelled, the connection closes.

        Parameters
        ----------
        url:
            As the request holds it; it is judged here.
        param:
            The place in the request; every error names it.
        timeout:
            Seconds that are left for it, where that is less than the fetcher's own.
        hold:
            Told the bytes of the medium as far as they are known: as the host announces them, and as they come. What it
            raises is raised here, and whoever else waits for the same URL goes on.

        Raises
        ------
        mmprep.errors.InvalidRequest, mmprep.errors.Forbidden
            The URL, a redirect, or an address behind them must not be read.
        mmprep.errors.FetchError
            The host answered, and not with a medium.
        mmprep.errors.FetchBadGateway
            The host is unknown, unreachable, broken, or not to be trusted.
        mmprep.errors.FetchTimeout
            The host was silent, or too slow.
        mmprep.errors.TooLarge
            More than ``max_bytes``.
        mmprep.errors.Busy
            Too many fetches at the moment.
        mmprep.errors.ServiceUnavailable
            The fetcher was closed meanwhile.
        """
        reply = await self.ask(url, param=param, timeout=timeout, hold=hold)
        assert reply.data is not None
        return reply.data

    async def ask(
        self,
        url: str,
        *,
        param: str | None = None,
        timeout: float | None = None,
        condition: Condition | None = None,
        hold: Hold | None = None,
    ) -> Reply:
        """Return what lies at ``url`` with what its host says about keeping it; errors as of :meth:`fetch`.

        Parameters
        ----------
        condition:
            What is at hand; the host is asked only where the way still leads to the same URL.
        """
        seconds = self._timeout if timeout is None else min(timeout, self._timeout)
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            return await self._share(self._policy.judge_url(url), deadline, condition, hold)
        except MmprepError as error:
            if param is not None:
                error.at(param)
            raise

    async def _share(self, target: Target, deadline: float, condition: Condition | None, hold: Hold | None) -> Reply:
        """Wait for the flight to ``target`` until ``deadline``, or until it is too large for who waits; start it where
        there is none.
        """
        course = (target.url, condition)
        flight = self._flights.get(course)
        if flight is None:
            flight = self._flights[course] = _Flight(deadline)
            flight.task = asyncio.create_task(self._fly(target, flight, condition))
            flight.task.add_done_callback(lambda _: self._landed(course, flight))
        flight.waiting += 1
        flight.deadline = max(flight.deadline, deadline)
        beyond: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            if hold is not None:
                flight.watch(beyond, hold)
            await asyncio.wait(
                (flight.task, beyond),
                timeout=deadline - asyncio.get_running_loop().time(),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            flight.waiting -= 1
            flight.watching.pop(beyond, None)
            if beyond.done():
                beyond.exception()  # looked at, even where who waited was cancelled
            if not flight.waiting and not flight.task.done():
                # Who comes now must not join what is being given up.
                self._landed(course, flight)
                flight.task.cancel()
        if beyond.done():
            beyond.result()
        if not flight.task.done():
            raise flight.too_late()
        if flight.task.cancelled():
            raise ServiceUnavailable("the service is stopping")
        error = flight.task.exception()
        if error is not None:
            raise _own(error)
        return flight.task.result()

    def _landed(self, course: _Course, flight: _Flight) -> None:
        if self._flights.get(course) is flight:
            del self._flights[course]
        if flight.task.done() and not flight.task.cancelled():
            flight.task.exception()  # looked at, even where nobody waits any more

    async def _fly(self, target: Target, flight: _Flight, condition: Condition | None) -> Reply:
        failed = 0
        hops: tuple[str, ...] = (target.url,)
        while True:
            try:
                flight.queued = True
                async with self._slots.hold(target.host):
                    flight.queued = False
                    answer = await self._hop(target, hops, condition, flight)
            except _PassingError as passing:
                failed += 1
                flight.error = passing.error
                pause = self._retry.pause(
                    failed,
                    left=flight.deadline - asyncio.get_running_loop().time(),
                    chance=self._chance(),
                    retry_after=passing.retry_after,
                )
                if pause is None:
                    raise passing.error from None
                await asyncio.sleep(pause)
                continue
            if isinstance(answer, Reply):
                return answer
            if len(hops) > MAX_REDIRECTS:
                raise FetchError(f"the host redirects more than {MAX_REDIRECTS} times")
            target = answer
            hops += (target.url,)

    async def _hop(
        self, target: Target, hops: tuple[str, ...], condition: Condition | None, flight: _Flight
    ) -> Reply | Target:
        """Ask one host once; return the medium, or where it redirects to."""
        # Nobody but who gave it is told what is at hand.
        headers = condition.validators.condition() if condition and condition.url == target.url else {}
        try:
            session = self._keeping if self._open_sockets() < self._most_open else self._closing
            async with session.get(URL(target.url, encoded=True), allow_redirects=False, headers=headers) as response:
                if response.status in _REDIRECTS:
                    return self._policy.judge_redirect(target, response.headers.get("Location", ""))
                validators, kept = _for_caches(response)
                if response.status == _NOT_MODIFIED and headers:
                    return Reply(None, hops, validators, kept if "Cache-Control" in response.headers else None)
                _check_status(response)
                return Reply(await self._read(response, flight), hops, validators, kept)
        except TimeoutError:
            raise _silence() from None
        except aiohttp.ClientConnectorDNSError:
            raise FetchBadGateway("the name of the medium's host cannot be resolved") from None
        except (aiohttp.ClientSSLError, ssl.SSLError):
            raise FetchBadGateway("no trusted TLS connection to the medium's host could be made") from None
        except aiohttp.ClientConnectorError:
            raise _PassingError(FetchBadGateway("the medium's host cannot be reached")) from None
        except aiohttp.ClientResponseError:
            raise FetchBadGateway("the medium's host did not answer with valid HTTP") from None
        except (aiohttp.ClientError, OSError):
            raise _PassingError(
                FetchBadGateway("the connection to the medium's host broke before the medium was complete")
            ) from None

    async def _read(self, response: aiohttp.ClientResponse, flight: _Flight) -> bytes:
        inflater = _inflater(response.headers.get("Content-Encoding", "identity"))
        announced = response.content_length or 0
        if announced > self._max_bytes:
            raise self._too_large()
        flight.grew(announced)
        pieces: list[bytes] = []
        size = 0
        async for chunk in response.content.iter_any():
            for piece in _inflate(inflater, chunk) if inflater else (chunk,):
                size += len(piece)
                if size > self._max_bytes:
                    raise self._too_large()
                if size > announced:
                    flight.grew(size)
                pieces.append(piece)
                if inflater:
                    await asyncio.sleep(0)
        if inflater and not inflater.eof:
            raise FetchError("the compressed data that the medium's host sent are cut off")
        if not size:
            raise FetchError("the medium's host answered without content")
        return b"".join(pieces)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the medium is larger than {self._max_bytes:,} bytes, this service's limit (--max-media-size)")

    def _dial(self, address_info: aiohttp.AddrInfoType) -> socket.socket:
        self._policy.judge_address(str(address_info[4][0]))
        opened = self._open_socket(address_info)
        self._sockets.add(opened)
        return opened

    def _open_sockets(self) -> int:
        """Return the number of connections, idle ones included."""
        for closed in [known for known in self._sockets if known.fileno() < 0]:
            self._sockets.discard(closed)
        return len(self._sockets)


class _Flight:
    """One download and those who wait for it.

    Attributes
    ----------
    task: gives the medium, or how it failed.
    deadline: the latest of those who wait, in the loop's time.
    waiting: how many wait.
    queued: whether it has no connection yet.
    error: how the last try failed.
    watching: who is told how large it is, by what tells him that it is too large for him.
    """

    task: asyncio.Task[Reply]

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.waiting = 0
        self.queued = True
        self.error: MmprepError | None = None
        self.watching: dict[asyncio.Future[None], Hold] = {}
        self._size = 0

    def watch(self, beyond: asyncio.Future[None], hold: Hold) -> None:
        """Tell ``hold`` of the size from now on; what it raises becomes the exception of ``beyond``."""
        self.watching[beyond] = hold
        self._tell(beyond, hold)

    def grew(self, size: int) -> None:
        """The medium has so many bytes at least."""
        self._size = size
        for beyond, hold in self.watching.items():
            self._tell(beyond, hold)

    def _tell(self, beyond: asyncio.Future[None], hold: Hold) -> None:
        if beyond.done():
            return
        try:
            hold(self._size)
        except MmprepError as error:
            beyond.set_exception(error)

    def too_late(self) -> BaseException:
        """Return what to tell one whose time is over: what the host said, where it has said something."""
        if self.error is not None:
            return _own(self.error)
        return Busy(_BUSY, retry_after=1.0) if self.queued else _silence()


class _PassingError(Exception):
    """A failure that another try may overcome.

    Attributes
    ----------
    error: what the client is told if there is no other try.
    retry_after: seconds for which the host asks to be left alone.
    """

    def __init__(self, error: MmprepError, retry_after: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.retry_after = retry_after


class _JudgingResolver(AbstractResolver):
    """Gives the client library only addresses that were judged. It is not asked about hosts that are addresses."""

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
        """Nothing: the fetcher closes its resolver itself."""


class _Slots:
    """How many fetches may be under way: in all, for one host, and waiting. First come, first served where it fits."""

    def __init__(self, total: int, per_host: int, waiting: int) -> None:
        self._free = total
        self._per_host = per_host
        self._max_waiting = waiting
        self._held: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def hold(self, host: str) -> AsyncIterator[None]:
        await self._acquire(host)
        try:
            yield
        finally:
            self._release(host)

    def _fits(self, host: str) -> bool:
        return self._free > 0 and self._held[host] < self._per_host

    def _take(self, host: str) -> None:
        self._free -= 1
        self._held[host] += 1

    def _release(self, host: str) -> None:
        self._free += 1
        self._held[host] -= 1
        if not self._held[host]:
            del self._held[host]
        for index, (waiting_host, granted) in enumerate(self._waiting):
            if self._fits(waiting_host):
                del self._waiting[index]
                self._take(waiting_host)
                granted.set_result(None)
                return

    async def _acquire(self, host: str) -> None:
        # Nobody who waits fits, else the last release would have taken it in: whoever fits overtakes nobody.
        if self._fits(host):
            self._take(host)
            return
        if len(self._waiting) >= self._max_waiting:
            raise Busy(_BUSY, retry_after=1.0)
        entry = (host, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        try:
            await entry[1]
        except BaseException:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                # Granted and given up in the same turn of the loop.
                self._release(host)
            raise


def _own(error: BaseException) -> BaseException:
    """Return ``error`` for one of several who are told it: each names another place in another request."""
    return type(error)(error.message, retry_after=error.retry_after) if isinstance(error, MmprepError) else error


def _silence() -> FetchTimeout:
    return FetchTimeout("the medium's host did not answer, or not to the end, in time")


def _check_status(response: aiohttp.ClientResponse) -> None:
    status = response.status
    retry_after = read_retry_after(response.headers.get("Retry-After"), time.time())
    if 500 <= status < 600:
        raise _PassingError(FetchBadGateway(f"the medium's host failed with status {status}"), retry_after)
    if status == 429:
        raise _PassingError(FetchError(f"the medium's host answered with status {status}"), retry_after)
    # 203 is a 200 that a proxy has changed; anything else is not the whole medium.
    if status not in {200, 203}:
        raise FetchError(f"the medium's host answered with status {status}")


def _for_caches(response: aiohttp.ClientResponse) -> tuple[Validators, Keeping]:
    validators = read_validators(response.headers)
    control, vary = (", ".join(response.headers.getall(name, ())) for name in ("Cache-Control", "Vary"))
    return validators, keeping(control, vary, validators)


def _inflater(encoding: str) -> zlib._Decompress | None:
    """Return what undoes a content coding that was not asked for, ``None`` where there is none."""
    match encoding.strip().lower():
        case "identity" | "":
            return None
        case "gzip" | "x-gzip" | "deflate":
            return zlib.decompressobj(zlib.MAX_WBITS | 32)
        case _:
            raise FetchError("the medium's host sent a content coding that was not asked for")


def _inflate(inflater: zlib._Decompress, chunk: bytes) -> Iterator[bytes]:
    """Yield what ``chunk`` decompresses to, in bounded pieces."""
    try:
        while True:
            if inflater.eof and chunk:
                raise FetchError("the medium's host sent something behind its compressed data")
            piece = inflater.decompress(chunk, _PIECE)
            yield piece
            chunk = inflater.unconsumed_tail or inflater.unused_data
            # A full piece may have left something behind even where all of the input is consumed.
            if not chunk and (inflater.eof or len(piece) < _PIECE):
                return
    except zlib.error:
        raise FetchError("the medium's host sent broken compressed data") from None


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


def _open_socket(address_info: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, *_ = address_info
    return socket.socket(family, kind, protocol)
