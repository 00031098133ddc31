"""The reader's side: an engine that uses tensors where they lie, and pulls jobs from queues.

A backend registers under an id. Addresses that HTTP answers carry are leased to such an id, and whoever holds the
registration turns them into items. A backend that names queues is given their jobs, with their tensors leased to it. The
registration dies with its process, however it ends, and its leases and deliveries with it.

:class:`AsyncBackend` does the work; :class:`Backend` is the same for programs without an event loop.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import zmq

from mmprep.address import Address, parse_address
from mmprep.errors import InvalidRequest
from mmprep.item import Item, Runner
from mmprep.job import Asker, AsyncJob, Job
from mmprep.loop_thread import LoopThread
from mmprep.pulling import Pulling
from mmprep.reading import LocalReader, Reader
from mmprep.remote.curve import RemoteKeys
from mmprep.remote.endpoint import TcpEndpoint
from mmprep.remote.place import is_remote, place_of
from mmprep.remote.reader import RemoteReader
from mmprep.runtime import Endpoint, RuntimeDir
from mmprep.wire.messages import LeaseKind

_CONNECT_SECONDS = 10.0
_CREDITS = 4
_RECEIVE_LIMIT = 4 << 30

Transport = Literal["auto", "tcp"]


class AsyncBackend:
    """A registered reader of the shared memory on the running asyncio loop.

    Parameters
    ----------
    endpoint:
        ``ipc://`` and a runtime directory; by default the one that ``mmprep serve`` uses by default. Or the
        ``--remote-endpoint`` of a service, as ``tcp://host:7790``: from another host tensors are received, in one copy that is
        this process's own.
    id:
        The name that requests give as ``backend_id``; by default a fresh one.
    queue:
        The queue, or the queues, that it pulls jobs from; by default none.
    credits:
        How many jobs may be with it at a time, those that wait for the program included; at most 128.
    curve_key_file, curve_server_key_file:
        For ``tcp://``: the file of this backend's secret key, and that of the service's public key; see ``mmprep keys``.
    allow_plain:
        Connect by ``tcp://`` without keys: nothing is encrypted, and anybody on the way can read and change it. Without
        it this is only done within one host.
    transport:
        ``"auto"``: a ``tcp://`` endpoint of a service on this very host leads to its shared memory. ``"tcp"``: tensors are
        received also there.
    receive_limit:
        Bytes of received tensors that may be here at a time; what finds no room waits until items are released.

    Raises
    ------
    ServiceUnavailable
        No service answers.
    AuthenticationError
        The keys are not those of the service, or it does not let this backend in.
    InvalidRequest
        A living process has the id, or a queue's name or the credits are wrong.

    Examples
    --------
    >>> async with AsyncBackend("ipc:///run/user/0/mmprep", queue="engine-0", credits=4) as backend:  # doctest: +SKIP
    ...     async for job in backend:
    ...         async with job.view() as items:
    ...             pixels = items["image"][0]["pixel_values"]
    ...         await job.ack()
    """

    def __init__(
        self,
        endpoint: Endpoint | None = None,
        *,
        id: str | None = None,  # noqa: A002 -- interface
        queue: str | Sequence[str] | None = None,
        credits: int = _CREDITS,  # noqa: A002 -- interface
        curve_key_file: str | Path | None = None,
        curve_server_key_file: str | Path | None = None,
        allow_plain: bool = False,
        transport: Transport = "auto",
        receive_limit: int = _RECEIVE_LIMIT,
        _run: Runner | None = None,
        _ask: Asker | None = None,
    ) -> None:
        self.id = id or f"backend-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._keys = RemoteKeys.read(curve_key_file, curve_server_key_file, allow_plain=allow_plain)
        self._place: RuntimeDir | TcpEndpoint = _place(endpoint, self._keys, transport)
        if receive_limit < 1:
            raise InvalidRequest("'receive_limit' is a number of bytes, 1 or more", param="receive_limit")
        self._receives = transport == "tcp"
        self._receive_limit = receive_limit
        self._queues = (queue,) if isinstance(queue, str) else queue
        self._credits = credits
        self._run = _run
        self._ask = _ask
        self._context: zmq.Context[Any] | None = None
        self._reader: Reader | None = None
        self._pulling: Pulling | None = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Register; as a context manager it does so by itself."""
        self._context = zmq.Context()
        try:
            self._reader = await self._register(self._context)
            if self._pulling is not None:
                await self._pulling.begin()
        except BaseException:
            await self.close()
            raise

    async def _register(self, context: zmq.Context[Any]) -> Reader:
        place = self._place
        if isinstance(place, TcpEndpoint):
            remote = self._remote(context, place, self._new_pulling())
            await self._opened(remote)
            if remote.near is None:
                return remote
            await remote.close()
            place = remote.near
        return await self._opened(LocalReader(context, place, self.id, self._new_pulling(), self._run))

    def _new_pulling(self) -> Pulling | None:
        if self._queues is not None:
            self._pulling = Pulling(self._queues, self._credits, self._run, ask=self._ask)
        return self._pulling

    def _remote(self, context: zmq.Context[Any], endpoint: TcpEndpoint, pulls: Pulling | None) -> RemoteReader:
        return RemoteReader(
            context,
            endpoint,
            self._keys,
            self.id,
            pulls=pulls,
            queues=self._queues or (),
            credits=self._credits if self._queues else 0,
            receive_limit=self._receive_limit,
            receives=self._receives,
            run=self._run,
        )

    async def _opened(self, reader: Reader) -> Reader:
        self._reader = reader
        if self._pulling is not None:
            self._pulling.use(reader)
        await reader.ready(_CONNECT_SECONDS)
        return reader

    async def close(self) -> None:
        """Give jobs back, release every lease and leave; again is no error.

        A job that the program has and has not ended counts as failed.
        """
        reader, self._reader = self._reader, None
        if reader is not None:
            if self._pulling is not None:
                await self._pulling.close()
            await reader.close()
        context, self._context = self._context, None
        if context is not None:
            context.destroy(linger=0)

    # --- jobs -----------------------------------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AsyncJob:
        job = await self.pull()
        if job is None:
            raise StopAsyncIteration
        return job

    async def pull(self, timeout: float | None = None) -> AsyncJob | None:
        """Return the next job; ``None`` where none comes within ``timeout`` seconds, or when the backend drains."""
        try:
            async with asyncio.timeout(timeout):
                job: AsyncJob | None = await self.pulling.take()
                return job
        except TimeoutError:
            return None

    async def drain(self) -> None:
        """Take no more jobs: those that the program does not have go back, and iterating ends.

        Jobs that the program has can be ended as before.
        """
        await self.pulling.drain()

    @property
    def pulling(self) -> Pulling:
        """Its part in queues; raises InvalidRequest where it pulls from none."""
        if self._pulling is None:
            raise InvalidRequest("this backend pulls from no queue: name one, Backend(queue=…)", param="queue")
        return self._pulling

    # --- addresses ------------------------------------------------------------------------------------------------

    def open_now(self, address: Address | Mapping[str, Any]) -> Item | None:
        """Return the item at an address where that takes no word with the service, else ``None``; see :meth:`open`.

        May be called from any thread.
        """
        parsed = parse_address(address)
        return None if parsed.lease is None else self._registered().open_now(parsed)

    async def open(self, address: Address | Mapping[str, Any]) -> Item:
        """Return the item at an address that is leased to this backend, and keep its lease renewed.

        Parameters
        ----------
        address:
            As in an answer's ``mm_addresses``. One whose lease is over, was granted to a process before this one or
            belongs to another address, and one without a lease, is leased anew, as by :meth:`acquire`.

        Raises
        ------
        StaleAddress
            The content is gone.
        InvalidRequest
            Not an address.
        """
        parsed = parse_address(address)
        if parsed.lease is None:
            return await self.acquire(parsed)
        return await self._registered().open(parsed)

    async def acquire(self, address: Address | Mapping[str, Any], *, kind: LeaseKind = "copy") -> Item:
        """Lease the content of an address to this backend and return the item.

        Parameters
        ----------
        kind:
            ``"copy"``: may be revoked when it is not renewed in time; ``"view"``: never while this process lives.

        Raises
        ------
        StaleAddress
            The content is gone.
        """
        if kind not in get_args(LeaseKind):
            raise InvalidRequest('\'kind\' is "copy" or "view"', param="kind")
        return await self._registered().acquire(parse_address(address), kind)

    async def renew(self, *addresses: Address | Mapping[str, Any]) -> list[bool]:
        """Prolong leases now, beside the renewal in the background; returns for each whether it still holds.

        Raises
        ------
        InvalidRequest
            An address has no lease.
        """
        leases = []
        for address in addresses:
            lease = parse_address(address).lease
            if lease is None:
                raise InvalidRequest("an address without a lease cannot be renewed; acquire it first", param="address")
            leases.append(bytes.fromhex(lease))
        lost = await self._registered().renew(tuple(leases))
        return [lease not in lost for lease in leases]

    def release(self, *addresses: Address | Mapping[str, Any]) -> None:
        """End leases; those that are over already are passed over. May be called from any thread.

        A view that an item has taken up ends with the item: an address may have come twice.
        """
        for address in addresses:
            lease = parse_address(address).lease
            if lease is not None:
                self._registered().drop(bytes.fromhex(lease))

    def _registered(self) -> Reader:
        if self._reader is None:
            raise InvalidRequest("this backend is closed")
        return self._reader


class Backend:
    """A registered reader of the shared memory; may be used from several threads. See :class:`AsyncBackend`.

    Examples
    --------
    >>> with Backend("ipc:///run/user/0/mmprep", id="engine-0") as backend:  # doctest: +SKIP
    ...     item = backend.open(answer["features"]["mm_addresses"]["image"][0])
    ...     with item.view() as arrays:
    ...         pixels = arrays["pixel_values"]
    ...     item.release()

    >>> with Backend("ipc:///run/user/0/mmprep", queue="engine-0", credits=4) as backend:  # doctest: +SKIP
    ...     for job in backend:
    ...         with job.view() as items:
    ...             pixels = items["image"][0]["pixel_values"]
    ...         job.ack()
    """

    def __init__(
        self,
        endpoint: Endpoint | None = None,
        *,
        id: str | None = None,  # noqa: A002 -- interface
        queue: str | Sequence[str] | None = None,
        credits: int = _CREDITS,  # noqa: A002 -- interface
        curve_key_file: str | Path | None = None,
        curve_server_key_file: str | Path | None = None,
        allow_plain: bool = False,
        transport: Transport = "auto",
        receive_limit: int = _RECEIVE_LIMIT,
    ) -> None:
        self._thread = LoopThread("mmprep-backend")
        try:
            self._backend = AsyncBackend(
                endpoint,
                id=id,
                queue=queue,
                credits=credits,
                curve_key_file=curve_key_file,
                curve_server_key_file=curve_server_key_file,
                allow_plain=allow_plain,
                transport=transport,
                receive_limit=receive_limit,
                _run=self._thread.run,
                _ask=self._thread.ask,
            )
            self._thread.run(self._backend.connect())
        except BaseException:
            self._thread.stop()
            raise
        self.id = self._backend.id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give jobs back, release every lease and leave; see :meth:`AsyncBackend.close`."""
        if self._thread.stopped:
            return
        self._thread.run(self._backend.close())
        self._thread.stop()

    # --- jobs -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Job:
        job = self.pull()
        if job is None:
            raise StopIteration
        return job

    def pull(self, timeout: float | None = None) -> Job | None:
        """Return the next job; see :meth:`AsyncBackend.pull`. Several threads may wait at once."""
        pulling = self._backend.pulling
        until = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            job: Job | None = pulling.take_now()
            if job is not None or pulling.draining:
                return job
            try:
                self._thread.ask(pulling.wait, seconds=until - time.monotonic())
            except TimeoutError:
                return None

    def drain(self) -> None:
        """Take no more jobs; see :meth:`AsyncBackend.drain`. It ends the iterations of all threads."""
        self._thread.run(self._backend.drain())

    # --- addresses ------------------------------------------------------------------------------------------------

    def open(self, address: Address | Mapping[str, Any]) -> Item:
        """Return the item at an address that is leased to this backend; see :meth:`AsyncBackend.open`."""
        item: Item = self._backend.open_now(address) or self._thread.run(self._backend.open(address))
        return item

    def acquire(self, address: Address | Mapping[str, Any], *, kind: LeaseKind = "copy") -> Item:
        """Lease the content of an address to this backend; see :meth:`AsyncBackend.acquire`."""
        item: Item = self._thread.run(self._backend.acquire(address, kind=kind))
        return item

    def renew(self, *addresses: Address | Mapping[str, Any]) -> list[bool]:
        """Prolong leases now; see :meth:`AsyncBackend.renew`."""
        held: list[bool] = self._thread.run(self._backend.renew(*addresses))
        return held

    def release(self, *addresses: Address | Mapping[str, Any]) -> None:
        """End leases; those that are over already are passed over."""
        self._backend.release(*addresses)


def _place(endpoint: Endpoint | None, keys: RemoteKeys, transport: Transport) -> RuntimeDir | TcpEndpoint:
    """Return where the service is; raises InvalidRequest where what was given does not go together."""
    if transport not in get_args(Transport):
        raise InvalidRequest('\'transport\' is "auto" or "tcp"', param="transport")
    if transport != "auto" and not is_remote(endpoint):
        raise InvalidRequest("transport is for endpoints of the form tcp://host:port", param="endpoint")
    return place_of(endpoint, keys)
