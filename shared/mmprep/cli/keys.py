"""``mmprep keys``: make a pair of CURVE keys, for the service or for a backend on another host."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmprep.remote.curve import make_pair


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    made = argparse.ArgumentParser(
        prog="mmprep keys", description="Make a pair of keys: NAME.key is secret, NAME.pub is not."
    )
    made.add_argument("directory", type=Path, help="where the two files are made")
    made.add_argument("name", help="of the service or the backend, as engine-0")
    parsed = made.parse_args(arguments)
    secret, public = make_pair(parsed.directory, parsed.name)
    print(f"{secret}: the secret key; it stays with its owner")
    print(f"{public}: the public key; give it to the other side")
    return 0
