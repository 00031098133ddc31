"""What a tokenizer is made of, and the key under which it is kept (:mod:`mmprep.kept`).

The key says all that a tokenizer depends on: the directory's path, names and bytes of its files, and the versions of the
packages that make it.
"""

from __future__ import annotations

import importlib.metadata
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import blake3
import msgspec

from mmprep.kept import KeptFiles, cache_directory
from mmprep_frontend.render.requests import Side

#: Tokenizers that are kept; one has up to some tens of megabytes.
_MOST = 16
#: Files up to this size are read for the key. No tokenizer has larger ones: of weights, size and date must do.
_READ_BYTES = 64 << 20
#: Another form of :class:`Kept` gets another number.
_FORM = 1
_DECIDING = ("transformers", "tokenizers")


class Kept(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tokenizer.

    Attributes
    ----------
    backend: as ``tokenizers.Tokenizer.to_str`` writes it.
    encode_special_tokens: of the backend, which does not write it.
    special_tokens, truncation_side: as :class:`~mmprep_frontend.render.loaded_tokenizer.LoadedTokenizer` has them.
    """

    backend: str
    encode_special_tokens: bool
    special_tokens: dict[str, str]
    truncation_side: Side


def key_of(directory: Path) -> bytes:
    """Return 32 bytes that change with everything that the directory's tokenizer depends on.

    Raises
    ------
    OSError
        The directory or a file in it cannot be read.
    """
    hasher = blake3.blake3()
    for part in _parts(directory):
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.digest()


def _parts(directory: Path) -> Iterator[bytes]:
    yield f"{_FORM} {[importlib.metadata.version(name) for name in _DECIDING]}".encode()
    yield os.fsencode(directory)
    for path in sorted(directory.iterdir()):
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            yield os.fsencode(path.name)
            small = found.st_size <= _READ_BYTES
            yield path.read_bytes() if small else f"{found.st_size} {found.st_mtime_ns}".encode()


class TokenizerCache:
    """The tokenizers in one directory; by default in this user's cache."""

    def __init__(self, directory: Path | None = None) -> None:
        home = cache_directory()
        self._files = KeptFiles(directory or (home and home / "tokenizers"), _MOST)

    def get(self, key: bytes) -> Kept | None:
        """Return the tokenizer under ``key``."""
        data = self._files.get(key)
        try:
            return None if data is None else msgspec.msgpack.decode(data, type=Kept)
        except msgspec.DecodeError:
            return None

    def put(self, key: bytes, kept: Kept) -> None:
        """Keep a tokenizer."""
        self._files.put(key, msgspec.msgpack.encode(kept))
