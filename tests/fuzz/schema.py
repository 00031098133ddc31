"""A second opinion on what the codec accepted: a strict MessagePack reader and a schema check, both written for this."""

from __future__ import annotations

import re
import struct
from random import Random
from typing import Any

import msgspec
from msgspec import inspect

#: Messages are at most this deep: structs in tuples in structs.
_DEEPEST = 12
_LARGEST = 300
_SIZES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_NUMBERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_FLOATS = {0xCA: ">f", 0xCB: ">d"}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class Strict:
    """Reads one MessagePack value and refuses what the protocol has no place for.

    Parameters
    ----------
    floats, duplicates:
        Whether floating-point numbers and repeated keys are allowed.
    """

    def __init__(self, data: bytes, *, floats: bool, duplicates: bool) -> None:
        self._data = data
        self._at = 0
        self._floats = floats
        self._duplicates = duplicates

    def read(self) -> Any:
        """Return the value; raises ``ValueError`` where it is refused, or something follows it."""
        value = self._value(0)
        if self._at != len(self._data):
            raise ValueError("something follows the value")
        return value

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise ValueError("it ends early")
        self._at += count
        return taken

    def _value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("it is too deep")
        head = self._take(1)[0]
        if head < 0x80 or head >= 0xE0:
            return head if head < 0x80 else head - 0x100
        if head in _CONSTANTS:
            return _CONSTANTS[head]
        if head in _NUMBERS or (head in _FLOATS and self._floats):
            form = _NUMBERS.get(head) or _FLOATS[head]
            return struct.unpack(form, self._take(struct.calcsize(form)))[0]
        if head < 0xC0:
            kind, size = (head >> 4 if head < 0xA0 else 0xA), head & (0xF if head < 0xA0 else 0x1F)
        elif head in _SIZES:
            kind = {0xC4: 0xB, 0xD9: 0xA, 0xDC: 0x9, 0xDE: 0x8}[max(k for k in (0xC4, 0xD9, 0xDC, 0xDE) if k <= head)]
            size = int.from_bytes(self._take(_SIZES[head]), "big")
        else:
            raise ValueError(f"type {head:#x} has no place in a message")
        if size > len(self._data):
            raise ValueError("a length lies")
        return self._sized(kind, size, depth)

    def _sized(self, kind: int, size: int, depth: int) -> Any:
        match kind:
            case 0xA:
                return self._take(size).decode()
            case 0xB:
                return self._take(size)
            case 0x9:
                return [self._value(depth + 1) for _ in range(size)]
        pairs = [(self._value(depth + 1), self._value(depth + 1)) for _ in range(size)]
        if not all(isinstance(key, (str, bytes)) for key, _ in pairs):
            raise ValueError("a key is no text")
        found = dict(pairs)
        if len(found) != size and not self._duplicates:
            raise ValueError("a key comes twice")
        return found


def fits(kind: inspect.Type, value: Any) -> bool:  # noqa: C901, PLR0912 -- one case a type
    """Return whether a decoded value is one of its type, to the last bound."""
    match kind:
        case inspect.NoneType():
            return value is None
        case inspect.BoolType():
            return type(value) is bool
        case inspect.IntType():
            return type(value) is int and _inside(kind, value)
        case inspect.FloatType():
            return type(value) is float
        case inspect.StrType():
            if type(value) is not str or not _length(kind, value):
                return False
            return kind.pattern is None or re.search(kind.pattern, value) is not None
        case inspect.BytesType():
            return type(value) is bytes and _length(kind, value)
        case inspect.LiteralType():
            return value in kind.values
        case inspect.UnionType():
            return any(fits(member, value) for member in kind.types)
        case inspect.VarTupleType():
            return type(value) is tuple and _length(kind, value) and all(fits(kind.item_type, item) for item in value)
        case inspect.TupleType():
            return (
                type(value) is tuple
                and len(value) == len(kind.item_types)
                and all(fits(item, found) for item, found in zip(kind.item_types, value, strict=True))
            )
        case inspect.DictType():
            return type(value) is dict and all(
                fits(kind.key_type, key) and fits(kind.value_type, item) for key, item in value.items()
            )
        case inspect.StructType():
            return type(value) is kind.cls and all(
                fits(field.type, getattr(value, field.name)) for field in kind.fields
            )
    raise NotImplementedError(kind)


def _inside(kind: inspect.IntType, value: int) -> bool:
    return (kind.ge is None or value >= kind.ge) and (kind.le is None or value <= kind.le)


def _length(kind: Any, value: Any) -> bool:
    longest = len(value) if kind.max_length is None else kind.max_length
    return (kind.min_length or 0) <= len(value) <= longest


def sample(rng: Random, kind: inspect.Type) -> Any:  # noqa: C901, PLR0912 -- one case a type
    """Return a random value of a type, often at one of its bounds."""
    match kind:
        case inspect.NoneType():
            return None
        case inspect.BoolType():
            return rng.random() < 0.5
        case inspect.IntType():
            low, high = -(2**63) if kind.ge is None else kind.ge, 2**63 - 1 if kind.le is None else kind.le
            return rng.choice((low, high, min(max(0, low), high), rng.randint(low, high)))
        case inspect.FloatType():
            return rng.choice((0.0, 1.5, -(2.0**70), rng.random()))
        case inspect.StrType() if kind.pattern:
            return rng.choice(("engine-0", "a" * 64, "A_b.9"))
        case inspect.StrType():
            least = kind.min_length or 0
            texts = ("", "é\n", "a" * (kind.max_length or 9), "x" * max(least, 1))
            return rng.choice([text for text in texts if len(text) >= least])[: kind.max_length]
        case inspect.BytesType():
            low = kind.min_length or 0
            return rng.randbytes(rng.randint(low, min(kind.max_length or _LARGEST, low + _LARGEST)))
        case inspect.LiteralType():
            return rng.choice(kind.values)
        case inspect.UnionType():
            return sample(rng, rng.choice(kind.types))
        case inspect.VarTupleType():
            return tuple(sample(rng, kind.item_type) for _ in range(rng.randint(kind.min_length or 0, 3)))
        case inspect.TupleType():
            return tuple(sample(rng, item) for item in kind.item_types)
        case inspect.DictType():
            return {sample(rng, kind.key_type): sample(rng, kind.value_type) for _ in range(rng.randint(0, 2))}
        case inspect.StructType():
            return kind.cls(*(sample(rng, field.type) for field in kind.fields))
    raise NotImplementedError(kind)


def info(struct_type: type[msgspec.Struct]) -> inspect.Type:
    """Return what :func:`fits` and :func:`sample` take for a struct."""
    return inspect.type_info(struct_type)
