from __future__ import annotations

import hashlib
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from mmprep.keys import item_key
from mmprep_frontend.media.keys import alias, fetched_key, injected_hash, injected_key, scope, url_digest, variant

PARTS: dict[str, Any] = {
    "scope": bytes(range(32)),
    "hash_name": "blake3",
    "modality": "image",
    "fingerprint": b"fingerprint",
    "dtype": "uint8",
    "options": b"",
}
DIGEST = bytes(range(32, 64))
NAMED: dict[str, Any] = {"scope": bytes(range(32)), "modality": "image", "uuid": "cat"}


def written_by_hand(*parts: bytes) -> bytes:
    """Return the hash of the number of parts, then each behind its length."""
    encoded = bytes([len(parts)]) + bytes(7) + b"".join(bytes([len(part)]) + bytes(7) + part for part in parts)
    return blake3(encoded).digest()


def test_keys_scopes_variants_and_aliases_are_those_of_their_versions() -> None:
    # A change here changes every key.
    given_parts = (PARTS["scope"], b"blake3", b"image", b"fingerprint", b"uint8", b"")
    assert variant(**PARTS) == written_by_hand(b"mmprep item variant 1", *given_parts)
    assert variant(**PARTS).hex() == "806100a317fa5381343823cd9500e384dea9ed6ab73194bbb0f6804ffd90bf62"
    assert item_key(variant(**PARTS), DIGEST) == written_by_hand(b"mmprep item key 2", variant(**PARTS), DIGEST)
    assert (
        item_key(variant(**PARTS), DIGEST).hex() == "3d4a176445faa525c090786678d3ed59c6fe9cf51047b04a64bb9f676f953806"
    )
    assert alias(**NAMED) == written_by_hand(b"mmprep uuid alias 1", NAMED["scope"], b"image", b"cat")
    assert alias(**NAMED).hex() == "2bfecbb467030fc57228172618c97c1cefb4a3ebc8bf0b9c67ca25a21601034a"
    assert alias(**{**NAMED, "uuid": "Grüße"}) == written_by_hand(
        b"mmprep uuid alias 1", NAMED["scope"], b"image", b"Gr\xc3\xbc\xc3\x9fe"
    )
    named = injected_key(scope=PARTS["scope"], modality="image", fingerprint=b"fingerprint", name="cat")
    assert named == written_by_hand(b"mmprep injected 1", PARTS["scope"], b"image", b"fingerprint", b"cat")
    assert injected_hash(named, DIGEST) == written_by_hand(b"mmprep injected item 1", named, DIGEST)
    assert scope("alice", None).hex() == "f5b9897e40adef0c2ff5f3bfd952d9d378d8ff5ed1c5d3d57255beb2614a94f0"
    assert scope("alice", "").hex() == "8f989103c58d0bd710a866ce135238abca4ef5a5d6915dcd73e7400bd23aaaad"
    assert scope("alice", "salt").hex() == "a1a54ae0e05bd1088cf1dacfa06b0120c1cfa9ce24e92725cf2bcb388d6cc968"


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("scope", bytes(32)),
        ("hash_name", "sha256"),
        ("modality", "video"),
        ("fingerprint", b"fingerprinT"),
        ("dtype", "float32"),
        ("options", b"\x80"),
    ],
)
def test_a_variant_and_so_a_key_depends_on_each_of_its_parts(part: str, value: object) -> None:
    other = variant(**{**PARTS, part: value})
    assert other != variant(**PARTS)
    assert item_key(other, DIGEST) != item_key(variant(**PARTS), DIGEST)
    assert item_key(variant(**PARTS), bytes(32)) != item_key(variant(**PARTS), DIGEST)


_TEXT = st.text("ab", max_size=4)


@given(
    st.tuples(_TEXT, st.binary(max_size=4), _TEXT, st.binary(max_size=4)),
    st.tuples(_TEXT, st.binary(max_size=4), _TEXT, st.binary(max_size=4)),
)
def test_two_variants_are_equal_only_if_all_parts_are(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    names = ("modality", "fingerprint", "dtype", "options")
    made = [variant(**{**PARTS, **dict(zip(names, values, strict=True))}) for values in (one, other)]
    assert (made[0] == made[1]) == (one == other)


def test_bytes_cannot_move_from_one_part_to_the_next() -> None:
    assert variant(**{**PARTS, "modality": "imag", "fingerprint": b"efingerprint"}) != variant(**PARTS)
    assert alias(**{**NAMED, "modality": "imag", "uuid": "ecat"}) != alias(**NAMED)


@given(st.tuples(_TEXT, _TEXT), st.tuples(_TEXT, _TEXT))
def test_two_aliases_are_equal_only_for_the_same_uuid_and_modality(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    made = [alias(scope=bytes(32), modality=modality, uuid=uuid) for modality, uuid in (one, other)]
    assert (made[0] == made[1]) == (one == other)


def test_a_uuid_is_another_alias_in_another_scope() -> None:
    scopes = [scope("alice", None), scope("alice", "salt"), scope("bob", None)]
    assert len({alias(**{**NAMED, "scope": scoped}) for scoped in scopes}) == 3


def test_no_uuid_becomes_a_key_a_digest_a_variant_or_a_scope() -> None:
    key = item_key(variant(**PARTS), DIGEST)
    for secret in (key, DIGEST, variant(**PARTS), PARTS["scope"]):
        for uuid in (secret.hex(), secret.hex().upper(), secret.decode("latin-1")):
            assert alias(**{**NAMED, "uuid": uuid}) not in {key, DIGEST, variant(**PARTS), PARTS["scope"]}


@given(st.tuples(st.text(), st.none() | st.text()), st.tuples(st.text(), st.none() | st.text()))
def test_two_scopes_are_equal_only_for_the_same_principal_and_salt(
    one: tuple[str, str | None], other: tuple[str, str | None]
) -> None:
    assert (scope(*one) == scope(*other)) == (one == other)


def test_a_scope_variant_or_digest_of_another_length_is_refused() -> None:
    for make in (
        lambda: variant(**{**PARTS, "scope": b"short"}),
        lambda: alias(**{**NAMED, "scope": b"short"}),
        lambda: item_key(b"short", DIGEST),
        lambda: item_key(variant(**PARTS), b"short"),
    ):
        with pytest.raises(ValueError, match="32 bytes"):
            make()


def test_what_a_fetched_medium_lies_under_is_sha256_of_scope_url_and_reach():
    parts = (b"mmprep fetched medium 1", bytes(32), b"http://a/b", b"public")
    encoded = (4).to_bytes(8, "little") + b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    key = fetched_key(scope=bytes(32), url="http://a/b", allow_private=False)
    assert key == hashlib.sha256(encoded).digest()
    assert key.hex() == "c87c3fc522a502fa7f7dcba8d1b4f351c8bec216fcb3c75c55c1314004827075"
    others = {
        fetched_key(scope=b"1" * 32, url="http://a/b", allow_private=False),
        fetched_key(scope=bytes(32), url="http://a/c", allow_private=False),
        fetched_key(scope=bytes(32), url="http://a/b", allow_private=True),
    }
    assert len(others | {key}) == 4


def test_what_tells_a_url_from_others_is_sha256_and_no_part_of_another_key():
    parts = (b"mmprep media url 1", b"http://a/b")
    encoded = (2).to_bytes(8, "little") + b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    assert url_digest("http://a/b") == hashlib.sha256(encoded).digest()
    assert len({url_digest("http://a/b"), url_digest("http://a/c"), hashlib.sha256(b"http://a/b").digest()}) == 3
