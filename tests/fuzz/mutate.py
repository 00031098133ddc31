"""Wrong inputs made from right ones, the same ones again for the same random numbers."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeAlias

import msgpack

#: No mutated input is longer, in bytes: a little above the largest frame.
LONGEST = 70_000
#: Integers at which something ends: signs, sizes, generations, incarnations, what 64 bits hold.
EDGES = [
    edge + step for edge in (0, 2**7, 2**8, 2**16, 2**31, 2**32, 2**40, 2**48, 2**63, 2**64) for step in (-1, 0, 1)
]
NEGATIVE = [-1, -32, -33, -128, -(2**31), -(2**40), -(2**63)]
#: MessagePack that no message may contain, or that claims what is not there.
FRAGMENTS = [
    bytes.fromhex("cb7ff8000000000000"),  # NaN
    bytes.fromhex("cb7ff0000000000000"),  # infinity
    bytes.fromhex("ca3f800000"),  # 1.0 in 32 bits
    bytes.fromhex("82a16101a16102"),  # a key twice
    bytes.fromhex("810102"),  # a number as a key
    bytes.fromhex("819001"),  # a list as a key
    bytes.fromhex("d40100"),  # extension types
    bytes.fromhex("c70305010203"),
    bytes.fromhex("d6ff00000001"),  # a timestamp
    bytes.fromhex("cfffffffffffffffff"),
    bytes.fromhex("d38000000000000000"),
    bytes.fromhex("dc4000"),  # claims of lists, maps, bytes and text
    bytes.fromhex("ddffffffff"),
    bytes.fromhex("dfffffffff"),
    bytes.fromhex("c6ffffffff"),
    bytes.fromhex("dbffffffff"),
    bytes.fromhex("c9ffffffff01"),
    bytes.fromhex("c1"),  # no type at all
    bytes.fromhex("a2fffe"),  # text that is no Unicode
    bytes.fromhex("c0"),
    bytes.fromhex("c403616263"),
    bytes.fromhex("dc4000") * 600,
    b"\x91" * 600,
    b"\x81\xa1a" * 600,
    b"\x91" * 3000,
]

Mutator: TypeAlias = Callable[[Random, bytes], bytes]


def flip_bits(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_byte(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) or 1)
    return data[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xC0, 0xDC, 0xFF, rng.randrange(256)))]) + data[at + 1 :]


def truncate(rng: Random, data: bytes) -> bytes:
    return data[: rng.randint(0, len(data))]


def append(rng: Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", rng.randbytes(rng.randint(1, 20)), data[: rng.randint(0, len(data))]))


def drop_slice(rng: Random, data: bytes) -> bytes:
    start = rng.randint(0, len(data))
    return data[:start] + data[start + rng.randint(1, 16) :]


def repeat_slice(rng: Random, data: bytes) -> bytes:
    start = rng.randint(0, len(data))
    end = start + rng.randint(1, 64)
    return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]


def set_integer(rng: Random, data: bytes) -> bytes:
    """Overwrite 1 to 8 bytes with an edge: where these are a length, it lies."""
    size, code = rng.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
    at = rng.randint(0, max(len(data) - size, 0))
    value = rng.choice((*EDGES, *NEGATIVE, rng.randrange(2**64))) % (1 << 8 * size)
    return data[:at] + struct.pack(rng.choice("<>") + code, value) + data[at + size :]


def insert_fragment(rng: Random, data: bytes) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + rng.choice(FRAGMENTS) + data[at + rng.randint(0, 9) :]


BYTES: tuple[Mutator, ...] = (
    flip_bits,
    set_byte,
    truncate,
    append,
    drop_slice,
    repeat_slice,
    set_integer,
    insert_fragment,
)


def mutate_bytes(rng: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Return ``data`` with one to four changes that know nothing of what it means, or spliced with another input."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if rng.random() < 0.1:
            other = rng.choice(corpus)
            data = data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]
        else:
            data = rng.choice(BYTES)(rng, data)
    return data[:LONGEST]


def strange(rng: Random) -> Any:
    """Return a plain value that is likely to be wrong where it stands."""
    return rng.choice(
        (
            None,
            rng.random() < 0.5,
            rng.choice(EDGES[:-2]),
            rng.choice(NEGATIVE),
            float("nan"),
            float("inf"),
            1.0,
            -0.0,
            "",
            "a" * rng.choice((1, 64, 65, 128, 129, 2049)),
            "../x\n\0",
            "ÿ" * 40,
            "0" * 32,
            b"",
            bytes(rng.choice((15, 16, 17, 31, 32, 33, 4097))),
            [],
            {},
            [[]],
            {"a": 1},
            [0] * rng.choice((9, 257, 1025)),
            msgpack.ExtType(5, b"x"),
            msgpack.Timestamp(1),
        )
    )


def mutate_plain(rng: Random, plain: Any) -> Any:
    """Return plain data with one value replaced, dropped, repeated or moved, somewhere in the tree."""
    if isinstance(plain, dict) and plain and rng.random() < 0.9:
        changed = dict(plain)
        name = rng.choice(list(changed))
        match rng.randrange(6):
            case 0:
                del changed[name]
            case 1:
                changed[rng.choice(("", "extra", 7))] = strange(rng)
            case _:
                changed[name] = mutate_plain(rng, changed[name])
        return changed
    if isinstance(plain, (list, tuple)) and plain and rng.random() < 0.9:
        items = list(plain)
        at = rng.randrange(len(items))
        match rng.randrange(8):
            case 0:
                del items[at]
            case 1:
                items.insert(at, items[rng.randrange(len(items))])
            case 2:
                items.insert(at, strange(rng))
            case _:
                items[at] = mutate_plain(rng, items[at])
        return items
    if isinstance(plain, int) and not isinstance(plain, bool) and rng.random() < 0.5:
        return rng.choice((plain + 1, plain - 1, plain * 2, -plain, *EDGES[:-2]))
    if isinstance(plain, (str, bytes)) and plain and rng.random() < 0.3:
        at = rng.randrange(len(plain))
        return plain[:at] + plain[at + 1 :] + plain[:1] * rng.randint(0, 2)
    return strange(rng)
