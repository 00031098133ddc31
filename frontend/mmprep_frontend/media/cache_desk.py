"""What an operator asks of the disk cache: ``python -m mmprep_frontend.media.cache_desk``, which the command line starts.

The orders come as JSON on standard input, the answer goes to standard output as JSON: what was asked for, or
``{"error": …}`` with status 1. No answer holds a URL or a host. Looking changes nothing, whatever is found.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

from mmprep.errors import StartupError
from mmprep.settings import CacheOrders, read_settings
from mmprep_frontend.media.cache_disk import BODIES, HOME, INDEX, CacheDisk
from mmprep_frontend.media.cache_index import Index, Kept
from mmprep_frontend.media.policy import UrlPolicy

#: What a request for a medium would get: it, it after its host was asked, or not it, and why.
Served: TypeAlias = Literal["yes", "after asking", "stale", "too large", "forbidden", "damaged"]


def answer(orders: CacheOrders) -> Any:
    """Return what was asked for, as plain data.

    Raises
    ------
    mmprep.errors.StartupError
        There is no cache, or its index cannot be read. The message names the directory: it is for who named it.
    """
    home = Path(orders.directory) / HOME
    try:
        if not home.is_dir():
            raise StartupError(f"there is no media cache in {orders.directory}")
        match orders.action:
            case "stats":
                return _stats(orders, home)
            case "inspect":
                return _inspect(orders, home)
            case "clear":
                return _clear(orders)
    except OSError as error:
        raise StartupError(f"the media cache in {orders.directory} cannot be used: {error.strerror}") from None
    except sqlite3.Error as error:
        raise StartupError(
            f"the index of the media cache in {orders.directory} cannot be used: {error}; where it stays so, remove "
            f"{home} by hand"
        ) from None


def _stats(orders: CacheOrders, home: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"entries": 0, "bytes": 0}
    with _looking(orders, home) as index:
        if index is not None:
            found = {"entries": index.count(), "bytes": index.nbytes()}
    return {"directory": orders.directory, **found, "max_bytes": orders.max_bytes, "ttl_seconds": orders.ttl}


def _inspect(orders: CacheOrders, home: Path) -> list[dict[str, Any]]:
    now = time.time()
    policy = UrlPolicy(orders.allowed_media_domains, orders.allow_private_networks)
    with _looking(orders, home) as index:
        media = [] if index is None else list(index.all())
    return [
        {
            "key": kept.key.hex(),
            "bytes": kept.nbytes,
            "age_seconds": round(now - kept.written, 3),
            "used_seconds": round(now - kept.used, 3),
            "left_seconds": round(max(0.0, kept.written + orders.ttl - now), 3),
            "served": served(kept, _size(home / BODIES / kept.name), orders, policy, now),
        }
        for kept in media
    ]


def _clear(orders: CacheOrders) -> dict[str, int]:
    disk = CacheDisk(Path(orders.directory), max_bytes=orders.max_bytes, ttl=orders.ttl)
    try:
        try:
            gone = disk.clear()
        except sqlite3.DatabaseError:
            gone = disk.clear()  # an index that is broken has been thrown away meanwhile
    finally:
        disk.close()
    return {"entries": len(gone), "bytes": sum(kept.charge for kept in gone)}


def served(kept: Kept, nbytes: int | None, orders: CacheOrders, policy: UrlPolicy, now: float) -> Served:
    """Return what a request for a medium would get. Pure.

    Parameters
    ----------
    nbytes:
        Of the file with its bytes; ``None`` where there is none.
    orders, policy:
        The settings of today.
    now:
        Seconds of the wall clock.
    """
    if nbytes != kept.nbytes:
        return "damaged"
    if kept.nbytes > orders.max_media_size:
        return "too large"
    if not kept.may_be_read(policy):
        return "forbidden"
    if kept.is_fresh(now, orders.ttl):
        return "yes"
    return "after asking" if kept.validators else "stale"


@contextlib.contextmanager
def _looking(orders: CacheOrders, home: Path) -> Iterator[Index | None]:
    """Give the index, to be read only; ``None`` where there is none."""
    path = home / INDEX
    if not path.exists():
        yield None
        return
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
        yield Index(connection, max_bytes=orders.max_bytes, ttl=orders.ttl)


def _size(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except OSError:
        return None


def main() -> None:
    """Answer once."""
    orders: CacheOrders = read_settings(CacheOrders)
    try:
        told = answer(orders)
    except StartupError as error:
        print(json.dumps({"error": error.message}))  # noqa: T201 -- the protocol with the command line
        sys.exit(1)
    print(json.dumps(told))  # noqa: T201 -- the protocol with the command line


if __name__ == "__main__":
    main()
