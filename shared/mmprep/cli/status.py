"""``mmprep status``: what a running service does, once or live."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from mmprep.cli.desk import DeskClient
from mmprep.sizes import format_size


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mmprep status", description="Show what a running service does.")
    parser.add_argument("--runtime-dir", help="of the service; default: $XDG_RUNTIME_DIR/mmprep")
    parser.add_argument("--json", action="store_true", help="print one JSON object and end")
    parser.add_argument(
        "--once", action="store_true", help="print once and end; the default where output is no terminal"
    )
    parsed = parser.parse_args(arguments)
    with DeskClient(parsed.runtime_dir) as desk:
        if parsed.json:
            print(json.dumps(desk.status()))
            return 0
        if parsed.once or not sys.stdout.isatty():
            print(table(desk.status()))
            return 0
        try:
            while True:
                print(f"\x1b[H\x1b[2J{table(desk.status())}\n\nCtrl-C ends this view.", flush=True)
                time.sleep(1.0)
        except KeyboardInterrupt:
            return 0


def table(status: dict[str, Any]) -> str:
    """Return the status as lines for people."""
    ring, totals = status.get("ring", {}), status.get("metrics", {})
    queries = totals.get("mmprep_mm_cache_queries_total", 0)
    hits = totals.get("mmprep_mm_cache_hits_total", 0)
    rate = f"{hits / queries:.1%} of {queries:.0f} lookups" if queries else "no lookups yet"
    worker = status.get("worker")
    lines = [
        f"supervisor  pid {status['supervisor']['pid']}",
        *(f"frontend    pid {f['pid']}  {f['inflight']} under way" for f in status["frontends"]),
        f"writer      pid {worker['pid']}  incarnation {worker['incarnation']}"
        if worker
        else "writer      not running",
        *(f"lane        pid {lane['pid']}  {lane['state']}" for lane in status.get("lanes", [])),
        *(f"backend     {b['id']}  pid {b['pid']}  {b['leases']} leases" for b in status.get("backends", [])),
    ]
    if "remote" in status:
        lines.append(f"door        pid {status['remote']['pid']}  {_door(status['remote'])}")
    if ring:
        parts = ", ".join(f"{state} {format_size(ring[state])}" for state in ("free", "ready", "leased", "filling"))
        lines.append(f"ring        {format_size(ring['capacity'])}: {parts}; {ring['entries']} entries")
        spills, inline = status["spills"], status["inline"]
        lines.append(f"spills      {format_size(spills['bytes'])}; {spills['entries']} entries, {spills['made']} made")
        lines.append(f"inline      {format_size(inline['bytes'])} on their way; {inline['sent']} items sent")
        lines.append(f"cache hits  {rate}; {ring['evictions']} evictions")
    for name, queue in status.get("queues", {}).items():
        lines.append(f"queue       {name}: {queue['depth']} waiting, {format_size(queue['bytes'])}{_pulled(queue)}")
    return "\n".join(lines)


def _door(remote: dict[str, Any]) -> str:
    """Return what there is to tell of the door for backends on other hosts."""
    keys = "with keys" if remote["encrypted"] else "without keys"
    backends = "".join(f"; {b['id']}: {b['leases']} leases, {b['jobs']} jobs" for b in remote["backends"])
    return f"{remote['endpoint']} {keys}{backends}"


def _pulled(queue: dict[str, Any]) -> str:
    """Return what there is to tell of a queue of jobs, which backends pull."""
    if "backends" not in queue:
        return ""
    return f"; {queue['delivered']} delivered, {len(queue['backends'])} backends pull, {len(queue['dead_letters'])} dead letters"
