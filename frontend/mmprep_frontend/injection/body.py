"""Reads the body of an injection: MessagePack from anybody, in the form that :mod:`mmprep.injected` describes. Pure.

Rules:

- Nothing is made of a map or array before its header has said that it is short enough, so that a body costs no more memory
  than its own bytes and what the model's longest prompt takes.
- Tensors are never copied: they are views of the body.
- A member that is not known, or comes twice, is refused by name; so is any extension type but that of raw bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, NoReturn

import msgspec
from msgspec import Meta

from mmprep.errors import InvalidRequest
from mmprep.items import FieldKind
from mmprep.kwargs_data import RAW

_MEMBERS = frozenset({"key", "modality", "fields", "expansion", "model", "cache_salt", "priority", "deadline_ms"})
_MOST_FIELDS = 64
_MOST_AXES = 8
#: Of a field's arguments: bytes of all that this service knows.
_LONGEST_ARGUMENTS = 1024

_Text = Annotated[str, Meta(min_length=1, max_length=1024)]
_Extent = Annotated[int, Meta(ge=0, le=2**40)]


class Given(NamedTuple):
    """One field as it was sent.

    Attributes
    ----------
    shape: of one item's tensor.
    raw: its bytes, little-endian, not checked against the shape.
    kind: ``None`` where the model's own is meant; so is ``keep_on_cpu``.
    """

    dtype: str
    shape: tuple[int, ...]
    raw: memoryview
    kind: FieldKind | None
    keep_on_cpu: bool | None


class Injection(NamedTuple):
    """A body that is of the form; whether it fits the model is another matter."""

    key: str
    modality: str
    fields: dict[str, Given]
    token_ids: list[int]
    is_embed: list[bool] | None
    model: str | None
    cache_salt: str | None
    priority: int
    deadline_ms: int | None


def read_injection(body: bytes | memoryview, most_ids: int) -> Injection:
    """Return what is in ``body``.

    Parameters
    ----------
    most_ids:
        Of an expansion: the length of the model's longest prompt.

    Raises
    ------
    InvalidRequest
        It is not of the form; ``param`` names the place, as ``fields.pixel_values.data``.
    """
    members = _map(memoryview(body), None, len(_MEMBERS))
    for name in members:
        if name not in _MEMBERS:
            raise InvalidRequest(f"the body has no member {name[:64]!r}", param=name[:64])
    for name in ("key", "modality", "fields", "expansion"):
        if name not in members:
            raise InvalidRequest(f"the body lacks {name!r}", param=name)
    fields = _map(members["fields"], "fields", _MOST_FIELDS)
    token_ids, is_embed = _expansion(members["expansion"], most_ids)
    return Injection(
        key=_value(members["key"], "key", _Text),
        modality=_value(members["modality"], "modality", _Text),
        fields={name: _field(raw, f"fields.{name[:128]}") for name, raw in fields.items()},
        token_ids=token_ids,
        is_embed=is_embed,
        model=_optional(members, "model", _Text),
        cache_salt=_optional(members, "cache_salt", _Text),
        priority=_optional(members, "priority", Annotated[int, Meta(ge=-(2**31), le=2**31)]) or 0,
        deadline_ms=_optional(members, "deadline_ms", Annotated[int, Meta(ge=1, le=2**40)]),
    )


def _field(raw: memoryview, param: str) -> Given:
    members = _map(raw, param, 2)
    if "data" not in members or members.keys() - {"data", "field"}:
        raise InvalidRequest("a field is a map of 'data' and, if its kind is to be checked, 'field'", param=param)
    dtype, shape, tensor = _array(members["data"], f"{param}.data", 3)
    if _size(shape, f"{param}.data[1]", array=True) > _MOST_AXES:
        raise InvalidRequest(f"a shape has at most {_MOST_AXES} extents", param=f"{param}.data[1]")
    extents = _value(shape, f"{param}.data[1]", tuple[_Extent, ...])
    kind, keep_on_cpu = None, None
    if "field" in members:
        kind, keep_on_cpu = _kind(members["field"], extents, f"{param}.field")
    return Given(
        _value(dtype, f"{param}.data[0]", _Text), extents, _tensor(tensor, f"{param}.data[2]"), kind, keep_on_cpu
    )


def _kind(raw: memoryview, shape: tuple[int, ...], param: str) -> tuple[FieldKind, bool | None]:
    """Return kind and ``keep_on_cpu``; the other arguments say what follows from the shape, or from later requests."""
    if len(raw) > _LONGEST_ARGUMENTS:
        raise InvalidRequest("the arguments of a kind are short", param=param)
    name, given = _array(raw, param, 2)
    kind: FieldKind = _value(name, f"{param}[0]", FieldKind)
    arguments = {
        argument: _value(value, f"{param}[1].{argument}", Any)
        for argument, value in _map(given, f"{param}[1]", 4).items()
    }
    keep = arguments.pop("keep_on_cpu", None)
    if keep is not None and not isinstance(keep, bool):
        raise InvalidRequest("it is true or false", param=f"{param}[1].keep_on_cpu")
    known: dict[FieldKind, dict[str, Any]] = {
        "batched": {},
        "flat": {"slices": [[[0, shape[0] if shape else 0, None]]], "dim": 0},
        "shared": {"batch_size": 1},
    }
    for argument, value in arguments.items():
        if argument not in known[kind] or value != known[kind][argument]:
            raise InvalidRequest(
                f"an injected item is one item, whole; leave {argument[:64]!r} out", param=f"{param}[1].{argument[:64]}"
            )
    return kind, keep


def _expansion(raw: memoryview, most: int) -> tuple[list[int], list[bool] | None]:
    members = _map(raw, "expansion", 2)
    if "token_ids" not in members or members.keys() - {"token_ids", "is_embed"}:
        raise InvalidRequest("it is a map of 'token_ids' and 'is_embed'", param="expansion")
    for name, given in members.items():
        if bytes(given[:1]) != _NIL and (length := _size(given, f"expansion.{name}", array=True)) > most:
            raise InvalidRequest(
                f"the expansion has {length} tokens, and this model's longest prompt {most}", param=f"expansion.{name}"
            )
    token_ids = _value(members["token_ids"], "expansion.token_ids", list[int])
    is_embed = _optional(members, "is_embed", list[bool], param="expansion.is_embed")
    if is_embed is not None and len(is_embed) != len(token_ids):
        raise InvalidRequest(
            f"there are {len(is_embed)} marks for {len(token_ids)} token ids", param="expansion.is_embed"
        )
    return token_ids, is_embed


# --- MessagePack ------------------------------------------------------------------------------------------------------

_NIL = b"\xc0"
_MAP16, _MAP32, _ARRAY16, _ARRAY32 = 0xDE, 0xDF, 0xDC, 0xDD
_FIXEXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
#: Bytes of the length of longer extensions.
_EXT = {0xC7: 1, 0xC8: 2, 0xC9: 4}


def _value(raw: memoryview, param: str | None, kind: Any) -> Any:
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        _wrong(error, param)


def _optional(members: dict[str, memoryview], name: str, kind: Any, *, param: str | None = None) -> Any:
    return _value(members[name], param or name, kind | None) if name in members else None


def _map(raw: memoryview, param: str | None, most: int) -> dict[str, memoryview]:
    """Return the members of a map, each as it is packed."""
    size = _size(raw, param, array=False)
    if size > most:
        raise InvalidRequest(f"the map has {size} members, more than are known", param=param)
    members: dict[str, msgspec.Raw] = _value(raw, param, dict[str, msgspec.Raw])
    if len(members) != size:
        raise InvalidRequest("the map has the same member twice", param=param)
    return {name: memoryview(value) for name, value in members.items()}


def _array(raw: memoryview, param: str, length: int) -> list[memoryview]:
    if _size(raw, param, array=True) != length:
        raise InvalidRequest(f"it is an array of {length}", param=param)
    return [memoryview(element) for element in _value(raw, param, list[msgspec.Raw])]


def _size(raw: memoryview, param: str | None, *, array: bool) -> int:
    """Return how many elements or members the header of an array or map announces."""
    first = raw[0] if raw else 0xC1
    short, middle, long = (0x90, _ARRAY16, _ARRAY32) if array else (0x80, _MAP16, _MAP32)
    if first & 0xF0 == short:
        return first & 0x0F
    if first not in {middle, long}:
        what = "the body" if param is None else "this"
        raise InvalidRequest(f"{what} is to be {'an array' if array else 'a map'} of MessagePack", param=param)
    return int.from_bytes(raw[1 : 3 if first == middle else 5], "big")


def _tensor(raw: memoryview, param: str) -> memoryview:
    """Return the bytes of an extension; the value is known to be whole."""
    first = raw[0]
    width = _EXT.get(first, 0)
    if (first not in _FIXEXT and not width) or raw[1 + width] != RAW:
        raise InvalidRequest(f"it is raw little-endian bytes, as MessagePack's extension type {RAW}", param=param)
    return raw[2 + width :]


def _wrong(error: Exception, param: str | None) -> NoReturn:
    where = "the body" if param is None else "this"
    raise InvalidRequest(f"{where} is not the MessagePack that is wanted: {error}", param=param) from None
