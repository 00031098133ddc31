"""Tensors over tcp: a remote backend's pull of an item, against raw ZeroMQ moving as many bytes.

Both by turns, over the loopback, both with CURVE or both without. Raw is a DEALER that asks a ROUTER for one message of all
bytes; the pull is ``Backend.open`` of an address that the service has leased to the backend before: a word with the door,
then the chunks, into one buffer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq

from mmprep.backend import Backend
from mmprep.bench import pictures
from mmprep.bench.figures import median
from mmprep.bench.handover import READER, Requests, Tensor
from mmprep.bench.running import Child, Service, service
from mmprep.cli.desk import DeskClient
from mmprep.ports import claim_port
from mmprep.remote.curve import make_pair

_MOST = 100_000_000
_LANES = 2


def measure(model: Path, directory: Path, tensors: Sequence[Tensor], repeats: int, ring: str) -> list[dict[str, Any]]:
    """Return for each tensor, with and without CURVE, the medians in milliseconds and the ratio of the bandwidths."""
    keys = directory / "keys"
    for name in ("service", "backend"):
        make_pair(keys / name, name)
    options = ["--curve-key-file", str(keys / "service" / "service.key"), "--curve-clients-dir", str(keys / "backend")]
    return [
        *_secured(model, tensors, repeats, keys, options=options, ring=ring),
        *_secured(model, tensors, repeats, None, options=[], ring=ring),
    ]


def _secured(
    model: Path, tensors: Sequence[Tensor], repeats: int, keys: Path | None, *, options: list[str], ring: str
) -> list[dict[str, Any]]:
    with claim_port("127.0.0.1", 0) as reserved:
        raw = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
    public, secret = (key.decode() for key in zmq.curve_keypair())
    orders = {"endpoint": raw, "secret": secret if keys else "", "most": _MOST}
    context: zmq.Context[Any] = zmq.Context()
    remote = ["--remote-endpoint", "tcp://127.0.0.1:0", *options]
    try:
        with (
            service(model, frontends=1, lanes=_LANES, cache_size=ring, options=remote) as running,
            Child("mmprep.bench.raw_tcp", orders) as echo,
            context.socket(zmq.DEALER) as socket,
        ):
            echo.wait_ready()
            if keys is not None:
                socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
                socket.curve_serverkey = public.encode()
            socket.connect(raw)
            return [_one(running, socket, tensor, repeats, keys) for tensor in tensors]
    finally:
        context.destroy(linger=0)


def _one(
    running: Service, socket: zmq.Socket[bytes], tensor: Tensor, repeats: int, keys: Path | None
) -> dict[str, Any]:
    with DeskClient(running.runtime_dir) as desk:
        endpoint = desk.status()["remote"]["endpoint"]
    files: dict[str, Any] = {}
    if keys is not None:
        files["curve_key_file"] = keys / "backend" / "backend.key"
        files["curve_server_key_file"] = keys / "service" / "service.pub"
    picture = pictures.jpeg(tensor.picture)
    requests = Requests(running)
    with (
        Backend(endpoint, id=READER, transport="tcp", **files) as backend,
        Backend(f"ipc://{running.runtime_dir}") as near,
    ):
        address = requests.address(picture, "copy")
        pulled, local = backend.open(address).materialize(), near.acquire(address).materialize()
        if any((pulled[name] != array).any() for name, array in local.items()):
            raise AssertionError("what was received is not what lies in shared memory")
        nbytes = sum(array.nbytes for array in local.values())
        raw: list[float] = []
        pulls: list[float] = []
        for number in range(repeats + 1):  # turn by turn, so that what else the machine does meets both
            asked = time.perf_counter()
            socket.send(str(nbytes).encode())
            socket.recv(copy=False)
            raw.append(time.perf_counter() - asked)
            address = requests.address(picture, "copy")
            opened = time.perf_counter()
            item = backend.open(address)
            pulls.append(time.perf_counter() - opened)
            item.release()
            if number == 0:  # the first turn finds nothing warm
                raw.clear()
                pulls.clear()
    requests.close()
    raw_ms, pull_ms = round(1000 * median(raw), 3), round(1000 * median(pulls), 3)
    return {
        "tensor": tensor.name,
        "bytes": nbytes,
        "curve": keys is not None,
        "raw_ms": raw_ms,
        "pull_ms": pull_ms,
        "raw_mb_per_second": round(nbytes / raw_ms / 1000, 1),
        "pull_mb_per_second": round(nbytes / pull_ms / 1000, 1),
        "pull_to_raw": round(raw_ms / pull_ms, 3),
    }
