"""What is fuzzed, and what is promised of it: only the errors that its documentation names, and nothing wrong accepted."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple, get_args

import msgpack
import msgspec
from tests.fuzz.fuzzing import Target, outcome_of
from tests.fuzz.injections import Injections
from tests.fuzz.media import MEDIA
from tests.fuzz.mutate import LONGEST, mutate_bytes, mutate_plain
from tests.fuzz.schema import Strict, fits, info, sample
from tests.wire_strategies import LINKS

from mmprep import layout
from mmprep.address import Address, check_against, check_record, parse_address
from mmprep.card import ItemOptions, ModelCard
from mmprep.errors import InvalidRequest, ProtocolError, StaleAddress
from mmprep.items import DTYPE_SIZES, ItemMeta, region_size, unpack_meta
from mmprep.job_content import JobContent, read_content
from mmprep.layout import PAGE, RECORD_SIZE, Geometry, Header, Record, State
from mmprep.result import Head, unpack_head
from mmprep.wire import messages
from mmprep.wire.codec import CONTROL_LIMIT, pack, unpack
from mmprep_worker.lanes.config import LaneConfig
from mmprep_worker.ring.policy import Clock
from mmprep_worker.ring.ring import Ring

# --- the wire decoder -------------------------------------------------------------------------------------------------


class Decoder(NamedTuple):
    """One decoder: the structs that it gives, its errors, and how they are written."""

    name: str
    kinds: tuple[type[msgspec.Struct], ...]
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]
    errors: tuple[type[Exception], ...] = (ProtocolError,)
    #: Whether floating-point numbers and repeated keys are allowed in its MessagePack; ``None``: it is JSON.
    loose: bool | None = False


def _plain_pack(value: msgspec.Struct) -> bytes:
    return msgpack.packb(msgspec.to_builtins(value, builtin_types=(bytes,)))


def _messages(name: str, kind: Any) -> Decoder:
    return Decoder(name, get_args(kind) or (kind,), lambda frame: unpack(frame, kind), pack)


DECODERS = (
    *(_messages(name, kind) for name, kind in LINKS.items()),
    *(_messages(kind.__name__, kind) for kind in (messages.Put, messages.Task, messages.ItemAnswer, ItemOptions)),
    Decoder("Head", (Head,), unpack_head, Head.pack),
    Decoder("JobContent", (JobContent,), lambda data: read_content([data]), lambda job: b"".join(job.pieces())),
    Decoder("ItemMeta", (ItemMeta,), unpack_meta, ItemMeta.pack, (ValueError,), loose=True),
    Decoder(
        "ModelCard",
        (ModelCard,),
        lambda data: msgspec.msgpack.decode(data, type=ModelCard),
        msgspec.msgpack.encode,
        (msgspec.DecodeError, UnicodeDecodeError),
        loose=True,
    ),
    Decoder(
        "LaneConfig",
        (LaneConfig,),
        lambda data: msgspec.json.decode(data, type=LaneConfig),
        msgspec.json.encode,
        (msgspec.DecodeError, UnicodeDecodeError),
        loose=None,
    ),
)


class Wire:
    """All that is decoded: the first byte says by which decoder."""

    name = "wire"

    def corpus(self) -> list[bytes]:
        rng = Random(0)
        found = []
        for number, decoder in enumerate(DECODERS):
            for kind in decoder.kinds:
                for _ in range(3):
                    value = sample(rng, info(kind))
                    if isinstance(value, ItemMeta):
                        fields = tuple(msgspec.structs.replace(f, dtype="bfloat16") for f in value.fields)
                        value = msgspec.structs.replace(value, fields=fields)
                    found.append(bytes([number]) + decoder.encode(value))
        return found

    def mutate(self, rng: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        selector, frame = data[:1], data[1:]
        if rng.random() < 0.05:
            selector = bytes([rng.randrange(len(DECODERS))])
        if rng.random() < 0.6:
            try:
                if frame.startswith(b"{"):
                    return selector + json.dumps(mutate_plain(rng, json.loads(frame))).encode()[:LONGEST]
                plain = msgpack.unpackb(frame, strict_map_key=False)
                return selector + msgpack.packb(mutate_plain(rng, plain))[:LONGEST]
            except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
                pass
        return selector + mutate_bytes(rng, frame, [other[1:] for other in rng.choices(corpus, k=3)])

    def run(self, data: bytes) -> str:
        decoder = DECODERS[(data[0] if data else 0) % len(DECODERS)]
        frame = data[1:]
        try:
            value = decoder.decode(frame)
        except decoder.errors as error:
            return f"{decoder.name} {outcome_of(error)}"
        assert type(value) in decoder.kinds, f"{type(value).__name__} is none of {decoder.name}"
        assert fits(info(type(value)), value), "what was accepted is not of its schema"
        again = decoder.decode(decoder.encode(value))
        assert decoder.encode(again) == decoder.encode(value), "what was accepted comes back as something else"
        if decoder.loose is not None:
            Strict(frame, floats=decoder.loose, duplicates=decoder.loose).read()
        if isinstance(value, ItemMeta):
            assert all(spec.dtype in DTYPE_SIZES for spec in value.fields)
            assert region_size(value.fields) >= 0
        elif decoder.name != "Head" and decoder.loose is False:
            assert len(frame) <= CONTROL_LIMIT, "a frame above the limit was accepted"
        return f"accepted {type(value).__name__}"

    def close(self) -> None:
        """Nothing was opened."""


# --- the directory reader ---------------------------------------------------------------------------------------------

_UNIT = 64
_SLOTS = 8
_GEOMETRY = Geometry.plan(PAGE, _SLOTS)
_RECORD = struct.Struct("<IIQQQI32s")
_HEADER = struct.Struct("<8sII16sQQQQQ")
_BEFORE = layout.generation(5, 0)


def _sealed(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


class Directory:
    """A header page, or a whole directory that a new writer takes over and goes on with: the first byte says which."""

    name = "directory"

    def corpus(self) -> list[bytes]:
        rng = Random(0)
        found = [
            b"\0" + layout.pack_header(Header(rng.randbytes(16), incarnation, _GEOMETRY)) for incarnation in (1, 9)
        ]
        found += [b"\1" + _directory(rng) for _ in range(20)]
        return found

    def mutate(self, rng: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        mode, body = data[:1], data[1:]
        if rng.random() < 0.25:
            body = mutate_bytes(rng, body, [other[1:] for other in corpus])
        elif mode == b"\0":
            body = _change_header(rng, body)
        else:
            for _ in range(rng.choice((1, 1, 2, 5))):
                body = _change_record(rng, body)
        return mode + body

    def run(self, data: bytes) -> str:
        return _read_header(data[1:]) if data[:1] == b"\0" else _take_over(data[1:])

    def close(self) -> None:
        """Nothing was opened."""


def _directory(rng: Random) -> bytes:
    """Return a directory as a writer may leave it: extents that do not overlap, one of them granted, some retired."""
    slots = list(range(_SLOTS))
    rng.shuffle(slots)
    records = {slot: layout.pack_free(slot) for slot in slots}
    unit = 0
    for number in range(rng.randint(0, _SLOTS)):
        unit += rng.randint(0, 2)
        units = rng.randint(1, 5)
        length = units * _UNIT - rng.randint(0, _UNIT - 1)
        meta = rng.randint(0, length // _UNIT) * _UNIT
        state = State.GRANTED if number == 0 else rng.choice((State.READY, State.READY, State.RETIRED))
        generation = layout.generation(rng.randint(1, 4), 100 + number)
        offset = _GEOMETRY.arena_offset + unit * _UNIT
        slot = slots[number]
        records[slot] = layout.pack_record(Record(state, slot, generation, offset, meta, length, bytes([number]) * 32))
        unit += units
    return b"".join(records[slot] for slot in range(_SLOTS))


def _edge(rng: Random, value: int, bits: int) -> int:
    step = rng.choice((0, 1, -1, _UNIT, -_UNIT, 1 << 40))
    other = (value + step, 0, 1, (1 << bits) - 1, 1 << (bits - 1), rng.randrange(1 << bits))
    return rng.choice(other) % (1 << bits)


def _change_header(rng: Random, page: bytes) -> bytes:
    if len(page) != PAGE:
        return mutate_bytes(rng, page, [page])
    fields = list(_HEADER.unpack_from(page))
    at = rng.choice((1, 2, 4, 5, 6, 7, 8))
    fields[at] = _edge(rng, fields[at], 32 if at < 3 else 64)
    if rng.random() < 0.3:
        # Agrees with itself, and may still be absurd.
        capacity, slots = _edge(rng, _GEOMETRY.arena_capacity, 64), _edge(rng, _SLOTS, 32)
        arena = PAGE + -(-slots * RECORD_SIZE // PAGE) * PAGE
        fields[2], fields[5:] = slots, [(arena + capacity) % 2**64, PAGE, arena, capacity]
    body = _HEADER.pack(*fields) + page[_HEADER.size : PAGE - 4]
    return _sealed(body) if rng.random() < 0.9 else body + page[-4:]


def _change_record(rng: Random, image: bytes) -> bytes:
    """Change one field of one record, often to what another one has, and mostly mend the self-check."""
    if len(image) != _SLOTS * RECORD_SIZE:
        return mutate_bytes(rng, image, [image])
    slot, other = rng.randrange(_SLOTS), rng.randrange(_SLOTS)
    at = slot * RECORD_SIZE
    fields = list(_RECORD.unpack_from(image, at))
    others = _RECORD.unpack_from(image, other * RECORD_SIZE)
    which = rng.randrange(len(fields))
    if rng.random() < 0.2:
        fields = [fields[0], slot, *others[2:]]
    elif which == 0:
        fields[0] = rng.choice((0, 1, 2, 2, 3, 3, 4, 2**32 - 1))
    elif rng.random() < 0.4 or which == len(fields) - 1:
        fields[which] = others[which]
    else:
        fields[which] = _edge(rng, fields[which], 32 if which in {1, 5} else 64)
    body = _RECORD.pack(*fields) + image[at + _RECORD.size : at + RECORD_SIZE - 4]
    record = _sealed(body) if rng.random() < 0.9 else body + image[at + RECORD_SIZE - 4 : at + RECORD_SIZE]
    return image[:at] + record + image[at + RECORD_SIZE :]


def _read_header(page: bytes) -> str:
    try:
        header = layout.unpack_header(page)
    except ValueError as error:
        return outcome_of(error)
    magic, version, slots, epoch, incarnation, total, directory, arena, capacity = _HEADER.unpack_from(page)
    assert (len(page), magic, version) == (PAGE, b"mmpring\0", 1)
    assert zlib.crc32(page[:-4]) == int.from_bytes(page[-4:], "little"), "a damaged header was accepted"
    assert (header.epoch, header.incarnation) == (epoch, incarnation)
    assert tuple(header.geometry) == (total, slots, directory, arena, capacity)
    assert 1 <= incarnation < 2**23
    assert PAGE <= directory < directory + slots * RECORD_SIZE <= arena < arena + capacity == total
    assert capacity % PAGE == arena % PAGE == 0
    return "accepted header"


def _sound_records(image: bytes) -> dict[int, Record]:
    """Return the records that an earlier writer may have written, by slot."""
    found = {}
    for slot in range(_SLOTS):
        record = image[slot * RECORD_SIZE : (slot + 1) * RECORD_SIZE]
        state, named, generation, offset, length, meta, key = _RECORD.unpack_from(record)
        start, end = offset - _GEOMETRY.arena_offset, offset - _GEOMETRY.arena_offset + length
        if (
            zlib.crc32(record[:-4]) == int.from_bytes(record[-4:], "little")
            and named == slot
            and state in {1, 2, 3}
            and start % _UNIT == 0
            and 0 <= start < end <= _GEOMETRY.arena_capacity
            and -(-meta // _UNIT) * _UNIT <= length
            and 2**40 <= generation < _BEFORE
        ):
            found[slot] = Record(State(state), slot, generation, offset, meta, length, key)
    return found


def _units(record: Record) -> range:
    start = record.offset // _UNIT
    return range(start, start + -(-record.length // _UNIT))


def _expected(records: dict[int, Record]) -> set[Record]:
    """Return what survives, found by comparing each with each."""
    kept = set()
    for record in records.values():
        others = [other for other in records.values() if other is not record]
        overlaps = any(set(_units(record)) & set(_units(other)) for other in others)
        twice = any(other.generation == record.generation for other in others)
        ready = [other for other in others if other.state is State.READY and other.key == record.key]
        newest = record.state is State.RETIRED or all(other.generation < record.generation for other in ready)
        if record.state is not State.GRANTED and not overlaps and not twice and newest:
            kept.add(record)
    return kept


def _take_over(image: bytes) -> str:
    ring = Ring(_GEOMETRY, 5, Clock(_SLOTS), _GEOMETRY.arena_capacity // 4)
    try:
        ring.restore(image)
    except ValueError as error:
        assert len(image) != _SLOTS * RECORD_SIZE, "a directory of the right size was refused"
        return outcome_of(error)
    ring.validate()
    expected = _expected(_sound_records(image))
    entries = [ring._directory.at(slot) for slot in range(_SLOTS)]
    assert {entry.record() for entry in entries if entry is not None} == expected, "others survived than should"
    segment = bytearray(image)
    _apply(ring, segment)
    found = {slot: _RECORD.unpack_from(segment, slot * RECORD_SIZE)[0] for slot in range(_SLOTS)}
    assert {slot for slot, state in found.items() if state} == {record.slot for record in expected}
    assert ring.grant(b"k" * 32, 0, 1) is None, "granted before the leases are known"
    _go_on(ring, segment, expected)
    dropped = len(_sound_records(image)) - len(expected)
    return f"accepted, {len(expected)} kept, {dropped} sound ones dropped"


def _go_on(ring: Ring, segment: bytearray, expected: set[Record]) -> None:
    """Lease one entry as its backend would, settle, and grant and publish until everything else was replaced."""
    held = min(expected, default=None, key=lambda record: record.slot)
    if held is not None:
        ring.deliver(b"i" * 16, "engine-0", held.slot, held.generation, "view", now=0.0, seconds=1.0)
    ring.settle()
    ring.validate()
    newest = max((record.generation for record in expected), default=0)
    for number in range(2 * _SLOTS):
        grant = ring.grant(bytes([200 + number]) * 32, number, 1 + 97 * number % 900)
        if grant is not None:
            assert grant.generation > newest, "generations strictly rise"
            newest = grant.generation
            _apply(ring, segment)
            ring.publish(grant.slot, grant.generation)
        _apply(ring, segment)
        ring.validate()
        live = [_sound for slot in range(_SLOTS) if (_sound := _written(segment, slot)) is not None]
        units = [unit for record in live for unit in _units(record)]
        assert len(units) == len(set(units)), "two extents overlap"
        assert held is None or held in live, "what a backend reads was given away"


def _written(segment: bytearray, slot: int) -> Record | None:
    return layout.unpack_record(bytes(segment[slot * RECORD_SIZE : (slot + 1) * RECORD_SIZE]), slot, _GEOMETRY)


def _apply(ring: Ring, segment: bytearray) -> None:
    for slot, record in ring.take_writes():
        segment[slot * RECORD_SIZE : (slot + 1) * RECORD_SIZE] = record


# --- the address validator --------------------------------------------------------------------------------------------

_SEGMENT, _EPOCH = "/mmprep-0-5f3a9c01-7be2d144", "0123456789abcdef" * 2
_ADDRESS_INFO = info(Address)


class AddressOf:
    """An address as plain data, and the record that stands in its slot: JSON, or MessagePack behind a first byte."""

    name = "address"

    def corpus(self) -> list[bytes]:
        found = []
        for slot, (state, lease) in enumerate([(State.READY, None), (State.RETIRED, "copy"), (State.READY, "view")]):
            offset, length, generation = _GEOMETRY.arena_offset + 256 * slot, 230, layout.generation(3, 7 + slot)
            record = layout.pack_record(Record(state, slot, generation, offset, 100, length, bytes(32)))
            address = {
                "segment": _SEGMENT,
                "epoch": _EPOCH,
                "slot": slot,
                "offset": offset,
                "length": length,
                "generation": generation,
                "metadata_length": 100,
                "fields": [
                    {"name": "pixel_values", "dtype": "uint8", "shape": [5, 6], "offset": 128},
                    {"name": "grid", "dtype": "int64", "shape": [], "offset": 192},
                ][: slot + 1],
            }
            if lease is not None:
                address |= {"lease": "ab" * 16, "lease_kind": lease, "lease_seconds": 30}
            document = {"address": address, "record": record.hex()}
            found += [json.dumps(document).encode(), b"\xc1" + msgpack.packb(document)]
        return found

    def mutate(self, rng: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        document = _document(data)
        if document is None or rng.random() < 0.1:
            return mutate_bytes(rng, data, corpus)
        what = rng.random()
        if what < 0.3:
            _change_both(rng, document)
        elif what < 0.8:
            for _ in range(rng.choice((1, 1, 2))):
                document["address"] = mutate_plain(rng, document["address"])
        else:
            document["record"] = _other_record(rng, document["record"])
        try:
            if data.startswith(b"\xc1"):
                return b"\xc1" + msgpack.packb(document)
            return json.dumps(document).encode()
        except (TypeError, ValueError, OverflowError, RecursionError):
            return mutate_bytes(rng, data, corpus)

    def run(self, data: bytes) -> str:
        document = _document(data)
        if document is None:
            return "no document"
        record = bytes.fromhex(document["record"])
        try:
            address = parse_address(document["address"])
        except InvalidRequest as error:
            return outcome_of(error)
        assert fits(_ADDRESS_INFO, address), "what was accepted is not of its schema"
        assert parse_address(msgspec.to_builtins(address)) == parse_address(address) == address
        try:
            check_against(address, segment=_SEGMENT, epoch=_EPOCH, geometry=_GEOMETRY)
            check_record(address, record, _GEOMETRY)
        except (InvalidRequest, StaleAddress) as error:
            return outcome_of(error)
        _believed(address, record)
        return f"accepted with {len(address.fields)} fields"

    def close(self) -> None:
        """Nothing was opened."""


def _document(data: bytes) -> dict[str, Any] | None:
    try:
        packed = data.startswith(b"\xc1")
        found = msgpack.unpackb(data[1:], strict_map_key=False) if packed else json.loads(data)
        bytes.fromhex(found["record"])
        found["address"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, msgpack.UnpackException):
        return None
    return found if isinstance(found, dict) else None


def _other_record(rng: Random, record: str) -> str:
    body = bytes.fromhex(record)
    if len(body) != RECORD_SIZE or rng.random() < 0.2:
        return mutate_bytes(rng, body, [body]).hex()
    fields = list(_RECORD.unpack_from(body))
    which = rng.randrange(len(fields) - 1)
    fields[which] = _edge(rng, fields[which], 64 if which in {2, 3, 4} else 32)
    return _sealed(_RECORD.pack(*fields) + body[_RECORD.size : -4]).hex()


def _change_both(rng: Random, document: dict[str, Any]) -> None:
    """Change address and record alike, so that one cannot give the other away."""
    address, body = document["address"], bytes.fromhex(document["record"])
    if not isinstance(address, dict) or len(body) != RECORD_SIZE:
        return
    fields = list(_RECORD.unpack_from(body))
    names = {"slot": 1, "generation": 2, "offset": 3, "length": 4, "metadata_length": 5}
    name = rng.choice(list(names))
    value = _edge(rng, fields[names[name]], 32 if name in {"slot", "metadata_length"} else 64)
    fields[names[name]] = address[name] = value
    document["record"] = _sealed(_RECORD.pack(*fields) + body[_RECORD.size : -4]).hex()


def _believed(address: Address, record: bytes) -> None:
    """Check with nothing of the code under test that a believed address is that of the record, inside the arena."""
    state, slot, generation, offset, length, meta, _ = _RECORD.unpack_from(record)
    assert zlib.crc32(record[:-4]) == int.from_bytes(record[-4:], "little"), "a damaged record was believed"
    assert state in {2, 3}, "an extent that is being written was believed"
    named = (address.slot, address.generation, address.offset, address.length, address.metadata_length)
    assert named == (slot, generation, offset, length, meta), "the address is not that of the record"
    assert (address.segment, address.epoch) == (_SEGMENT, _EPOCH)
    assert 0 <= slot < _SLOTS
    assert _GEOMETRY.arena_offset <= offset < offset + length <= _GEOMETRY.arena_offset + _GEOMETRY.arena_capacity
    for field in address.fields:
        size = DTYPE_SIZES[field.dtype]
        for dimension in field.shape:
            size *= dimension
        assert 0 <= field.offset <= field.offset + size <= length, "a field reaches out of the extent"


TARGETS: dict[str, Target] = {
    target.name: target for target in (Wire(), Directory(), AddressOf(), Injections(), *MEDIA)
}
