"""The line by which a coding client marks its system prompts. It changes with every request, and no model needs it.

A prompt that keeps it misses the engine's prefix cache from its first token on; so vLLM drops it, and so do we.
"""

from __future__ import annotations

_MARK = "x-anthropic-billing-header"


def is_attribution(text: str) -> bool:
    """Whether ``text`` begins with the line."""
    return text.startswith(_MARK)


def without_attribution(text: str) -> str:
    """Return ``text`` without its first line, where that is the mark."""
    return text.partition("\n")[2] if is_attribution(text) else text
