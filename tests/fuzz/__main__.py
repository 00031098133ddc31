"""``python -m tests.fuzz``: fuzz by hand, or replay what was found."""

from __future__ import annotations

import argparse
import contextlib
import sys

from tests.fuzz.fuzzing import Finding, execute, fuzz, time_limit
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(prog="./scripts/fuzz", description="Fuzz what reads bytes from outside.")
    parser.add_argument("target", nargs="?", choices=list(TARGETS), help="one of them; by default all, one by one")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="another one makes other inputs (default: 0)")
    parser.add_argument("--replay", metavar="HEX", help="run this input of TARGET once, and show the whole error")
    options = parser.parse_args()
    with time_limit():
        if options.replay is not None:
            if options.target is None:
                parser.error("--replay needs a target")
            with contextlib.closing(TARGETS[options.target]) as target:
                print(execute(target, bytes.fromhex(options.replay)))  # noqa: T201 -- a command
            return 0
        failed = 0
        for name in [options.target] if options.target else TARGETS:
            try:
                print(f"{name}: {fuzz(TARGETS[name], seed=options.seed, seconds=options.seconds)}", flush=True)  # noqa: T201 -- a command
            except Finding as finding:
                print(f"{name}: {finding}", file=sys.stderr)  # noqa: T201 -- a command
                failed = 1
        return failed


if __name__ == "__main__":
    sys.exit(main())
