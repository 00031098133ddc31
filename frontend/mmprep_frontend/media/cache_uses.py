"""What was used of the disk cache, until that is written down: its order decides what goes first.

Every hit is a use, and a write to the disk costs more than the hit. So uses are written down together, a second after the
first of them, or before that where the order is about to be asked for. What is lost with the process is that second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeAlias

#: Seconds from a use until it is written down.
_LATER: Final = 1.0
#: Media whose uses wait to be written down, at most; those of others are not noted meanwhile.
_MOST: Final = 4096

#: Writes down the uses of these names, in their order, and calls the other one when that is over.
Write: TypeAlias = Callable[[list[str], Callable[[object], None]], None]


class Uses:
    """Notes uses. To be made and used within one event loop."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._loop = asyncio.get_running_loop()
        self._names: dict[str, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._writing = False

    def note(self, name: str) -> None:
        """Note that the medium of this name was used."""
        if name in self._names or len(self._names) < _MOST:
            self._names.pop(name, None)
            self._names[name] = None
            self._write_later()

    def write_down(self) -> None:
        """Write down what was noted, unless that is being done: then what was noted meanwhile is written a second later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._names and not self._writing:
            self._writing = True
            names = list(self._names)
            self._names.clear()
            self._write(names, self._written)

    def _write_later(self) -> None:
        if self._timer is None and not self._writing:
            self._timer = self._loop.call_later(_LATER, self.write_down)

    def _written(self, _: object) -> None:
        self._writing = False
        if self._names:
            self._write_later()
