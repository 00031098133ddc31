"""The line with which ``mmprep serve`` says that it takes requests: written and read in one place."""

from __future__ import annotations

import re

_READY = re.compile(r"mmprep: ready after [0-9.]+ s: (http://\S+) and ipc://")


def ready_line(seconds: float, url: str, runtime_dir: object) -> str:
    """Return the line."""
    return f"mmprep: ready after {seconds:.1f} s: {url} and ipc://{runtime_dir}"


def url_in(line: str) -> str | None:
    """Return the service's URL where ``line`` says that it is ready, else ``None``."""
    match = _READY.match(line)
    return match and match[1]
