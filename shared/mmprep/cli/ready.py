"""The line with which ``mmprep serve`` says that it takes requests, written and read in one place; and not to leave one behind."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable

from mmprep.errors import ServiceUnavailable

_READY = re.compile(r"mmprep: ready after [0-9.]+ s: (http://\S+) and ipc://")


def unwind_on_sigterm() -> None:
    """Let SIGTERM unwind this process as an exit, so that it ends the service that it has started for itself."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def ready_line(seconds: float, url: str, runtime_dir: object) -> str:
    """Return the line."""
    return f"mmprep: ready after {seconds:.1f} s: {url} and ipc://{runtime_dir}"


def url_in(line: str) -> str | None:
    """Return the service's URL where ``line`` says that it is ready, else ``None``."""
    match = _READY.match(line)
    return match and match[1]


def url_when_ready(lines: Iterable[str]) -> str:
    """Return the URL of a service as soon as it says that it is ready; whatever else it says goes to our standard error.

    Parameters
    ----------
    lines:
        What it prints on its standard error. What comes after is left to the caller: a full pipe would stop the service.

    Raises
    ------
    ServiceUnavailable
        It ended before.
    """
    for line in lines:
        url = url_in(line)
        if url is not None:
            return url
        sys.stderr.write(line)
    raise ServiceUnavailable("the service did not start; its message stands above")
