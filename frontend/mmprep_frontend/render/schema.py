"""How bodies of JSON are read: by a schema, strictly; then once more, where clients say the same in other words.

Rules
-----
- What breaks the schema is looked at a second time, so that other requests do not pay for it.
- A whole number is one also where it is written ``5.0``: JSON knows one kind of number, and some clients write only that.
- A part without its type is of the type whose name is among its keys, as ``{"image_url": …}``; which types these are, the
  caller says.
- Values that are free, as a tool's parameters, are never touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import inspect

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.explain import KEYS, explain

T = TypeVar("T")

#: Up to it every whole number is exact as a float.
_MOST_EXACT = 2**53
_STEP = re.compile(r"\[(?P<index>[^\]]*)\]|(?P<name>[^.\[\]]+)")


class Schema(Generic[T]):
    """What a body, or a piece of one, must be.

    Parameters
    ----------
    kind:
        The type that comes out.
    untyped:
        Tags of structs that are known without their tag, by a key of the same name; the first that is there counts.
    """

    def __init__(self, kind: type[T], *, untyped: Sequence[str] = ()) -> None:
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)
        self._form = inspect.type_info(kind)
        self._untyped = untyped

    def decode(self, body: bytes | memoryview) -> T:
        """Return what a JSON text says.

        Raises
        ------
        InvalidRequest
            It is no JSON, or breaks the schema; ``param`` is the place.
        """
        try:
            try:
                return self._decoder.decode(body)
            except msgspec.ValidationError:
                return self._convert(msgspec.json.decode(body))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
        except RecursionError:
            raise InvalidRequest("The body is nested too deeply.") from None

    def convert(self, value: Any, param: str) -> T:
        """Return plain data that stand at ``param`` as the type; raises InvalidRequest with the place."""
        try:
            try:
                return msgspec.convert(value, self._kind)
            except msgspec.ValidationError:
                return self._convert(value)
        except InvalidRequest as error:
            inner = error.param
            text = error.message.partition(": ")[2]
            place = param if inner is None else f"{param}{inner}" if inner.startswith("[") else f"{param}.{inner}"
            raise InvalidRequest(f"{place}: {text}", param=place) from None

    def _convert(self, value: Any) -> T:
        try:
            return msgspec.convert(self._mended(value, self._form), self._kind)
        except msgspec.ValidationError as error:
            raise explain(str(error), self._allowed) from None

    def _mended(self, value: Any, form: inspect.Type) -> Any:
        """Return ``value`` with the words of the schema where it has others."""
        match _member(value, form):
            case inspect.IntType() if value.is_integer() and abs(value) <= _MOST_EXACT:
                return int(value)
            case inspect.CollectionType(item_type=of_items):
                return [self._mended(item, of_items) for item in value]
            case inspect.DictType(value_type=of_values):
                return {name: self._mended(item, of_values) for name, item in value.items()}
            case inspect.StructType(fields=fields):
                forms = {field.encode_name: field.type for field in fields}
                return {
                    name: self._mended(item, forms[name]) if name in forms else item for name, item in value.items()
                }
            case inspect.UnionType() as structs if isinstance(value, dict):
                return self._typed(value, structs)
        return value

    def _typed(self, value: dict[str, Any], structs: inspect.UnionType) -> dict[str, Any]:
        """Return ``value``, which lacks the tag of one of ``structs``, with it, where its keys tell it."""
        known = {struct.tag: struct for struct in structs.types if isinstance(struct, inspect.StructType)}
        tag = next((tag for tag in self._untyped if tag in known and tag in value), None)
        if tag is None:
            return value
        typed: dict[str, Any] = self._mended({**value, str(known[tag].tag_field): tag}, known[tag])
        return typed

    def _allowed(self, path: str) -> list[Any]:
        """Return the values that the schema lists at a place, as ``messages[0].role``; none where it lists none."""
        forms = list(_members(self._form))
        for step in _STEP.finditer(path):
            forms = [
                member
                for form in forms
                for inner in _inner(form, step["name"], step["index"])
                for member in _members(inner)
            ]
        values = [value for form in forms if isinstance(form, inspect.LiteralType) for value in form.values]
        return list(dict.fromkeys(values))


def _members(form: inspect.Type) -> Iterator[inspect.Type]:
    """Give the types that a union is of, or the one that it is."""
    if isinstance(form, inspect.UnionType):
        yield from form.types
    else:
        yield form


def _member(value: Any, form: inspect.Type) -> inspect.Type | None:
    """Return the type within ``form`` that ``value`` is to be, where there is anything to mend in it.

    A union of structs is returned as it is for an object without a tag.
    """
    members = list(_members(form))
    if isinstance(value, float):
        kinds = {type(member): member for member in members}
        return None if inspect.FloatType in kinds else kinds.get(inspect.IntType)
    if isinstance(value, list):
        return next((member for member in members if isinstance(member, inspect.CollectionType)), None)
    if not isinstance(value, dict):
        return None
    for member in members:
        if isinstance(member, inspect.DictType):
            return member
        if isinstance(member, inspect.StructType) and (
            member.tag_field is None or value.get(member.tag_field) == member.tag
        ):
            return member
    tagged = any(isinstance(member, inspect.StructType) and value.get(member.tag_field) for member in members)
    return form if isinstance(form, inspect.UnionType) and not tagged else None


def _inner(form: inspect.Type, name: str | None, index: str | None) -> Iterator[inspect.Type]:
    """Give what ``form`` has under a name, or at an index, where ``key`` stands for the keys of an object."""
    match form:
        case inspect.CollectionType(item_type=items) if index is not None:
            yield items
        case inspect.DictType(key_type=keys, value_type=values) if index is not None:
            yield keys if index == KEYS else values
        case inspect.StructType(fields=fields, tag_field=tag_field, tag=tag) if name is not None:
            if name == tag_field:
                yield inspect.LiteralType((tag,))
            yield from (field.type for field in fields if field.encode_name == name)
