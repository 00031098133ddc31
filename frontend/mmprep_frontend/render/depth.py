"""How deeply the open parts of a request may be nested: what encoders and templates can follow, with room to spare."""

from __future__ import annotations

from typing import Any

from mmprep.errors import InvalidRequest

#: Fields whose content the schema leaves open.
_OPEN = (
    "tools",
    "tool_choice",
    "documents",
    "chat_template_kwargs",
    "response_format",
    "structured_outputs",
    "repetition_detection",
    "vllm_xargs",
    "stream_options",
    "kv_transfer_params",
    "ec_transfer_params",
)
#: Levels of lists and objects in one of them.
_DEEPEST = 128


def check_depth(request: Any) -> None:
    """Refuse a request of which an open field is nested too deeply; raises InvalidRequest."""
    for name in _OPEN:
        if _is_too_deep(getattr(request, name, None)):
            raise InvalidRequest(f"'{name}' is nested more than {_DEEPEST} levels deep.", param=name)


def _is_too_deep(value: Any) -> bool:
    """Whether a value of JSON has more than ``_DEEPEST`` levels; a loop over the levels, as recursion would not end well."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        if not level:
            return False
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)
