"""How the key of an item is made: what frontends and the writer must compute alike. Pure. Needs the ``server`` extra.

An *item key* is H(variant, content digest). The variant says how a medium is processed and for whom; frontends make it
(:mod:`mmprep_frontend.media.keys`). The writer makes a key of it where only itself knows the digest.

WARNING: what is hashed is always a sequence of byte strings, each behind its own length, after a name that says what
the hash is for, with a version. Without the lengths ``("ab", "c")`` and ``("a", "bc")`` would be one key; without the
name a scope could be taken for a key. Changing anything here changes every key: raise the version, and the vectors in
the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from blake3 import blake3

from mmprep.digest import DIGEST_SIZE

_ITEM_DOMAIN: Final = b"mmprep item key 2"


def item_key(variant: bytes, digest: bytes) -> bytes:
    """Return the key of one item, 32 bytes.

    Parameters
    ----------
    variant:
        From :func:`mmprep_frontend.media.keys.variant`, 32 bytes.
    digest:
        Of the encoded bytes, from :meth:`Hasher.content_digest`, 32 bytes.

    Raises
    ------
    ValueError
        One of them is not 32 bytes long.
    """
    if len(variant) != DIGEST_SIZE or len(digest) != DIGEST_SIZE:
        raise ValueError(f"variant and digest are {DIGEST_SIZE} bytes each, not {len(variant)} and {len(digest)}")
    return hash_parts(_ITEM_DOMAIN, variant, digest)


def hash_parts(*parts: bytes) -> bytes:
    """Return blake3 over what :func:`encode_parts` makes of ``parts``, 32 bytes."""
    return blake3(encode_parts(parts)).digest()


def encode_parts(parts: Sequence[bytes]) -> bytes:
    """Return the number of ``parts`` and each with its length before it, all numbers as 8 bytes little-endian."""
    encoded = bytearray(len(parts).to_bytes(8, "little"))
    for part in parts:
        encoded += len(part).to_bytes(8, "little")
        encoded += part
    return bytes(encoded)
