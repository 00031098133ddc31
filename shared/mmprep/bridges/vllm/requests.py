"""Requests for vLLM's token-in, token-out endpoint, ``/inference/v1/generate``, from what the service has rendered.

The source of the form is vLLM 0.33's ``vllm.entrypoints.scale_out.token_in_token_out.protocol``. Two of its rules decide
over what is sent beside the tensors: it refuses an item that has ``mm_metadata`` and no ``kwargs_data`` (which it takes for
one whose embeddings come from elsewhere), and takes an item that has neither for one that it has cached.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from mmprep.address import Address
from mmprep.errors import InvalidRequest
from mmprep.item import Item
from mmprep.job import AsyncJob, Job
from mmprep.kwargs_data import to_text
from mmprep.rendered import Result

#: What the service has rendered: what the native client or a queue gave, or an answer over HTTP.
Rendered: TypeAlias = Result | Job | AsyncJob | Mapping[str, Any]

_PACKED = ("kwargs_data", "mm_metadata")


def to_generate_request(rendered: Rendered, *, payload: Literal["tensors", "shm"] = "tensors") -> dict[str, Any]:
    """Return a GenerateRequest as plain data, for JSON.

    Parameters
    ----------
    rendered:
        A result of a client, a job of a backend, or an answer over HTTP, in JSON or MessagePack.
    payload:
        ``"tensors"``: for any engine. ``"shm"``: for one on this host that has the plug-in. Items that are in no shared
        memory go as tensors too. An address of a result or a job comes without its lease: the engine leases it for itself,
        so hold the result, or the job, until the engine has answered. One of an answer over HTTP is the answer's own.

    Returns
    -------
    With ``"tensors"`` the tensors are copied out of the shared memory.

    Raises
    ------
    InvalidRequest
        An item has not what ``payload`` asks for.
    StaleAddress, LeaseLost
        Its content or its lease is gone.
    """
    if isinstance(rendered, Mapping):
        return _of_answer(rendered, payload)
    request = rendered.request
    if rendered.items:
        request["features"] |= addresses_of(rendered.items) if payload == "shm" else _tensors(rendered.items)
    return request


def addresses_of(items: Mapping[str, Sequence[Item]]) -> dict[str, Any]:
    """Return where items lie, by modality: ``mm_addresses``, as plain data and without leases.

    An item in no shared memory has ``None`` there, and its tensors in ``kwargs_data``, which is only there for such items.
    """
    addresses = {m: [_address_of(item) for item in ones] for m, ones in items.items()}
    if all(address is not None for ones in addresses.values() for address in ones):
        return {"mm_addresses": addresses}
    tensors = {
        m: [_text_of(item, len(ones)) if item.address is None else None for item in ones] for m, ones in items.items()
    }
    return {"mm_addresses": addresses, "kwargs_data": tensors}


def _address_of(item: Item) -> dict[str, Any] | None:
    if item.address is None:
        return None
    bare: Address = msgspec.structs.replace(item.address, lease=None, lease_kind=None, lease_seconds=None)
    plain: dict[str, Any] = msgspec.to_builtins(bare)
    return plain


def _text_of(item: Item, batch_size: int) -> str:
    """Return an item's tensors as an element of ``kwargs_data``; ``batch_size``: items of its modality in the request."""
    return to_text(item.fields, {name: array.tobytes() for name, array in item.materialize().items()}, batch_size)


def _tensors(items: Mapping[str, Sequence[Item]]) -> dict[str, Any]:
    return {
        "kwargs_data": {m: [_text_of(item, len(ones)) for item in ones] for m, ones in items.items()},
        "mm_metadata": {m: [_metadata(item, len(ones)) for item in ones] for m, ones in items.items()},
    }


def _metadata(item: Item, batch_size: int) -> str | None:
    kept = [spec for spec in item.fields if spec.keep_on_cpu]
    return to_text(kept, item.meta.cpu, batch_size) if kept else None


def _of_answer(answer: Mapping[str, Any], payload: str) -> dict[str, Any]:
    given = answer.get("features")
    if given is None:
        return dict(answer)
    features = {**given, **{name: _texts(given.get(name)) for name in _PACKED}}
    known: list[Mapping[str, Sequence[Any]]] = [features["kwargs_data"] or {}]
    if payload == "shm":
        known.append(features.get("mm_addresses") or {})
    for modality, hashes in features["mm_hashes"].items():
        for number in range(len(hashes)):
            if all(modality not in given or given[modality][number] is None for given in known):
                missing = "no tensors" if payload == "tensors" else "neither an address nor tensors"
                raise InvalidRequest(
                    f"{modality} {number} of the answer has {missing}; render with mm_payload {payload!r}",
                    param="features",
                )
    return {**answer, "features": {**features, ("mm_addresses" if payload == "tensors" else "mm_metadata"): None}}


def _texts(packed: Mapping[str, Sequence[Any]] | None) -> dict[str, list[str | None]] | None:
    if packed is None:
        return None
    return {
        modality: [base64.b64encode(one).decode("ascii") if isinstance(one, bytes) else one for one in ones]
        for modality, ones in packed.items()
    }
