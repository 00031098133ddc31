"""``mmprep cache``: what is in the ring of a running service and in the disk cache of media, and how to empty them.

The disk cache is that of the service, or the one that the options name; it needs no running service. What knows its files
is a process of the server's part. Keys are shown, which are hashes, and no URL: those may hold secrets.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from mmprep.cli.desk import DeskClient, WriterClient
from mmprep.cli.extra import require_server
from mmprep.cli.options import parser, read
from mmprep.errors import InternalError, ServiceUnavailable, StartupError
from mmprep.settings import CacheOrders
from mmprep.sizes import format_duration, format_size

_ACTIONS = ("stats", "clear", "inspect")
_OPTIONS = (
    "runtime-dir",
    "media-cache-dir",
    "media-cache-max-size",
    "media-cache-ttl",
    "max-media-size",
    "allowed-media-domains",
    "allow-private-networks",
)
#: Hexadecimal digits of a key that tables show.
_PREFIX = 16

Told = dict[str, Any]


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    made = parser("cache", "Show or empty the ring of a running service and the disk cache of media.", _OPTIONS)
    made.add_argument(
        "action", choices=_ACTIONS, help="stats: how full, how useful; inspect: every entry; clear: drop all"
    )
    made.add_argument("--only", choices=("ring", "disk"), help="one of the two")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    parsed = made.parse_args(arguments)
    values = read(parsed)
    status, missing = _status(values["runtime_dir"])
    orders = None if parsed.only == "ring" else _orders(parsed, values, status)
    if status is None and parsed.only != "disk" and (parsed.only == "ring" or orders is None):
        raise ServiceUnavailable(missing)
    if orders is None and parsed.only == "disk":
        raise StartupError(
            "no disk cache is named: give --media-cache-dir, or the --runtime-dir of a service that has one"
        )
    told: Told = {"ring": None, "disk": None}
    # The disk first: it is more likely to fail, and then nothing was dropped.
    if orders is not None:
        told["disk"] = _ask_disk(orders)
    if status is not None and parsed.only != "disk":
        told["ring"] = _ask_ring(parsed.action, values["runtime_dir"], status)
    if parsed.action == "stats" and orders is not None:
        told["disk"] |= _counted(status, orders.directory)
    if parsed.json:
        print(json.dumps(told))
        return 0
    absent = {"ring": missing, "disk": "none is set (--media-cache-dir)"}
    for part in ("ring", "disk"):
        if told[part] is not None:
            print("\n".join(_SHOWN[parsed.action, part](told[part])))
        elif parsed.only is None:
            print(f"{part}  {absent[part]}")
    return 0


def _status(runtime_dir: str | None) -> tuple[Told | None, str]:
    """Return the status of the service, or ``None`` and why there is none."""
    try:
        with DeskClient(runtime_dir) as desk:
            return desk.status(), ""
    except ServiceUnavailable as error:
        return None, error.message


def _orders(parsed: argparse.Namespace, values: Told, status: Told | None) -> CacheOrders | None:
    """Return what to ask of which disk cache: the one on the command line, the service's, or the one set elsewhere."""
    running = (status or {}).get("media_cache")
    if running is not None and parsed.media_cache_dir is None:
        return msgspec.convert({"action": parsed.action, **running}, CacheOrders)
    if values["media_cache_dir"] is None:
        return None
    return CacheOrders(
        action=parsed.action,
        directory=str(values["media_cache_dir"]),
        max_bytes=values["media_cache_max_size"],
        ttl=values["media_cache_ttl"],
        max_media_size=values["max_media_size"],
        allowed_media_domains=values["allowed_media_domains"],
        allow_private_networks=values["allow_private_networks"],
    )


def _ask_disk(orders: CacheOrders) -> Any:
    require_server()
    command = [sys.executable, "-m", "mmprep_frontend.media.cache_desk"]
    done = subprocess.run(command, input=msgspec.json.encode(orders) + b"\n", stdout=subprocess.PIPE, check=False)
    try:
        told = json.loads(done.stdout)
    except ValueError:
        raise InternalError("the disk cache could not be asked; the reason stands above") from None
    if done.returncode:
        raise StartupError(told["error"])
    return told


def _ask_ring(action: str, runtime_dir: str | None, status: Told) -> Any:
    if action == "stats":
        counters = status["metrics"]
        return {
            **status["ring"],
            "queries": int(counters.get("mmprep_mm_cache_queries_total", 0)),
            "hits": int(counters.get("mmprep_mm_cache_hits_total", 0)),
            "spills": status["spills"],
        }
    with WriterClient(runtime_dir) as writer:
        if action == "clear":
            cleared = writer.clear()
            return {"entries": cleared.entries, "bytes": cleared.nbytes}
        return [
            {
                "slot": entry.slot,
                "key": entry.key.hex(),
                "bytes": entry.nbytes,
                "generation": entry.generation,
                "state": entry.state,
                "pins": entry.pins,
                "leases": entry.leases,
                "spill": entry.spill,
            }
            for entry in writer.entries()
        ]


def _counted(status: Told | None, directory: str) -> Told:
    """Return what the running service has counted of its disk cache; nothing where none runs, or it has another one."""
    if status is None or status["media_cache"] is None or status["media_cache"]["directory"] != directory:
        return {}
    names = ("hits", "misses", "evictions", "errors")
    return {name: int(status["metrics"].get(f"mmprep_media_cache_{name}_total", 0)) for name in names}


# --- for people ---------------------------------------------------------------------------------------------------------


def _ring_stats(ring: Told) -> Iterable[str]:
    used, spills = ring["capacity"] - ring["free"], ring["spills"]
    yield f"ring  {ring['entries']} entries, {format_size(used)} of {format_size(ring['capacity'])}"
    yield f"      {_rate(ring['hits'], ring['queries'])}; {ring['evictions']} evictions"
    yield f"      beside it {spills['entries']} entries, {format_size(spills['bytes'])}"


def _disk_stats(disk: Told) -> Iterable[str]:
    used = f"{format_size(disk['bytes'])} of {format_size(disk['max_bytes'])}"
    yield f"disk  {disk['entries']} media, {used}, each for {format_duration(disk['ttl_seconds'])}"
    if "hits" in disk:
        rate = _rate(disk["hits"], disk["hits"] + disk["misses"])
        yield f"      {rate}; {disk['evictions']} evictions, {disk['errors']} errors"
    yield f"      in {disk['directory']}"


def _rate(hits: int, queries: int) -> str:
    return f"{hits / queries:.1%} of {queries} lookups hit" if queries else "no lookups yet"


def _ring_table(entries: list[Told]) -> Iterable[str]:
    plain = ("generation", "state", "pins", "leases")
    head = ("ring: slot", "key", "bytes", *plain, "where")
    return _table(
        head,
        [
            (
                str(entry["slot"]),
                entry["key"][:_PREFIX],
                format_size(entry["bytes"]),
                *(str(entry[name]) for name in plain),
                "beside" if entry["spill"] else "ring",
            )
            for entry in entries
        ],
    )


def _disk_table(media: list[Told]) -> Iterable[str]:
    head = ("disk: key", "bytes", "age", "last used", "left", "served")
    return _table(
        head,
        [
            (
                medium["key"][:_PREFIX],
                format_size(medium["bytes"]),
                *(format_duration(medium[f"{name}_seconds"]) for name in ("age", "used", "left")),
                medium["served"],
            )
            for medium in media
        ],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _cleared(part: str, what: str) -> Callable[[Told], Iterable[str]]:
    return lambda told: [f"{part}  {told['entries']} {what} dropped, {format_size(told['bytes'])} freed"]


_SHOWN: dict[tuple[str, str], Callable[[Any], Iterable[str]]] = {
    ("stats", "ring"): _ring_stats,
    ("stats", "disk"): _disk_stats,
    ("inspect", "ring"): _ring_table,
    ("inspect", "disk"): _disk_table,
    ("clear", "ring"): _cleared("ring", "entries"),
    ("clear", "disk"): _cleared("disk", "media"),
}
