"""Bodies of injections, from MessagePack to the item that a lane is given; a second opinion by msgpack and by counting."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import msgpack
from tests.fuzz.fuzzing import outcome_of
from tests.fuzz.mutate import LONGEST, mutate_bytes, mutate_plain

from mmprep.card import FieldForm, ModelCard, Placeholder
from mmprep.errors import InvalidRequest, TooLarge
from mmprep.injected import unpack_item
from mmprep_frontend.injection.body import read_injection
from mmprep_frontend.injection.item import pack

_MOST_IDS = 2000
_MOST_BYTES = 20_000
_TOKEN = 9
_CARD = ModelCard(
    family="made up",
    fingerprint=b"",
    placeholders=tuple(Placeholder(m, f"<{m}>", _TOKEN, f"<{m}>") for m in ("image", "audio")),
    dtypes={},
    normalization={},
    fields={
        "image": (
            FieldForm("pixels", ("uint8", "float16"), (None, 4), "flat", False),
            FieldForm("grid", ("int64",), (3,), "batched", True),
        ),
        "audio": (FieldForm("all", ("float32",), (), "shared", False),),
    },
)
_SIZES = {"uint8": 1, "float16": 2, "int64": 8, "float32": 4}


class Injections:
    """A body."""

    name = "injections"

    def corpus(self) -> list[bytes]:
        picture = {
            "key": "cat",
            "modality": "image",
            "fields": {
                "pixels": {
                    "data": ["uint8", [3, 4], _raw(12)],
                    "field": ["flat", {"slices": [[[0, 3, None]]], "dim": 0}],
                },
                "grid": {"data": ["int64", [3], _raw(24)]},
            },
            "expansion": {"token_ids": [1, _TOKEN, _TOKEN, 2], "is_embed": [False, True, True, False]},
        }
        sound = {
            "key": "sound",
            "modality": "audio",
            "fields": {"all": {"data": ["float32", [], _raw(4)], "field": ["shared", {"batch_size": 1}]}},
            "expansion": {"token_ids": [_TOKEN] * 300},
            "cache_salt": "salt",
            "priority": -3,
            "deadline_ms": 1000,
            "model": "m",
        }
        halves = {**picture["fields"], "pixels": {"data": ["float16", [200, 4], _raw(1600)]}}
        return [*map(msgpack.packb, (picture, sound, {**picture, "fields": halves}))]

    def mutate(self, rng: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        if rng.random() < 0.05:
            return msgpack.packb(_right(rng))
        if rng.random() < 0.7:
            try:
                plain = msgpack.unpackb(data, strict_map_key=False)
                return msgpack.packb(mutate_plain(rng, plain))[:LONGEST]
            except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
                pass
        return mutate_bytes(rng, data, corpus)

    def run(self, data: bytes) -> str:
        try:
            injection = read_injection(data, _MOST_IDS)
            item = pack(injection, _CARD, _MOST_BYTES)
        except (InvalidRequest, TooLarge) as error:
            return f"{outcome_of(error)} at {'' if error.param is None else error.param[:12]}"
        plain = msgpack.unpackb(data, ext_hook=_raw_only, object_pairs_hook=_unique)
        assert (plain["key"], plain["modality"]) == (injection.key, injection.modality)
        meta, region = unpack_item(memoryview(item.frame))
        assert {spec.name for spec in meta.fields} == plain["fields"].keys()
        for spec in meta.fields:
            dtype, shape, raw = plain["fields"][spec.name]["data"]
            assert (spec.dtype, list(spec.shape)) == (dtype, shape)
            size = _SIZES[dtype]
            for extent in shape:
                size *= extent
            assert size == len(raw) <= _MOST_BYTES
            assert bytes(region[spec.offset : spec.offset + size]) == raw
        expansion = plain["expansion"]
        assert meta.plan.token_ids() == expansion["token_ids"]
        marks = expansion.get("is_embed") or [True] * len(expansion["token_ids"])
        assert (meta.plan.is_embed() or [True] * item.length) == marks
        assert marks == [token_id == _TOKEN for token_id in expansion["token_ids"]]
        return f"accepted {meta.modality}"

    def close(self) -> None:
        """Nothing was opened."""


def _right(rng: Random) -> dict[str, Any]:
    """Return a body that may be accepted, or is just above a bound."""
    rows, dtype = rng.choice((0, 1, 7, 2500, _MOST_BYTES // 4)), rng.choice(("uint8", "float16"))
    marks = [rng.random() < 0.5 for _ in range(rng.choice((1, 10, 1999, 2000, 2001)))]
    return {
        "key": "k" * rng.choice((1, 1024)),
        "modality": "image",
        "fields": {
            "pixels": {"data": [dtype, [rows, 4], _raw(rows * 4 * _SIZES[dtype])]},
            "grid": {"data": ["int64", [3], _raw(24)], "field": ["batched", {"keep_on_cpu": True}]},
        },
        "expansion": {"token_ids": [_TOKEN if embeds else rng.randrange(9) for embeds in marks], "is_embed": marks},
    }


def _raw(length: int) -> msgpack.ExtType:
    return msgpack.ExtType(3, bytes(range(256)) * (length // 256) + bytes(range(length % 256)))


def _raw_only(code: int, data: bytes) -> bytes:
    assert code == 3, "another extension type was accepted"
    return data


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    assert len({name for name, _ in pairs}) == len(pairs), "a map with the same key twice was accepted"
    return dict(pairs)
