"""Items that were processed elsewhere, on their way into the cache: the body that a client sends, and what a lane is given.

The body is MessagePack, a map of:

- ``key``: the name under which the item is found, up to 1,024 characters: a part's ``uuid``, or a hash of the caller's own;
- ``modality``;
- ``fields``: ``{name: {"data": [dtype, shape, Ext(3, raw little-endian bytes)], "field": [kind, arguments]}}``, the form of one
  ``kwargs_data`` element; without ``field`` the kind is the model's own;
- ``expansion``: ``{"token_ids": [...], "is_embed": [...]}``, what the placeholder becomes; without ``is_embed`` every position
  takes an embedding;
- and, as in other requests, ``model``, ``cache_salt``, ``priority``, ``deadline_ms``.

A lane is given one frame: the length of the packed metadata in 8 bytes, little-endian, the metadata, and, at the next
multiple of :data:`~mmprep.items.ALIGNMENT`, the tensor region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from numpy.typing import ArrayLike

from mmprep.card import ModelCard
from mmprep.errors import InvalidRequest, ProtocolError
from mmprep.items import DTYPE_SIZES, ItemMeta, align, region_size, storage_dtype, unpack_meta
from mmprep.kwargs_data import RAW

_LENGTH = 8


def request_body(
    key: str | bytes,
    fields: Mapping[str, ArrayLike],
    *,
    token_ids: Sequence[int],
    is_embed: Sequence[bool] | None,
    modality: str,
    dtypes: Mapping[str, str],
    kinds: Mapping[str, str],
    more: Mapping[str, Any],
) -> bytes:
    """Return a client's body.

    Parameters
    ----------
    key:
        A text, or a hash of 32 bytes, which stands for its 64 hexadecimal digits.
    fields:
        Arrays by name.
    token_ids, is_embed:
        The expansion.
    dtypes:
        Of fields whose elements are another type than numpy's: ``bfloat16`` for bit patterns in uint16.
    kinds:
        Of fields: ``batched``, ``flat`` or ``shared``; those that are not named have the model's own.
    more:
        Other members of the body.

    Raises
    ------
    InvalidRequest
        An array's dtype is none that items have, a name is of no field, or something is no MessagePack.
    """
    for name in (*dtypes, *kinds):
        if name not in fields:
            raise InvalidRequest(f"there is no field {name!r} to give a dtype or a kind", param="fields")
    body = {
        "key": key.hex() if isinstance(key, bytes) else key,
        "modality": modality,
        "fields": {name: _field(name, array, dtypes.get(name), kinds.get(name)) for name, array in fields.items()},
        "expansion": {
            "token_ids": [int(token_id) for token_id in token_ids],
            "is_embed": None if is_embed is None else [bool(embeds) for embeds in is_embed],
        },
        **more,
    }
    try:
        packed: bytes = msgpack.packb(body)
    except (ValueError, TypeError, OverflowError) as error:  # as for half a character in a key
        raise InvalidRequest(f"the injection cannot be sent as MessagePack: {error}") from None
    return packed


def _field(name: str, given: ArrayLike, dtype: str | None, kind: str | None) -> dict[str, Any]:
    array = np.asarray(given)
    dtype = dtype or array.dtype.name
    if dtype not in DTYPE_SIZES or storage_dtype(dtype) != array.dtype.newbyteorder("<"):
        known = ", ".join(DTYPE_SIZES)
        raise InvalidRequest(f"the array is of dtype {array.dtype}; give {known}", param=f"fields.{name}")
    raw = np.ascontiguousarray(array, storage_dtype(dtype)).tobytes()
    field = {"data": [dtype, list(array.shape), msgpack.ExtType(RAW, raw)]}
    return field if kind is None else {**field, "field": [kind, {}]}


def check_forms(card: ModelCard, meta: ItemMeta) -> None:
    """Refuse an item whose fields are not those of the model.

    Raises
    ------
    InvalidRequest
        ``param`` names the field, as ``fields.pixel_values``, or ``modality``.
    """
    forms = card.fields.get(meta.modality)
    if forms is None:
        known = ", ".join(card.fields)
        raise InvalidRequest(f"this model has items of modality {known}", param="modality")
    given = {spec.name: spec for spec in meta.fields}
    if given.keys() != {form.name for form in forms}:
        names = ", ".join(form.name for form in forms)
        raise InvalidRequest(f"an item of this model has exactly the fields {names}", param="fields")
    for form in forms:
        spec = given[form.name]
        param = f"fields.{form.name}"
        if spec.dtype not in form.dtypes:
            raise InvalidRequest(f"its dtype is {spec.dtype}; give {', '.join(form.dtypes)}", param=param)
        if len(spec.shape) != len(form.shape) or any(
            wanted not in {None, extent} for extent, wanted in zip(spec.shape, form.shape, strict=True)
        ):
            shape = ", ".join("any" if extent is None else str(extent) for extent in form.shape)
            raise InvalidRequest(f"its shape is {spec.shape}; one item's is ({shape})", param=param)
        if (spec.kind, spec.keep_on_cpu) != (form.kind, form.keep_on_cpu):
            where = "stays on the CPU" if form.keep_on_cpu else "does not stay on the CPU"
            raise InvalidRequest(f"this field is of kind {form.kind} and {where}", param=param)


def pack_item(meta: ItemMeta, raw: Mapping[str, bytes | memoryview]) -> bytearray:
    """Return an item as a lane is given it.

    Parameters
    ----------
    meta:
        Of the item, its fields laid out.
    raw:
        The bytes of each field.
    """
    packed = meta.pack()
    start = align(_LENGTH + len(packed))
    frame = bytearray(start + region_size(meta.fields))
    frame[:_LENGTH] = len(packed).to_bytes(_LENGTH, "little")
    frame[_LENGTH : _LENGTH + len(packed)] = packed
    for spec in meta.fields:
        frame[start + spec.offset : start + spec.offset + spec.nbytes] = raw[spec.name]
    return frame


def unpack_item(frame: memoryview) -> tuple[ItemMeta, memoryview]:
    """Return the metadata and the tensor region of an item that :func:`pack_item` packed.

    Raises
    ------
    ProtocolError
        It is none.
    """
    size = int.from_bytes(frame[:_LENGTH], "little")
    start = align(_LENGTH + size)
    if size > len(frame):
        raise ProtocolError("an injected item is shorter than its metadata")
    try:
        meta = unpack_meta(bytes(frame[_LENGTH : _LENGTH + size]))
    except ValueError as error:
        raise ProtocolError(f"an injected item: {error}") from None
    if len(frame) != start + region_size(meta.fields):
        raise ProtocolError("an injected item has other bytes than its metadata say")
    return meta, frame[start:]
