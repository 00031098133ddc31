"""A Dynamo worker's side: the tensors of a request, where they lie."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
from numpy.typing import NDArray

from mmprep.address import Address
from mmprep.backend import AsyncBackend
from mmprep.errors import InvalidRequest, LeaseLost, ServiceUnavailable, StaleAddress
from mmprep.kwargs_data import from_text
from mmprep.schemas import prepare

Arrays = dict[str, NDArray[Any]]


@asynccontextmanager
async def open_items(request: Mapping[str, Any], backend: AsyncBackend) -> AsyncIterator[dict[str, list[Arrays]]]:
    """Give the tensors of a request for an ``async with`` block, read-only and without a copy.

    Parameters
    ----------
    request:
        As the worker's handler is given it.
    backend:
        The worker's registration with the service, one for all requests.

    Returns
    -------
    Arrays by field name, for each medium in the order of its modality; empty where the request has none. They must not be
    used after the block, which ends the worker's leases however it is left. A handler that yields inside it has to return when
    ``context.is_stopped()`` after a ``yield``: once its caller is gone, Dynamo asks it for one output more and then drops it
    where it stands, and the leases of a dropped one stay until the worker is given its next request.

    Raises
    ------
    ServiceUnavailable
        The content is gone, or the address is of another service or another life of the cache. A handler that lets it pass makes
        Dynamo's server answer 503: the caller may ask again.
    InvalidRequest
        The request's ``extra_args`` are not those of this bridge.
    """
    media = _read(request.get("extra_args"))
    async with AsyncExitStack() as stack:
        yield {
            modality: [
                from_text(tensors or "") if address is None else await _open(stack, backend, address)
                for address, tensors in zip(addresses, media.tensors(modality), strict=True)
            ]
            for modality, addresses in media.mm_addresses.items()
        }


class _Media(msgspec.Struct):
    """What a request says of its media."""

    mm_addresses: dict[str, list[Address | None]] = {}
    kwargs_data: dict[str, list[str | None]] = {}

    def tensors(self, modality: str) -> list[str | None]:
        """Return the tensors that travel in place of addresses."""
        count = len(self.mm_addresses[modality])
        tensors = self.kwargs_data.get(modality, [None] * count)
        if len(tensors) != count:
            raise InvalidRequest("addresses and tensors are lists of equal lengths", param="extra_args.kwargs_data")
        return tensors


prepare(_Media)


def _read(args: Any) -> _Media:
    try:
        return msgspec.convert({} if args is None else args, _Media)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"not what the frontend says of media: {error}", param="extra_args") from None


async def _open(stack: AsyncExitStack, backend: AsyncBackend, address: Address) -> Arrays:
    try:
        item = await backend.acquire(address, kind="view")
        stack.callback(item.release)
        return await stack.enter_async_context(item.view())
    except (StaleAddress, LeaseLost) as error:
        raise ServiceUnavailable(error.message) from error
