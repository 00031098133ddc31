"""What the demonstration prints: headings, notes and checks, aligned, one line each, flushed at once."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple, TextIO

_WIDTH = 16


class Check(NamedTuple):
    """One statement: whether it holds, what it is about, and what was found."""

    ok: bool
    subject: str
    finding: str


class Page:
    """Prints to a stream, standard output by default, and remembers whether every check held."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self.failed = 0

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._write(f"\n{text}")

    def note(self, subject: str, text: str) -> None:
        """Tell something that is not a check; no subject continues the line above."""
        self._write(f"        {subject:<{_WIDTH}} {text}")

    def checks(self, checks: Iterable[Check]) -> None:
        """Tell checks, and count those that failed."""
        for check in checks:
            self.failed += not check.ok
            self._write(f"{'  ok    ' if check.ok else '  FAILED'}{check.subject:<{_WIDTH}} {check.finding}")

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()
