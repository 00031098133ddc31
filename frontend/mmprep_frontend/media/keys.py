"""What identifies media and items, and keeps those of different clients apart. Pure.

A *scope* is H(principal, cache salt): the name space of all else here, so nobody can ask whether another has sent a
picture. A *variant* is

    H(scope, hash name, modality, processor fingerprint, dtype, canonical per-request options)

and makes, with the digest of a medium, the key of an item (:func:`mmprep.keys.item_key`). An *alias* is what a ``uuid``
becomes: H(scope, modality, uuid). It is no key and never made into one: the writer keeps which content it stands for.

What was processed elsewhere has a name space of its own: H("injected", scope, modality, processor fingerprint, name) is its
key, and H of that and of its digest is what engines are told.

Changing anything here changes every key: raise the version in the name of the hash, and the vectors in the tests.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

from mmprep.digest import DIGEST_SIZE, HashName
from mmprep.keys import encode_parts, hash_parts

_SCOPE_DOMAIN: Final = b"mmprep scope 1"
_VARIANT_DOMAIN: Final = b"mmprep item variant 1"
_ALIAS_DOMAIN: Final = b"mmprep uuid alias 1"
_INJECTED_DOMAIN: Final = b"mmprep injected 1"
_INJECTED_ITEM_DOMAIN: Final = b"mmprep injected item 1"
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
    return hash_parts(_SCOPE_DOMAIN, principal.encode("utf-8", "surrogatepass"), *salt)


@lru_cache(maxsize=1024)
def variant(
    *, scope: bytes, hash_name: HashName, modality: str, fingerprint: bytes, dtype: str, options: bytes
) -> bytes:
    """Return what is the same for all media that are processed alike for the same clients, 32 bytes.

    Parameters
    ----------
    scope:
        From :func:`scope`.
    hash_name:
        Which hash the media's digests are of.
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
        ``scope`` is not 32 bytes long.
    """
    _check_scope(scope)
    return hash_parts(
        _VARIANT_DOMAIN, scope, hash_name.encode(), modality.encode(), fingerprint, dtype.encode(), options
    )


def alias(*, scope: bytes, modality: str, uuid: str) -> bytes:
    """Return what a caller's ``uuid`` is to the writer, 32 bytes.

    Parameters
    ----------
    scope:
        From :func:`scope`.
    modality:
        ``image``, ``video`` or ``audio``: one uuid may stand for a medium of each.
    uuid:
        As the request holds it.

    Raises
    ------
    ValueError
        ``scope`` is not 32 bytes long.
    """
    _check_scope(scope)
    return hash_parts(_ALIAS_DOMAIN, scope, modality.encode(), uuid.encode("utf-8", "surrogatepass"))


def injected_key(*, scope: bytes, modality: str, fingerprint: bytes, name: str) -> bytes:
    """Return the key of what is injected under a name, 32 bytes: never that of content, nor an alias.

    Parameters
    ----------
    scope:
        From :func:`scope`.
    modality, fingerprint:
        As for :func:`variant`.
    name:
        The caller's: what parts give as their ``uuid``.

    Raises
    ------
    ValueError
        ``scope`` is not 32 bytes long.
    """
    _check_scope(scope)
    return hash_parts(_INJECTED_DOMAIN, scope, modality.encode(), fingerprint, name.encode("utf-8", "surrogatepass"))


def injected_hash(key: bytes, digest: bytes) -> bytes:
    """Return what an injected item is to engines, 32 bytes: another one for other content under the same key."""
    return hash_parts(_INJECTED_ITEM_DOMAIN, key, digest)


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
    return hashlib.sha256(encode_parts(parts)).digest()


def url_digest(url: str) -> bytes:
    """Return what tells a URL in normal form from others without holding it: SHA-256, 32 bytes."""
    return hashlib.sha256(encode_parts((_URL_DOMAIN, url.encode("ascii")))).digest()


def _check_scope(scope: bytes) -> None:
    if len(scope) != DIGEST_SIZE:
        raise ValueError(f"a scope is {DIGEST_SIZE} bytes, not {len(scope)}")
