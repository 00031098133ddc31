"""``mmprep bench``: a load test of a running server, and the comparison of two."""

from __future__ import annotations

from mmprep.cli.extra import require_server
from mmprep.loadtest.arguments import parse


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    parsed = parse(arguments)
    require_server()
    from mmprep.loadtest import command  # noqa: PLC0415 -- it draws pictures, with what the extra installs

    return command.run(parsed)
