"""What identifies an item in the cache. Pure.

An *item key* is

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
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from blake3 import blake3

from mmprep.digest import DIGEST_SIZE, HashName

_ITEM_DOMAIN: Final = b"mmprep item key 1"
_SCOPE_DOMAIN: Final = b"mmprep scope 1"
_FETCHED_DOMAIN: Final = b"mmprep fetched medium 1"
_URL_DOMAIN: Final = b"mmprep media url 1"


@lru_cache(maxsize=1024)
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


def fetched_key(*, scope: bytes, url: str, allow_private: bool) -> bytes:
    """Return what a fetched medium lies under in the disk cache: SHA-256, 32 bytes.

    Parameters
    ----------
    scope:
        From :func:`scope`.
    url:
        In its normal form, as the policy judged it.
    allow_private:
        Whether private addresses might be dialled: what was read from one is not there for a service that must not.
    """
    parts = (_FETCHED_DOMAIN, scope, url.encode("ascii"), b"private" if allow_private else b"public")
    return hashlib.sha256(_encode_parts(parts)).digest()


def url_digest(url: str) -> bytes:
    """Return what tells a URL in normal form from others without holding it: SHA-256, 32 bytes."""
    return hashlib.sha256(_encode_parts((_URL_DOMAIN, url.encode("ascii")))).digest()


def _hash_parts(*parts: bytes) -> bytes:
    """Return blake3 over the number of ``parts`` and each with its length, all numbers as 8 bytes little-endian."""
    return blake3(_encode_parts(parts)).digest()


def _encode_parts(parts: Sequence[bytes]) -> bytes:
    encoded = bytearray(len(parts).to_bytes(8, "little"))
    for part in parts:
        encoded += len(part).to_bytes(8, "little")
        encoded += part
    return bytes(encoded)
