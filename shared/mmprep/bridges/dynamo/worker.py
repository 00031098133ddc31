"""A Dynamo worker's side: the tensors of a request, where they lie."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from numpy.typing import NDArray

from mmprep.address import parse_address
from mmprep.backend import AsyncBackend
from mmprep.errors import InvalidRequest, LeaseLost, ServiceUnavailable, StaleAddress
from mmprep.kwargs_data import from_text

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
    used after the block, which ends the worker's leases however it is left.

    Raises
    ------
    ServiceUnavailable
        The content is gone, or the address is of another service or another life of the cache. A handler that lets it pass makes
        Dynamo's server answer 503: the caller may ask again.
    InvalidRequest
        The request's ``extra_args`` are not those of this bridge.
    """
    args = request.get("extra_args") or {}
    async with AsyncExitStack() as stack:
        yield {
            modality: [
                await _open(stack, backend, address, tensors)
                for address, tensors in zip(addresses, inline, strict=True)
            ]
            for modality, addresses, inline in _given(args)
        }


def _given(args: Any) -> list[tuple[str, Sequence[Any], Sequence[Any]]]:
    if not isinstance(args, Mapping):
        raise InvalidRequest("extra_args is a map", param="extra_args")
    addresses, inline = args.get("mm_addresses") or {}, args.get("kwargs_data") or {}
    if not isinstance(addresses, Mapping) or not isinstance(inline, Mapping):
        raise InvalidRequest("media are lists by modality", param="extra_args.mm_addresses")
    given: list[tuple[str, Sequence[Any], Sequence[Any]]] = []
    for modality, ones in addresses.items():
        others = inline.get(modality) or [None] * len(ones)
        if not isinstance(ones, list) or len(others) != len(ones):
            raise InvalidRequest("media are lists of equal lengths", param="extra_args.mm_addresses")
        given.append((modality, ones, others))
    return given


async def _open(stack: AsyncExitStack, backend: AsyncBackend, address: Any, tensors: Any) -> Arrays:
    if address is None:
        return from_text(tensors)
    try:
        item = await backend.acquire(parse_address(address), kind="view")
        stack.callback(item.release)
        return await stack.enter_async_context(item.view())
    except (StaleAddress, LeaseLost) as error:
        raise ServiceUnavailable(error.message) from error
