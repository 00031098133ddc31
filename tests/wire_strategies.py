"""Hypothesis strategies for messages, made from their schema, so that a new message is tested when it is written."""

from __future__ import annotations

from typing import get_args

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from mmprep.wire import messages, remote_messages

#: Every union of messages that a link carries.
_NAMES = (
    "ToWriter",
    "FromWriter",
    "FromLane",
    "ToLane",
    "ToFrontend",
    "FromFrontend",
    "ToSupervisor",
    "FromSupervisor",
)
LINKS = {name: getattr(messages, name) for name in _NAMES}
LINKS |= {name: getattr(remote_messages, name) for name in ("ToDoor", "FromDoor")}
#: Every message, once.
MESSAGES = sorted(
    {kind for union in LINKS.values() for kind in get_args(union)} | {messages.Put, messages.Task},
    key=lambda kind: kind.__name__,
)
_LARGEST = 64


def values(kind: inspect.Type) -> st.SearchStrategy:  # noqa: C901 -- one case a type
    """Return a strategy for plain values of a field's type, or structs where it is one."""
    match kind:
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType():
            low = -(2**63) if kind.ge is None else kind.ge
            high = 2**63 - 1 if kind.le is None and kind.lt is None else (kind.le or (kind.lt or 0) - 1)
            return st.integers(low, high)
        case inspect.BytesType():
            return st.binary(min_size=kind.min_length or 0, max_size=min(kind.max_length or _LARGEST, _LARGEST))
        case inspect.StrType() if kind.pattern:
            return st.from_regex(kind.pattern, fullmatch=True)
        case inspect.StrType():
            return st.text(min_size=kind.min_length or 0, max_size=min(kind.max_length or _LARGEST, _LARGEST))
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.NoneType():
            return st.none()
        case inspect.UnionType():
            return st.one_of([values(member) for member in kind.types])
        case inspect.VarTupleType():
            return st.lists(values(kind.item_type), min_size=kind.min_length or 0, max_size=4).map(tuple)
        case inspect.TupleType():
            return st.tuples(*(values(item) for item in kind.item_types))
        case inspect.StructType():
            return st.builds(kind.cls, *(values(field.type) for field in kind.fields))
    raise NotImplementedError(kind)


def instances(struct: type[msgspec.Struct]) -> st.SearchStrategy:
    """Return a strategy for messages of a type."""
    return values(inspect.type_info(struct))
