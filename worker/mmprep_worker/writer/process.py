"""The writer's entry: settings from standard input, one clear line when it cannot start."""

from __future__ import annotations

import sys

from mmprep.errors import MmprepError, ServiceUnavailable
from mmprep.settings import CANNOT_START, WriterSettings, read_settings
from mmprep_worker.writer.shell import WriterShell


def main() -> None:
    """Run the writer of one runtime directory until its parent goes away or SIGTERM comes."""
    settings: WriterSettings = read_settings(WriterSettings)
    settings.logs.apply()
    try:
        shell = WriterShell(settings)
    except ServiceUnavailable as error:  # processes of the writer before are on their way out
        sys.exit(f"mmprep: {error}")
    except MmprepError as error:
        print(f"mmprep: {error}", file=sys.stderr, flush=True)  # noqa: T201 -- for the person who starts the service
        sys.exit(CANNOT_START)
    try:
        shell.run()
    finally:
        shell.close()
