"""``./scripts/loadtest``: ``mmprep bench`` against a service that is started for it, by default of the embedded model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading

from mmprep.cli.attended import attended
from mmprep.cli.ready import unwind_on_sigterm, url_when_ready
from mmprep.errors import MmprepError
from mmprep.loadtest import command
from mmprep.loadtest.arguments import parse

_USAGE = """usage: ./scripts/loadtest [--http] [--serve "OPTIONS OF mmprep serve"] [OPTIONS OF mmprep bench]

Starts a service, loads it, and stops it. --http sends the requests over HTTP, where the native client is used else.
"""


def main(arguments: list[str]) -> int:
    """Run the load test; returns the exit status."""
    if "--help" in arguments:
        print(_USAGE)
        parse(["--help"])
    http = "--http" in arguments
    rest = [argument for argument in arguments if argument != "--http"]
    options: list[str] = []
    if "--serve" in rest:
        place = rest.index("--serve")
        options = rest[place + 1].split() if place + 1 < len(rest) else []
        del rest[place : place + 2]
    unwind_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="mmprep-") as directory:
        serve = attended("serve", "--runtime-dir", directory, "--port", "0", *options)
        with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as service:
            try:
                assert service.stderr is not None
                url = url_when_ready(service.stderr)
                threading.Thread(target=sys.stderr.writelines, args=(service.stderr,), daemon=True).start()
                target = [url, "--runtime-dir", directory] if http else [f"ipc://{directory}"]
                return command.run(parse([*target, *rest]))
            finally:
                service.terminate()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MmprepError as error:
        sys.exit(f"loadtest: {error}")
