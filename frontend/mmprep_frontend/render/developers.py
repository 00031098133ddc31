"""Messages of the role ``developer``, for templates that know no such role.

They become messages of the system, and all of these one at the beginning, since many templates take no later one. This
is what vLLM does; its words and line breaks are kept.
"""

from __future__ import annotations

from typing import Any


def developers_as_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``messages`` without the role ``developer``; the same list where nobody has it.

    Parameters
    ----------
    messages: as the walk makes them; the content a text, or parts of which texts count here.
    """
    if all(message["role"] != "developer" for message in messages):
        return messages
    messages = [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]
    system = [message for message in messages if message["role"] == "system"]
    if len(system) == 1 and messages[0]["role"] == "system":
        return messages
    texts = filter(None, (_text(message["content"]) for message in system))
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *others]


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if "text" in part)
