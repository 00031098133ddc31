"""API keys: read from files, kept and compared as digests, never shown.

A key file has one key a line: ``<key>``, or ``<name> <key>``. Empty lines and those that start with ``#`` are passed
over. Keys of one name belong to one principal, so that a key can be replaced without losing what was cached under it;
a key without a name is a principal of its own, named by its digest.

WARNING: a key itself stays in the process that reads the file. Others get its SHA-256, which is all that comparing needs:
keys are long and random, so their digest gives nothing away.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec

from mmprep.errors import StartupError

_KEY: Final = re.compile(r"[!-~]{16,512}", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_MOST: Final = 1_000
_LARGEST_FILE: Final = 8 << 20


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key.

    Attributes
    ----------
    principal: whose it is.
    digest: SHA-256 of the key, as hexadecimal digits.
    """

    principal: str
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


def digest_of(key: str) -> str:
    """Return what a key is compared by."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path, option: str) -> tuple[ApiKey, ...]:
    """Return the keys in a file.

    Parameters
    ----------
    path:
        The file.
    option:
        The option that named it, for errors.

    Raises
    ------
    StartupError
        The file cannot be read, holds no key, or a line is none; the message tells the line's number, not what it says.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise StartupError(f"{option}: {path} is larger than 8 MiB; give a file with one key a line")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{option}: {path} cannot be read ({type(error).__name__})") from None
    numbered = [(number, line.split()) for number, line in enumerate(lines, 1)]
    keys = tuple(
        _key(words, f"{option}: {path}, line {number}") for number, words in numbered if words and words[0][0] != "#"
    )
    if not keys:
        raise StartupError(f"{option}: {path} holds no key; write one a line")
    if len(keys) > _MOST:
        raise StartupError(f"{option}: {path} holds more than {_MOST:,} keys")
    if len({key.digest for key in keys}) != len(keys):
        raise StartupError(f"{option}: {path} holds a key twice; let each be one principal's")
    return keys


def _key(words: Sequence[str], place: str) -> ApiKey:
    key, names = words[-1], words[:-1]
    if len(names) > 1 or not _KEY.fullmatch(key):
        raise StartupError(
            f"{place}: write '<key>' or '<name> <key>', with a key of 16 to 512 printable ASCII characters without blanks"
        )
    if names and not _NAME.fullmatch(names[0]):
        raise StartupError(f"{place}: a name has 1 to 64 letters, digits, dots, dashes and underscores")
    digest = digest_of(key)
    return ApiKey(names[0] if names else f"key:{digest[:16]}", digest)
