"""The reader's side: an engine that uses tensors where they lie.

A backend registers under an id. Addresses that HTTP answers carry are leased to such an id, and whoever holds the
registration turns them into items. The registration dies with its process, however it ends, and its leases with it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Any, Self

import msgspec
import zmq

from mmprep.address import Address, parse_address
from mmprep.errors import InvalidRequest
from mmprep.item import Item, item_from_address
from mmprep.loop_thread import LoopThread
from mmprep.registration import Lease, Registration
from mmprep.registration import Mapping as SegmentMapping
from mmprep.runtime import RuntimeDir, parse_endpoint
from mmprep.wire.messages import LeaseKind

_CONNECT_SECONDS = 10.0


class Backend:
    """A registered reader of the shared memory; may be used from several threads.

    Parameters
    ----------
    endpoint:
        ``ipc://`` and a runtime directory; by default the one that ``mmprep serve`` uses by default.
    id:
        The name that requests give as ``backend_id``; by default a fresh one.

    Raises
    ------
    ServiceUnavailable
        No service answers.
    InvalidRequest
        A living process has the id.

    Examples
    --------
    >>> with Backend("ipc:///run/user/0/mmprep", id="engine-0") as backend:  # doctest: +SKIP
    ...     item = backend.open(answer["features"]["mm_addresses"]["image"][0])
    ...     with item.view() as arrays:
    ...         pixels = arrays["pixel_values"]
    ...     item.release()
    """

    def __init__(self, endpoint: str | None = None, *, id: str | None = None) -> None:  # noqa: A002 -- interface
        self.id = id or f"backend-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._thread = LoopThread("mmprep-backend")
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._registration: Registration = self._thread.run(self._register(parse_endpoint(endpoint)))
        except BaseException:
            self._context.destroy(linger=0)
            self._thread.stop()
            raise

    async def _register(self, runtime: RuntimeDir) -> Registration:
        registration = Registration(self._context, runtime, self.id)
        try:
            await registration.ready(_CONNECT_SECONDS)
        except BaseException:
            await registration.close()
            raise
        return registration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release every lease and leave; again is no error."""
        if self._thread.stopped:
            return
        self._thread.run(self._registration.close())
        self._context.destroy(linger=0)
        self._thread.stop()

    def open(self, address: Address | Mapping[str, Any]) -> Item:
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
            return self.acquire(parsed)
        held = self._registration.hold_now(parsed, None)
        return self._item(parsed, *(held or self._thread.run(self._registration.hold(parsed, None))))

    def acquire(self, address: Address | Mapping[str, Any], *, kind: LeaseKind = "copy") -> Item:
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
        parsed = parse_address(address)
        held = self._thread.run(self._registration.acquire(parsed, kind))
        return self._item(msgspec.structs.replace(parsed, lease_kind=kind), *held)

    def renew(self, *addresses: Address | Mapping[str, Any]) -> list[bool]:
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
        lost = self._thread.run(self._registration.renew(tuple(leases)))
        return [lease not in lost for lease in leases]

    def release(self, *addresses: Address | Mapping[str, Any]) -> None:
        """End leases; those that are over already are passed over."""
        for address in addresses:
            lease = parse_address(address).lease
            if lease is not None:
                self._registration.drop(bytes.fromhex(lease))

    def _item(self, address: Address, mapping: SegmentMapping, lease: Lease) -> Item:
        address = msgspec.structs.replace(address, lease=lease.id.hex())
        try:
            return item_from_address(self._registration, mapping, address, lease, run=self._thread.run)
        except BaseException:
            lease.release()
            raise
