"""One try of one call, through the native client or over HTTP, and its answer in one form."""

from __future__ import annotations

import base64
import binascii
import http.client
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgpack
import msgspec
import numpy as np
from numpy.typing import NDArray

from mmprep.client import AsyncClient
from mmprep.errors import MmprepError
from mmprep.item import Item

_PATH = "/v1/chat/completions/render"
#: Error types of HTTP answers after which the same call may succeed (README, Errors).
_RETRYABLE = frozenset({408, 429, 502, 503, 504})
#: How kwargs_data marks raw bytes in MessagePack.
_RAW = 3
_questions = itertools.cycle(("What is this?", "And what is on this one?", "Compare them."))


class Asked(NamedTuple):
    """One chat.

    Attributes
    ----------
    payload: ``shm``, ``tensors`` or ``none``.
    media: the encoded pictures, in order.
    backend: to which addresses are leased; only over HTTP.
    lease_kind: of addresses.
    """

    payload: str
    media: Sequence[bytes]
    backend: str | None = None
    lease_kind: str | None = None


class Answered(NamedTuple):
    """What came back, one element a picture.

    Attributes
    ----------
    lengths: of the ranges in the prompt.
    hashes: of the items.
    fields: tensors that came with the answer; where addresses were asked for, those of items that got none.
    items: of the native client, leased to it.
    addresses: leased to the backend that was named; ``None`` for an item that found no shared memory.
    """

    lengths: list[int]
    hashes: list[str]
    fields: list[dict[str, NDArray[Any]] | None] | None = None
    items: list[Item] | None = None
    addresses: list[dict[str, Any] | None] | None = None


class RefusedError(Exception):
    """The answer is an error, or the connection broke.

    Attributes
    ----------
    type: of the error.
    retryable: whether it says that the same may succeed later.
    param: the place in the request.
    """

    def __init__(self, kind: str, message: str, *, retryable: bool, param: str | None = None) -> None:
        super().__init__(message)
        self.type = kind
        self.retryable = retryable
        self.param = param


class NeverAnsweredError(Exception):
    """Neither an answer nor an error, although its time and the patience after it are over."""


def refused(error: MmprepError) -> RefusedError:
    """Return an error of the tree in this module's form."""
    return RefusedError(type(error).__name__, error.message, retryable=error.retryable, param=error.param)


async def ask_native(client: AsyncClient, asked: Asked, seconds: float) -> Answered:
    """Send a chat through the native client; raises RefusedError."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": medium}} for medium in asked.media]
    parts.append({"type": "text", "text": next(_questions)})
    fields = {} if asked.lease_kind is None else {"lease_kind": asked.lease_kind}
    try:
        result = await client.chat(
            [{"role": "user", "content": parts}],
            payload=asked.payload,  # type: ignore[arg-type]  # checked where kinds are chosen
            timeout=seconds,
            **fields,
        )
    except MmprepError as error:
        raise refused(error) from None
    items = result.items["image"]
    return Answered(
        [item.length for item in items],
        [item.hash for item in items],
        fields=[item.materialize() for item in items] if asked.payload == "tensors" else None,
        items=items,
    )


def ask_http(port: int, asked: Asked, seconds: float, patience: float) -> Answered:
    """Post a chat; blocks.

    Parameters
    ----------
    seconds:
        The call's time.
    patience:
        How long after that an answer may still come.

    Raises
    ------
    RefusedError
        An error, or a connection that broke.
    NeverAnsweredError
        Nothing came.
    """
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(medium).decode()}"}}
        for medium in asked.media
    ]
    parts.append({"type": "text", "text": next(_questions)})
    body: dict[str, Any] = {"messages": [{"role": "user", "content": parts}], "mm_payload": asked.payload}
    body["deadline_ms"] = max(1, int(seconds * 1000))
    if asked.backend is not None:
        body["backend_id"] = asked.backend
    if asked.lease_kind is not None:
        body["lease_kind"] = asked.lease_kind
    status, answer = post(port, _PATH, body, seconds + patience)
    if status != http.client.OK:
        raise _refusal(status, answer)
    features = answer["features"]
    tensors = features["kwargs_data"]
    addresses = features["mm_addresses"]
    return Answered(
        [place["length"] for place in features["mm_placeholders"]["image"]],
        features["mm_hashes"]["image"],
        fields=None if tensors is None else [element and _fields(element) for element in tensors["image"]],
        addresses=None if addresses is None else addresses["image"],
    )


def post(port: int, path: str, body: Mapping[str, Any], seconds: float) -> tuple[int, Any]:
    """Post JSON on a connection of its own and return status and body; raises as :func:`ask_http`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request("POST", path, msgspec.json.encode(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except TimeoutError:
        raise NeverAnsweredError from None
    except (OSError, http.client.HTTPException) as error:
        raise RefusedError("connection", type(error).__name__, retryable=True) from None
    finally:
        connection.close()


def _refusal(status: int, answer: Any) -> RefusedError:
    error = answer["error"]
    return RefusedError(error["type"], error["message"], retryable=status in _RETRYABLE, param=error["param"])


def _fields(element: str) -> dict[str, NDArray[Any]]:
    """Return the tensors in one element of ``kwargs_data``, by what the README says of it."""
    try:
        packed = msgpack.unpackb(base64.b64decode(element, validate=True), ext_hook=_raw)
    except (binascii.Error, ValueError):
        return {}
    fields = {}
    for name, field in packed.items():
        dtype, shape, data = field["data"]
        fields[name] = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    return fields


def _raw(code: int, data: bytes) -> bytes:
    if code != _RAW:
        raise ValueError(f"extension type {code}")
    return data
