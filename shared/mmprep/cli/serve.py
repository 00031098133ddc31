"""``mmprep serve``: run the service in the foreground until SIGTERM or Ctrl-C."""

from __future__ import annotations

import sys
import time

import msgspec

from mmprep import __version__, failpoints
from mmprep.cli.extra import require_server
from mmprep.cli.options import parser, resolve
from mmprep.cli.ready import ready_line
from mmprep.errors import StartupError
from mmprep.ports import claim_port
from mmprep.runtime import RuntimeDir
from mmprep.sizes import format_size
from mmprep.supervisor.options import ServeOptions
from mmprep.supervisor.supervise import supervise


def with_remote_port(options: ServeOptions) -> ServeOptions:
    """Return the options with a free port in the place of port 0 of ``--remote-endpoint``; it stays when the door is replaced."""
    endpoint = options.remote_endpoint
    if endpoint is None or endpoint.port:
        return options
    try:
        with claim_port(endpoint.host, 0) as reserved:
            port = reserved.getsockname()[1]
    except StartupError:
        raise StartupError(f"--remote-endpoint {endpoint}: this is no address of this machine") from None
    return msgspec.structs.replace(options, remote_endpoint=endpoint._replace(port=port))


def _frontends(number: int) -> str:
    return "1 frontend" if number == 1 else f"{number} frontends"


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    made = parser("serve", "Run the service: one writer with its lanes, and the frontends.")
    made.add_argument("model", nargs="?", help="model directory or hub id; none: the embedded demonstration model")
    parsed = made.parse_args(arguments)
    require_server()
    options = with_remote_port(resolve(parsed, parsed.model))
    options.logs.apply()
    if failpoints.check():
        print(
            f"mmprep: {failpoints.VARIABLE} is set: this service breaks on purpose, where it says so",
            file=sys.stderr,
            flush=True,
        )
    started = time.monotonic()
    print(
        f"mmprep {__version__}: starting {_frontends(options.frontends)}, {options.lanes} lanes and a ring of "
        f"{format_size(options.cache_size)} for {options.served_model_name}",
        file=sys.stderr,
        flush=True,
    )

    def on_ready(port: int, runtime: RuntimeDir) -> None:
        host = f"[{options.host}]" if ":" in options.host else options.host
        line = ready_line(time.monotonic() - started, f"http://{host}:{port}", runtime.path)
        if options.remote_endpoint is not None:
            print(f"mmprep: backends on other hosts connect to {options.remote_endpoint}", file=sys.stderr, flush=True)
        print(line, file=sys.stderr, flush=True)

    return supervise(options, on_ready)
