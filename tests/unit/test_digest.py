from __future__ import annotations

import hashlib
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from mmprep.digest import Hasher
from mmprep_frontend.media.keys import fetched_key, item_key, scope

PARTS: dict[str, Any] = {
    "scope": bytes(range(32)),
    "digest": bytes(range(32, 64)),
    "hash_name": "blake3",
    "modality": "image",
    "fingerprint": b"fingerprint",
    "dtype": "uint8",
    "options": b"",
}


def test_the_default_digest_is_blake3_as_its_authors_publish_it() -> None:
    assert Hasher().content_digest(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert Hasher().content_digest(b"abc").hex() == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


#: Of bytes that count up to 250 and begin again, by length; from the test vectors in BLAKE3's repository.
BLAKE3 = {
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    1025: "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444",
    102_400: "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085",
}
#: From FIPS 180-4 and its examples.
SHA256 = {
    b"": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    b"abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq": "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
    b"a" * 1_000_000: "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
}


@pytest.mark.parametrize("length", BLAKE3)
def test_blake3_is_that_of_its_authors_over_several_blocks_and_chunks(length: int) -> None:
    data = bytes(number % 251 for number in range(length))
    assert Hasher("blake3").content_digest(data).hex() == BLAKE3[length]


@pytest.mark.parametrize("data", SHA256, ids=len)
def test_sha256_can_be_chosen_and_is_that_of_the_standard(data: bytes) -> None:
    hasher = Hasher("sha256")
    assert hasher.name == "sha256"
    assert hasher.content_digest(data).hex() == SHA256[data]


@pytest.mark.parametrize("name", ["blake3", "sha256"])
def test_every_kind_of_buffer_gives_the_same_digest(name: Any) -> None:
    hasher = Hasher(name)
    data = b"x" * 100_000
    assert (
        hasher.content_digest(data)
        == hasher.content_digest(bytearray(data))
        == hasher.content_digest(memoryview(data + b"y")[:-1])
    )


def test_an_unknown_hash_is_refused() -> None:
    with pytest.raises(ValueError, match="md5"):
        Hasher("md5")  # type: ignore[arg-type]


def test_keys_and_scopes_are_those_of_version_1() -> None:
    # Written out once by hand: the number of parts, then each behind its length. A change here changes every key.
    parts = [
        b"mmprep item key 1", PARTS["scope"], b"blake3", PARTS["digest"], b"image", b"fingerprint", b"uint8", b"",
    ]  # fmt: skip
    encoded = b"\x08" + bytes(7) + b"".join(bytes([len(part)]) + bytes(7) + part for part in parts)
    assert item_key(**PARTS) == blake3(encoded).digest()
    assert item_key(**PARTS).hex() == "3967a9fec9cafbe0847c23cf18af78d2ce09177830f5a3d9986953e28bebf49a"
    others = {**PARTS, "hash_name": "sha256", "modality": "video", "dtype": "bfloat16", "options": b"\x91\xa5white"}
    parts = [
        b"mmprep item key 1", PARTS["scope"], b"sha256", PARTS["digest"], b"video", b"fingerprint", b"bfloat16",
        b"\x91\xa5white",
    ]  # fmt: skip
    encoded = b"\x08" + bytes(7) + b"".join(bytes([len(part)]) + bytes(7) + part for part in parts)
    assert item_key(**others) == blake3(encoded).digest()
    assert item_key(**others).hex() == "4c7b6ba44a2647a763002008a7933c266123b7f8b351af253aa58f7176947e75"
    assert scope("alice", None).hex() == "f5b9897e40adef0c2ff5f3bfd952d9d378d8ff5ed1c5d3d57255beb2614a94f0"
    assert scope("alice", "").hex() == "8f989103c58d0bd710a866ce135238abca4ef5a5d6915dcd73e7400bd23aaaad"
    assert scope("alice", "salt").hex() == "a1a54ae0e05bd1088cf1dacfa06b0120c1cfa9ce24e92725cf2bcb388d6cc968"


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("scope", bytes(32)),
        ("digest", bytes(32)),
        ("hash_name", "sha256"),
        ("modality", "video"),
        ("fingerprint", b"fingerprinT"),
        ("dtype", "float32"),
        ("options", b"\x80"),
    ],
)
def test_a_key_depends_on_each_of_its_parts(part: str, value: object) -> None:
    assert item_key(**{**PARTS, part: value}) != item_key(**PARTS)


_TEXT = st.text("ab", max_size=4)


@given(
    st.tuples(_TEXT, st.binary(max_size=4), _TEXT, st.binary(max_size=4)),
    st.tuples(_TEXT, st.binary(max_size=4), _TEXT, st.binary(max_size=4)),
)
def test_two_keys_are_equal_only_if_all_parts_are(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    names = ("modality", "fingerprint", "dtype", "options")
    keys = [item_key(**{**PARTS, **dict(zip(names, values, strict=True))}) for values in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


def test_bytes_cannot_move_from_one_part_to_the_next() -> None:
    assert item_key(**{**PARTS, "modality": "imag", "fingerprint": b"efingerprint"}) != item_key(**PARTS)


@given(st.tuples(st.text(), st.none() | st.text()), st.tuples(st.text(), st.none() | st.text()))
def test_two_scopes_are_equal_only_for_the_same_principal_and_salt(
    one: tuple[str, str | None], other: tuple[str, str | None]
) -> None:
    assert (scope(*one) == scope(*other)) == (one == other)


@pytest.mark.parametrize("part", ["scope", "digest"])
def test_a_scope_or_digest_of_another_length_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        item_key(**{**PARTS, part: b"short"})


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
