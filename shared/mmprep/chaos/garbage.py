"""What a hostile or broken peer may send to the sockets of a runtime directory. None of it is a message of the protocol."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import zmq

from mmprep import __version__
from mmprep.wire import messages
from mmprep.wire.codec import CONTROL_LIMIT, MAX_FRAMES, PROTOCOL, pack

_SECONDS = 0.3
_DEEP = 2000
_MESSAGES = 12


def messages_of(chosen: random.Random) -> Iterator[list[bytes]]:
    """Give the frames of one message after the other, in random order and number."""
    hello = pack(messages.Hello(PROTOCOL, __version__, "backend", "garbage", os.getpid()))
    makers: tuple[Callable[[], list[bytes]], ...] = (
        lambda: [b""],
        lambda: [chosen.randbytes(chosen.randrange(1, 2000))],
        lambda: [chosen.randbytes(8) for _ in range(chosen.randrange(2, 40))],
        lambda: [b"x"] * (MAX_FRAMES + 50),
        lambda: [bytes(CONTROL_LIMIT + 1)],
        lambda: [hello[: chosen.randrange(len(hello))]],
        lambda: [_spoilt(hello, chosen)],
        lambda: [msgpack.packb(["Hello", PROTOCOL + 1, "9", "backend", "garbage", 1])],
        lambda: [msgpack.packb(["Hello", -1, "9", "king", "../../x", -5])],
        lambda: [b"\x91" * _DEEP + b"\xc0"],
        lambda: [msgpack.packb({"a": float("nan")}), b"\x82\xa1a\x01\xa1a\x02"],
        lambda: [msgpack.packb(msgpack.ExtType(5, b"abc"))],
        lambda: [msgpack.packb(["Renew", 2**63, [b"\0" * 16] * 50, None])],
        lambda: [msgpack.packb(["Acquire", 1, -1, -(2**40), "view"])],
        lambda: [msgpack.packb(["Acquire", 1, 2**60, 2**62, "view"])],
        lambda: [msgpack.packb(["Filled", 2**40, 1, 1])],
        lambda: [msgpack.packb(["Put", "0", 3, "blake3", b"\0" * 32, b""]), chosen.randbytes(5000)],
        lambda: [msgpack.packb(["Request", 1, "chat"]), b'{"messages": [' * 500],
    )
    for _ in range(_MESSAGES):
        yield chosen.choice(makers)()


def _spoilt(frame: bytes, chosen: random.Random) -> bytes:
    """Return the frame with the first byte, which says that it is an array, and some other byte changed."""
    spoilt = bytearray(frame)
    spoilt[0] ^= 1 << chosen.randrange(8)
    spoilt[chosen.randrange(1, len(spoilt))] ^= 1 << chosen.randrange(8)
    return bytes(spoilt)


def send_garbage(directory: Path, seed: int) -> int:
    """Send garbage to every socket in a directory, as ZeroMQ messages and as bare bytes; return to how many."""
    chosen = random.Random(seed)  # noqa: S311 -- repeatable, not secret
    paths = [path for path in sorted(directory.iterdir()) if stat.S_ISSOCK(path.lstat().st_mode)]
    with zmq.Context() as context:
        for path in paths:
            _send_messages(context, path, chosen)
            _send_bytes(path, chosen)
    return len(paths)


def _send_messages(context: zmq.Context[Any], path: Path, chosen: random.Random) -> None:
    kind = zmq.PUSH if path.name.endswith("-bulk.sock") else chosen.choice((zmq.DEALER, zmq.DEALER, zmq.REQ))
    with context.socket(kind) as peer:
        peer.linger = int(_SECONDS * 1000)
        peer.sndtimeo = int(_SECONDS * 1000)
        peer.connect(f"ipc://{path}")
        for frames in messages_of(chosen):
            # Nobody answers, or the other side has had enough.
            with contextlib.suppress(zmq.ZMQError):
                peer.send_multipart(frames)


def _send_bytes(path: Path, chosen: random.Random) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer, contextlib.suppress(OSError):
        peer.settimeout(_SECONDS)
        peer.connect(str(path))
        greeting = b"\xff\0\0\0\0\0\0\0\1\x7f\3\1NULL" if chosen.getrandbits(1) else b""
        peer.sendall(greeting + struct.pack(">Q", chosen.getrandbits(64)) + chosen.randbytes(500))
