"""A plug-in of vLLM 0.33 (``vllm.general_plugins``): its server takes addresses in shared memory in place of tensors.

It does something only where ``MMPREP_ENDPOINT`` names the service, as ``ipc:///run/user/1000/mmprep``. Then the features of a
request to ``/inference/v1/generate`` may have ``mm_addresses``, as the service answers them with ``mm_payload: "shm"``, and
their ranges ``is_embed``, which vLLM's own form leaves out. An address that is leased to ``MMPREP_BACKEND_ID`` is opened
without a word with the service; any other is leased to this process first.

It is for the server that vLLM has in Python, not for its Rust frontend (``VLLM_USE_RUST_FRONTEND``).

How: vLLM has no place for this, so :func:`install` changes three things of its module before it has built its routes. The
form ``MultiModalFeatures`` keeps what it does not know; ``ServingTokens.serve_tokens`` opens the addresses before vLLM
looks at the request; and where vLLM makes its input of the features, the tensors and masks are put in. They are the shared
memory itself, held until vLLM has no tensor of it any more: its server's process sends them on to the engine's.

WARNING: whoever may post requests can name any address. An address is hard to guess (its epoch is random), but who has seen
one can guess others of the same life of the cache. So let only those post who may see everybody's media.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from http import HTTPStatus
from importlib import import_module
from typing import Any

from mmprep.address import Address, parse_address
from mmprep.backend import Backend
from mmprep.bridges.vllm.items import to_mm_kwargs_item
from mmprep.errors import InvalidRequest, MmprepError, ServiceUnavailable

_log = logging.getLogger("mmprep.vllm")
_PACKAGE = "vllm.entrypoints.scale_out.token_in_token_out"
#: Of the request that is being served: what its features have of ours.
_CURRENT: ContextVar[_Opened | None] = ContextVar("mmprep_features", default=None)
#: For how long a service that was not there is not looked for again.
_MISSED_SECONDS = 2.0
_NOT_THERE = "the service that holds the media cannot be reached; try again later"
_installed = False

Masks = dict[str, list[list[bool] | None]]


class _Opened:
    """What takes the place of tensors and ranges of one request."""

    def __init__(self, items: dict[str, list[Any]], masks: Masks) -> None:
        self.items = items
        self.masks = masks


class Resolver:
    """Opens addresses; connects when it is asked first.

    Parameters
    ----------
    endpoint:
        Of the service.
    backend_id:
        The name under which this process registers; by default a fresh one.
    """

    def __init__(self, endpoint: str, backend_id: str | None) -> None:
        self._endpoint = endpoint
        self._id = backend_id
        self._guard = threading.Lock()
        self._backend: Backend | None = None
        #: When it was found out that no service is there, by ``time.monotonic``.
        self._missed_at = -math.inf

    def resolve(self, addresses: Mapping[str, Sequence[Address | None]]) -> dict[str, list[Any]]:
        """Return vLLM's items at addresses, ``None`` where there is none; blocks.

        Raises
        ------
        MmprepError
            StaleAddress where the content of one is gone or was never this service's.
        """
        backend = self._connected()
        return {
            modality: [None if one is None else self._item(backend, one, len(ones)) for one in ones]
            for modality, ones in addresses.items()
        }

    def _connected(self) -> Backend:
        with self._guard:
            if self._backend is None:
                if time.monotonic() - self._missed_at < _MISSED_SECONDS:  # who waited meanwhile need not wait again
                    raise ServiceUnavailable(_NOT_THERE)
                try:
                    self._backend = self._registered()
                except MmprepError as error:
                    self._missed_at = time.monotonic()
                    _log.error("cannot register with %s: %s", self._endpoint, error)
                    raise ServiceUnavailable(_NOT_THERE) from None
            return self._backend

    def _registered(self) -> Backend:
        try:
            return Backend(self._endpoint, id=self._id)
        except InvalidRequest as error:
            if self._id is None:
                raise
            # As in a second server process of one engine; addresses are leased anew then.
            _log.warning("registering under a name of its own: %s", error)
            return Backend(self._endpoint)

    def _item(self, backend: Backend, address: Address, batch_size: int) -> Any:
        item = backend.acquire(address, kind="view") if address.lease is None else backend.open(address)
        try:
            return to_mm_kwargs_item(item, batch_size=batch_size)
        except BaseException:
            item.release()
            raise

    def close(self) -> None:
        """Leave; leases end."""
        with self._guard:
            backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()


def register() -> None:
    """Take part in a vLLM process; vLLM calls this in each of its processes, maybe more than once."""
    endpoint = os.environ.get("MMPREP_ENDPOINT")
    if not endpoint:
        _log.debug("MMPREP_ENDPOINT is not set: addresses in requests are not resolved")
        return
    try:
        install(Resolver(endpoint, os.environ.get("MMPREP_BACKEND_ID")))
    except (ImportError, AttributeError):
        _log.exception("this vLLM is not one that the plug-in knows (0.33): addresses in requests are not resolved")


def install(resolver: Resolver) -> None:
    """Change vLLM's server so that it resolves addresses; again changes nothing.

    Raises
    ------
    ImportError, AttributeError
        This vLLM has not what is changed; nothing was changed then.
    """
    global _installed  # noqa: PLW0603 -- vLLM's modules are changed once a process
    if _installed:
        return
    protocol, serving = _modules()
    _keep_unknown(protocol)
    tokens = serving.ServingTokens
    tokens.serve_tokens = _serving(tokens.serve_tokens, resolver)
    serving.mm_kwargs_from_features = _with_items(serving.mm_kwargs_from_features)
    serving.mm_input = _with_masks(serving.mm_input)
    _installed = True


def _modules() -> tuple[Any, Any]:
    """Return the modules that are changed; raises where they are not as they have to be."""
    if f"{_PACKAGE}.api_router" in sys.modules:
        raise ImportError("vLLM has built its routes already")
    protocol, serving = import_module(f"{_PACKAGE}.protocol"), import_module(f"{_PACKAGE}.serving")
    for module, names in (
        (protocol, ("MultiModalFeatures", "GenerateRequest")),
        (serving, ("ServingTokens", "mm_kwargs_from_features", "mm_input")),
    ):
        for name in names:
            getattr(module, name)
    _ = serving.ServingTokens.serve_tokens, serving.ServingTokens.create_error_response
    return protocol, serving


# --- the form -----------------------------------------------------------------------------------------------------------


def _keep_unknown(protocol: Any) -> None:
    """Let the form of features keep our members, and all that is built of it."""
    from pydantic_core import core_schema  # noqa: PLC0415 -- comes with vLLM

    form = protocol.MultiModalFeatures

    def schema(cls: Any, _source: Any, handler: Callable[[Any], Any]) -> Any:
        return core_schema.no_info_before_validator_function(_read_features, handler(cls))

    form.model_config["extra"] = "allow"
    form.__get_pydantic_core_schema__ = classmethod(schema)
    form.model_rebuild(force=True)
    protocol.GenerateRequest.model_rebuild(force=True)


def _read_features(given: Any) -> Any:
    """Check our members of features as they were sent; raises ValueError, which vLLM answers with 400."""
    if not isinstance(given, Mapping):
        return given
    features = dict(given)
    hashes = features.get("mm_hashes")
    addresses = _read_addresses(features.pop("mm_addresses", None), hashes)
    masks = _read_masks(features.get("mm_placeholders"))
    if addresses:
        features["mm_addresses"] = addresses
        # vLLM takes an item with metadata alone for one whose embeddings come from elsewhere.
        features["mm_metadata"] = None
    if masks:
        features["mm_masks"] = masks
    return features


def _read_addresses(given: Any, hashes: Any) -> dict[str, list[Address | None]]:
    if given is None:
        return {}
    try:
        if given.keys() != hashes.keys() or any(len(given[m]) != len(hashes[m]) for m in hashes):
            raise ValueError("mm_addresses and mm_hashes must have the same modalities and lengths")
        return {m: [None if one is None else parse_address(one) for one in ones] for m, ones in given.items()}
    except (AttributeError, TypeError):
        raise ValueError("mm_addresses must be a list of addresses by modality") from None
    except MmprepError as error:
        raise ValueError(error.message) from None


def _read_masks(placeholders: Any) -> Masks:
    if not isinstance(placeholders, Mapping):
        return {}  # vLLM says what is wrong
    masks: Masks = {}
    for modality, ranges in placeholders.items():
        if not isinstance(ranges, Sequence) or not all(isinstance(placed, Mapping) for placed in ranges):
            continue
        masks[modality] = [placed.get("is_embed") for placed in ranges]
        for placed, mask in zip(ranges, masks[modality], strict=True):
            if mask is not None and not (
                isinstance(mask, list)
                and all(isinstance(embeds, bool) for embeds in mask)
                and len(mask) == placed.get("length")
            ):
                raise ValueError("is_embed must be a list of as many booleans as its range is long")
    return masks if any(mask is not None for ones in masks.values() for mask in ones) else {}


# --- the request --------------------------------------------------------------------------------------------------------


def _serving(serve: Callable[..., Any], resolver: Resolver) -> Callable[..., Any]:
    async def serve_tokens(self: Any, request: Any, raw_request: Any = None) -> Any:
        ours = (getattr(request.features, "model_extra", None) or {}) if request.features is not None else {}
        addresses, masks = ours.get("mm_addresses") or {}, ours.get("mm_masks") or {}
        if not addresses and not masks:
            return await serve(self, request, raw_request)
        try:
            items = await asyncio.to_thread(resolver.resolve, addresses) if addresses else {}
        except MmprepError as error:
            return self.create_error_response(
                error.message, error.type, HTTPStatus(error.code), "features.mm_addresses"
            )
        token = _CURRENT.set(_Opened(items, masks))
        try:
            return await serve(self, request, raw_request)
        finally:
            _CURRENT.reset(token)

    return serve_tokens


def _with_items(from_features: Callable[[Any], dict[str, list[Any]]]) -> Callable[[Any], dict[str, list[Any]]]:
    def mm_kwargs_from_features(features: Any) -> dict[str, list[Any]]:
        found = from_features(features)
        opened = _CURRENT.get()
        for modality, items in (opened.items if opened is not None else {}).items():
            found[modality] = [
                given if item is None else item for given, item in zip(found[modality], items, strict=True)
            ]
        return found

    return mm_kwargs_from_features


def _with_masks(make: Callable[..., Any]) -> Callable[..., Any]:
    def mm_input(*given: Any, mm_placeholders: dict[str, list[Any]], **named: Any) -> Any:
        opened = _CURRENT.get()
        if opened is not None:
            mm_placeholders = {
                modality: _masked(ranges, opened.masks.get(modality)) for modality, ranges in mm_placeholders.items()
            }
        return make(*given, mm_placeholders=mm_placeholders, **named)

    return mm_input


def _masked(ranges: list[Any], masks: Sequence[list[bool] | None] | None) -> list[Any]:
    import torch  # noqa: PLC0415 -- vLLM's

    if masks is None:
        return ranges
    return [
        placed if mask is None else replace(placed, is_embed=torch.tensor(mask, dtype=torch.bool))
        for placed, mask in zip(ranges, masks, strict=True)
    ]
