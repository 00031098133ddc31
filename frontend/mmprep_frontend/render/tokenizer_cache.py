"""Tokenizers that were made of a model directory, as files in this user's cache.

- A key says all that a tokenizer depends on: the directory's path, names and bytes of its files, and the versions of the
  packages that make it. Nothing ever becomes stale; what has another key is made anew.
- A directory or file that another user owns or may write is as if it were not there: its ids would be ours.
- The bytes carry their own digest. A file appears whole, under a name that nothing else has.
- Whatever the disk does, a tokenizer is made as if there were no cache.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import blake3
import msgspec

from mmprep_frontend.render.requests import Side

#: Tokenizers that are kept; one has up to some tens of megabytes.
_MOST = 16
#: Bytes of one that is read.
_MOST_BYTES = 256 << 20
#: Files up to this size are read for the key. No tokenizer has larger ones: of weights, size and date must do.
_READ_BYTES = 64 << 20
_DIGEST = 32
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


def default_directory(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return ``$XDG_CACHE_HOME/mmprep/tokenizers``, else that of ``~/.cache``; ``None`` where this user has no home."""
    home = environment.get("XDG_CACHE_HOME", "")
    if home.startswith("/"):
        return Path(home) / "mmprep" / "tokenizers"
    try:
        return Path.home() / ".cache" / "mmprep" / "tokenizers"
    except RuntimeError:
        return None


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
    """The tokenizers in one directory, which several processes may share; it is made when one is put into it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, key: bytes) -> Kept | None:
        """Return the tokenizer under ``key``."""
        path = self._path(key)
        try:
            if not self._is_ours():
                return None
            with open(path, "rb", opener=_open_alone) as file:
                found = os.fstat(file.fileno())
                if not _is_private(found) or found.st_size > _MOST_BYTES:
                    return None
                data = file.read(_MOST_BYTES)
            os.utime(path)  # what is used stays
        except OSError:
            return None
        if blake3.blake3(data[_DIGEST:]).digest() != data[:_DIGEST]:
            return None
        try:
            return msgspec.msgpack.decode(memoryview(data)[_DIGEST:], type=Kept)
        except msgspec.DecodeError:
            return None

    def put(self, key: bytes, kept: Kept) -> None:
        """Keep a tokenizer, and let those go that were not used for longest."""
        data = msgspec.msgpack.encode(kept)
        if len(data) + _DIGEST > _MOST_BYTES:
            return
        with contextlib.suppress(OSError):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_ours():
                self._write(self._path(key), data)
                self._sweep()

    def _write(self, path: Path, data: bytes) -> None:
        number, name = tempfile.mkstemp(dir=self._directory, prefix="new-")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(blake3.blake3(data).digest())
                file.write(data)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _sweep(self) -> None:
        """Remove all but the latest files, also what a process that died has left half written."""
        dated = []
        for path in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                dated.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(dated, reverse=True)[_MOST:]:
            path.unlink(missing_ok=True)

    def _path(self, key: bytes) -> Path:
        return self._directory / key.hex()

    def _is_ours(self) -> bool:
        found = self._directory.lstat()
        return stat.S_ISDIR(found.st_mode) and _is_private(found)


def _open_alone(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def _is_private(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022
