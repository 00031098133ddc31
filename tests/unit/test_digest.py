from __future__ import annotations

from typing import Any

import pytest

from mmprep.digest import Hasher


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
