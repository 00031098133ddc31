"""One item's tensors as text: an element of ``kwargs_data`` or ``mm_metadata`` in an answer over HTTP.

It is base64 of MessagePack ``{field: {"data": [dtype, shape, Ext(3, raw little-endian bytes)], "field": [kind, arguments]}}``,
the form in which vLLM's serializer takes a multimodal item. Frontends pack in pieces and copy less; this is for programs
that hold items.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgpack
import msgspec
from numpy.typing import NDArray

from mmprep.errors import InvalidRequest
from mmprep.items import DTYPE_SIZES, FieldKind, FieldSpec, Natural, field_array
from mmprep.schemas import prepare

#: MessagePack extension code of raw tensor bytes.
RAW = 3
_WRONG = "an element of kwargs_data is base64 of a packed item"


def kind_arguments(spec: FieldSpec, batch_size: int) -> dict[str, Any]:
    """Return how an engine joins this field's items, as the arguments of its field kind.

    Parameters
    ----------
    batch_size: items of this modality in the request; only *shared* fields hold it.
    """
    if spec.kind == "flat":
        # One item's rows: one list of slices, with one slice a dimension, of which only the first is cut.
        return {"slices": [[[0, spec.shape[0], None]]], "dim": 0, "keep_on_cpu": spec.keep_on_cpu}
    if spec.kind == "shared":
        return {"batch_size": batch_size, "keep_on_cpu": spec.keep_on_cpu}
    return {"keep_on_cpu": spec.keep_on_cpu}


def to_text(fields: Iterable[FieldSpec], raw: Mapping[str, bytes], batch_size: int) -> str:
    """Return one item's fields as text.

    Parameters
    ----------
    fields: which.
    raw: the bytes of each, little-endian.
    batch_size: as for :func:`kind_arguments`.
    """
    packed = {
        spec.name: {
            "data": [spec.dtype, list(spec.shape), msgpack.ExtType(RAW, raw[spec.name])],
            "field": [spec.kind, kind_arguments(spec, batch_size)],
        }
        for spec in fields
    }
    return base64.b64encode(msgpack.packb(packed)).decode("ascii")


class _Field(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    data: tuple[str, Annotated[tuple[Natural, ...], msgspec.Meta(max_length=8)], msgspec.msgpack.Ext]
    field: tuple[FieldKind, dict[str, Any]]


prepare(_Field)


def from_text(text: str) -> dict[str, NDArray[Any]]:
    """Return the fields of an item as arrays, read-only; a bfloat16 one as its bit patterns in uint16.

    Raises
    ------
    InvalidRequest
        The text is no such element.
    """
    try:
        plain = msgspec.msgpack.decode(base64.b64decode(text, validate=True), type=dict[str, _Field])
    except (binascii.Error, ValueError, TypeError, msgspec.MsgspecError, RecursionError):
        raise InvalidRequest(_WRONG, param="kwargs_data") from None
    return {name: _array(name, field) for name, field in plain.items()}


def _array(name: str, given: _Field) -> NDArray[Any]:
    dtype, shape, tensor = given.data
    data = memoryview(tensor.data)
    nbytes = DTYPE_SIZES.get(dtype, 0) * math.prod(shape)
    if dtype not in DTYPE_SIZES or tensor.code != RAW or data.nbytes != nbytes:
        raise InvalidRequest(f"{_WRONG}; of its field {name[:128]!r} dtype, shape and bytes do not agree")
    spec = FieldSpec(name, dtype, shape, given.field[0], keep_on_cpu=False, offset=0)
    return field_array(data, spec)
