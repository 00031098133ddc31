"""The command line: ``mmprep COMMAND``. Each command is a module with ``run(arguments) -> exit status``."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import ModuleType

from mmprep import __version__
from mmprep.errors import MmprepError

_COMMANDS = {
    "serve": "run the service",
    "render": "render one request from a file, with a service of its own",
    "status": "show what a running service does",
    "cache": "show or empty the ring and the disk cache of media",
    "bench": "load a running server and say how long its answers took",
    "keys": "make a pair of keys for the service or a backend on another host",
    "doctor": "check whether this machine can run the service",
}

_USAGE = "\n".join(
    (
        "usage: mmprep COMMAND [OPTIONS]",
        "",
        *(f"  {name:8} {what}" for name, what in _COMMANDS.items()),
        "",
        "`mmprep COMMAND --help` shows a command's options, `mmprep --version` the version.",
    )
)

#: What shells show of a command that Ctrl-C ended.
_INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Run the command that ``sys.argv`` names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_USAGE)
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"mmprep {__version__}")
        sys.exit(0)
    command = arguments[0]
    if command not in _COMMANDS:
        print(f"mmprep: there is no command {command!r}\n\n{_USAGE}", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(_load(command).run(arguments[1:]))
    except MmprepError as error:
        print(f"mmprep {command}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _load(command: str) -> ModuleType:
    """Import a command. Ctrl-C ends the process meanwhile: as an exception it can get lost in the import system."""
    former = signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    try:
        return importlib.import_module(f"mmprep.cli.{command}")
    finally:
        signal.signal(signal.SIGINT, former)
