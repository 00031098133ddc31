"""``traceparent`` and ``tracestate`` of a request, by the W3C's Trace Context (level 1, https://www.w3.org/TR/trace-context/). Pure.

What is malformed is as if it were not there: a trace then begins here. A wrong ``tracestate`` is dropped alone, since the
trace is known without it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_PARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<rest>-.*)?"
)
_KEY = re.compile(r"[a-z][_0-9a-z\-*/]{0,255}|[a-z0-9][_0-9a-z\-*/]{0,240}@[a-z][_0-9a-z\-*/]{0,13}")
_VALUE = re.compile(r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")
_SAMPLED = 1
#: Members of a state, and characters, that are taken; longer ones are dropped.
_MOST_MEMBERS = 32
_MOST_CHARACTERS = 2048


class Parent(NamedTuple):
    """The span that a request belongs to.

    Attributes
    ----------
    trace_id, span_id: 16 and 8 bytes.
    sampled: whether its maker records the trace.
    state: the members of ``tracestate``, in order.
    """

    trace_id: bytes
    span_id: bytes
    sampled: bool
    state: tuple[tuple[str, str], ...] = ()


def read_parent(parents: Sequence[str], states: Sequence[str] = ()) -> Parent | None:
    """Return what a request says of its trace, ``None`` where it says nothing that can be read.

    Parameters
    ----------
    parents, states:
        The values of all its headers ``traceparent`` and ``tracestate``. More than one parent is none.
    """
    if len(parents) != 1:
        return None
    found = _PARENT.fullmatch(parents[0].strip(" \t"))
    if found is None or found["version"] == "ff" or (found["version"] == "00" and found["rest"] is not None):
        return None
    trace_id, span_id = bytes.fromhex(found["trace"]), bytes.fromhex(found["span"])
    if not any(trace_id) or not any(span_id):
        return None
    return Parent(trace_id, span_id, bool(int(found["flags"], 16) & _SAMPLED), _read_state(states))


def _read_state(states: Sequence[str]) -> tuple[tuple[str, str], ...]:
    joined = ",".join(states)
    if len(joined) > _MOST_CHARACTERS:
        return ()
    members: dict[str, str] = {}
    for member in filter(None, (piece.strip(" \t") for piece in joined.split(","))):
        key, _, value = member.partition("=")
        if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value) or key in members:
            return ()
        members[key] = value
    return tuple(members.items()) if len(members) <= _MOST_MEMBERS else ()
