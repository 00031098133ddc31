from __future__ import annotations

import hashlib
from typing import Any

import pytest

from mmprep.digest import Hasher


def test_the_default_digest_is_blake3_as_its_authors_publish_it() -> None:
    assert Hasher().content_digest(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert Hasher().content_digest(b"abc").hex() == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def test_sha256_can_be_chosen() -> None:
    hasher = Hasher("sha256")
    assert hasher.content_digest(b"abc") == hashlib.sha256(b"abc").digest()
    assert hasher.name == "sha256"


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
