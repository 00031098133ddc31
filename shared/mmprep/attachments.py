"""What the body of a native request is made of: JSON, and beside it media as frames and headers as fields of their own."""

from __future__ import annotations

import math
from typing import Any

from mmprep.errors import InvalidRequest

#: Of a header that tells of a trace.
_MOST_CHARACTERS = 2048


def detach(node: Any, attachments: list[Any]) -> Any:
    """Return ``node`` with every bytes-like value replaced by the name of an attachment.

    Raises
    ------
    InvalidRequest
        It holds a number that JSON does not have, which would become null; ``param`` names its place.
    """
    if isinstance(node, float) and not math.isfinite(node):
        raise InvalidRequest("NaN and infinity are no numbers that can be sent; leave them out", param="")
    if node is None or isinstance(node, str | int | float):
        return node
    if isinstance(node, bytes | bytearray | memoryview):
        attachments.append(node)
        return f"attachment:{len(attachments) - 1}"
    if isinstance(node, dict):
        detached = {}
        for key, value in node.items():
            try:
                detached[key] = detach(value, attachments)
            except InvalidRequest as error:
                error.param = f"{key}.{error.param}".rstrip(".")
                raise
        return detached
    if isinstance(node, list | tuple):
        return [detach(value, attachments) for value in node]
    return node


def header(body: dict[str, Any], name: str) -> str | None:
    """Take a header out of what a call was given; raises InvalidRequest."""
    value = body.pop(name, None)
    if value is not None and not (isinstance(value, str) and len(value) <= _MOST_CHARACTERS):
        raise InvalidRequest(f"{name} is a text of at most {_MOST_CHARACTERS} characters", param=name)
    return value
