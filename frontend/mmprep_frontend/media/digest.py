"""What identifies a medium's content, and an item in the cache. Pure.

A *content digest* is of the encoded bytes, so that a hit never decodes. An *item key* is

    H(scope, content digest, modality, processor fingerprint, dtype, canonical per-request options)

and a *scope* is H(principal, cache salt): keys of different scopes never meet, so nobody can ask whether another has
sent a picture.

WARNING: what is hashed is always a sequence of byte strings, each behind its own length, after a name that says what
the hash is for, with a version. Without the lengths ``("ab", "c")`` and ``("a", "bc")`` would be one key; without the
name a scope could be taken for a key. Changing anything here changes every key: raise the version, and the vectors in
the tests.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal, get_args

from blake3 import blake3

Buffer = bytes | bytearray | memoryview
HashName = Literal["blake3", "sha256"]

#: Bytes of digests, keys and scopes.
DIGEST_SIZE: Final = 32

_ITEM_DOMAIN: Final = b"mmprep item key 1"
_SCOPE_DOMAIN: Final = b"mmprep scope 1"


class Hasher:
    """The hash of content, as ``--hash`` names it.

    blake3 takes 0.12 ms a MB, sha256 0.5; the latter is for those who must.

    Parameters
    ----------
    name:
        ``blake3`` or ``sha256``.

    Raises
    ------
    ValueError
        Another name.
    """

    def __init__(self, name: HashName = "blake3") -> None:
        if name not in get_args(HashName):
            raise ValueError(f"unknown hash {name!r}; known: {', '.join(get_args(HashName))}")
        self.name: HashName = name

    def content_digest(self, data: Buffer) -> bytes:
        """Return the digest of a medium's encoded bytes, 32 bytes. Releases the GIL for all but small ``data``."""
        if self.name == "sha256":
            return hashlib.sha256(data).digest()
        return blake3(data).digest()


_BLAKE3: Final = Hasher()


def content_digest(data: Buffer) -> bytes:
    """Return the blake3 digest of a medium's encoded bytes, 32 bytes."""
    return _BLAKE3.content_digest(data)


def scope(principal: str, cache_salt: str | None) -> bytes:
    """Return the name space that a request's keys live in, 32 bytes.

    Parameters
    ----------
    principal:
        Who the request was authenticated as; one fixed name where keys are shared over principals or not configured.
    cache_salt:
        As the request holds it; an empty one differs from none.
    """
    salt = () if cache_salt is None else (cache_salt.encode("utf-8", "surrogatepass"),)
    return _hash_parts(_SCOPE_DOMAIN, principal.encode("utf-8", "surrogatepass"), *salt)


def item_key(
    *,
    scope: bytes,
    digest: bytes,
    hash_name: HashName,
    modality: str,
    fingerprint: bytes,
    dtype: str,
    options: bytes,
) -> bytes:
    """Return the key of one item, 32 bytes.

    Parameters
    ----------
    scope:
        From :func:`scope`.
    digest:
        Of the encoded bytes, from :meth:`Hasher.content_digest`.
    hash_name:
        Which hash ``digest`` is of.
    modality:
        ``image``, ``video`` or ``audio``.
    fingerprint:
        The processor's, from the model card.
    dtype:
        Of the main tensor, resolved: never ``auto``.
    options:
        What else the request chose for this medium, in canonical form; empty where nothing.

    Raises
    ------
    ValueError
        ``scope`` or ``digest`` is not 32 bytes long.
    """
    if len(scope) != DIGEST_SIZE or len(digest) != DIGEST_SIZE:
        raise ValueError(f"scope and digest are {DIGEST_SIZE} bytes each, not {len(scope)} and {len(digest)}")
    return _hash_parts(
        _ITEM_DOMAIN, scope, hash_name.encode(), digest, modality.encode(), fingerprint, dtype.encode(), options
    )


def _hash_parts(*parts: bytes) -> bytes:
    """Return blake3 over the number of ``parts`` and each with its length, all numbers as 8 bytes little-endian."""
    encoded = bytearray(len(parts).to_bytes(8, "little"))
    for part in parts:
        encoded += len(part).to_bytes(8, "little")
        encoded += part
    return blake3(encoded).digest()
