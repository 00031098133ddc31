"""``python -m mmprep.chaos``: run a service under load and faults, print a report, exit with 0 only if nothing broke."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mmprep import __version__
from mmprep.bench.processes import machine_facts
from mmprep.chaos.report import tables
from mmprep.chaos.run import CACHE_MIB, Plan, Run
from mmprep.chaos.shm import own_shm
from mmprep.errors import MmprepError

#: Of the ring's size: readers that are stopped keep the rings of dead writers.
_RINGS_IN_SHM = 10
_CLOCKS = "not set: time limits use monotonic clocks only (tests/unit/test_clocks.py)"


def _tell(line: str) -> None:
    sys.stderr.write(f"== {line}\n")
    sys.stderr.flush()


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def main() -> None:
    """Do what the module's first line says."""
    parser = argparse.ArgumentParser(
        prog="mmprep.chaos", description="Kill, stop and confuse the processes of a service under load, and check all."
    )
    parser.add_argument("--minutes", type=_positive, default=1.0, help="of faults (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=None, help="of faults and load; default: one of this moment")
    parser.add_argument(
        "--every", type=_positive, default=2.0, help="seconds between two faults (default: %(default)g)"
    )
    parser.add_argument("--output", type=Path, help="file for the report, JSON")
    parser.add_argument("--log", type=Path, help="file for the service's log")
    parsed = parser.parse_args()
    seed = parsed.seed if parsed.seed is not None else time.time_ns() % 1_000_000
    why_not = own_shm((CACHE_MIB << 20) * _RINGS_IN_SHM)
    if why_not:
        _tell(f"no faults of a full /dev/shm: {why_not}")
    result: dict[str, Any] = {
        "mmprep": __version__,
        "seed": seed,
        "minutes": parsed.minutes,
        "every": parsed.every,
        "machine": machine_facts(),
    }
    with tempfile.TemporaryDirectory(prefix="mmprep-chaos-", dir="/tmp") as directory:
        run = Run(Plan(parsed.minutes, seed, parsed.every, shm=not why_not), Path(directory), _tell)
        try:
            run.run()
        except MmprepError as error:
            sys.exit(f"mmprep.chaos: seed {seed}: {error}")
        finally:
            if parsed.log is not None:
                shutil.copy(Path(directory, "service.log"), parsed.log)
    shm = f"not filled: {why_not}" if why_not else "an own one, filled now and then"
    result |= run.tally.report()
    result["circumstances"] = {"shared memory": shm, "clock jumps": _CLOCKS, **run.circumstances}
    if parsed.output is not None:
        parsed.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(tables(result) + "\n")
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
