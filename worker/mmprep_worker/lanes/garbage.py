"""What a lane sends in place of a message where the failpoint ``lane.send`` says so: what the writer must survive.

Kinds: ``bytes`` (no message at all), ``frames`` (two too many), ``other`` (the message, about another task), ``filled`` (the
task is done, whatever was to be said), ``length`` (tensors larger than any memory), ``empty`` (the frames without their
content), ``twice`` (the message, and once more).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from mmprep.wire import messages
from mmprep.wire.codec import pack

_ABSURD = 1 << 48

_KINDS: dict[str, Callable[[Any, list[Any]], list[list[Any]]]] = {
    "bytes": lambda _, frames: [[b"\xc1", *frames]],
    "frames": lambda message, frames: [[pack(message), *frames, b"more", b"and more"]],
    "other": lambda message, frames: [[pack(msgspec.structs.replace(message, task=message.task + 1)), *frames]],
    "filled": lambda message, _: [[pack(messages.Filled(message.task, 0, 0))]],
    "length": lambda message, frames: [[pack(messages.AskExtent(message.task, _ABSURD)), *frames]],
    "empty": lambda message, frames: [[pack(message), *(b"" for _ in frames)]],
    "twice": lambda message, frames: [[pack(message), *frames]] * 2,
}


def garbage(kind: str, message: msgspec.Struct, frames: Sequence[bytes | memoryview]) -> list[list[Any]]:
    """Return what to send in place of ``message``: frames of messages; raises KeyError for an unknown kind."""
    return _KINDS[kind](message, list(frames))
