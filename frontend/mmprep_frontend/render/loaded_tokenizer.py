"""A model's tokenizer as transformers makes it, and from a cache where it was made before.

transformers decides what the files of a model directory mean, and only it. To import it takes more than a second of CPU
time, so what it made is kept (:mod:`mmprep_frontend.render.tokenizer_cache`), and a later start of the same files and
versions does without.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from mmprep.errors import StartupError
from mmprep_frontend.render.requests import Side
from mmprep_frontend.render.tokenizer_cache import Kept, TokenizerCache, key_of

_log = logging.getLogger("mmprep.frontend")


@dataclass(frozen=True)
class LoadedTokenizer:
    """What is used of a model's tokenizer.

    Attributes
    ----------
    backend: the fast tokenizer.
    special_tokens: by name, as a chat template's variables.
    truncation_side: from which the configuration cuts too long texts.
    """

    backend: Tokenizer
    special_tokens: dict[str, str]
    truncation_side: Side


def load_tokenizer(directory: Path, cache: TokenizerCache | None = None) -> LoadedTokenizer:
    """Return the tokenizer of a model directory in Hugging Face layout; takes a second where it is in no cache.

    Raises
    ------
    StartupError
        The directory has none, or none with a fast backend.
    """
    if cache is None:
        return _make(directory)
    key = _key(directory)
    if key is None:
        return _make(directory)
    if (kept := cache.get(key)) is not None and (restored := _restored(kept)) is not None:
        return restored
    made = _make(directory)
    # Files that were replaced meanwhile may have made another tokenizer than this key's.
    if (whole := _kept(made)) is not None and _key(directory) == key:
        cache.put(key, whole)
    return made


def _key(directory: Path) -> bytes | None:
    try:
        return key_of(directory)
    except OSError:  # what cannot be read is told by transformers
        return None


def _make(directory: Path) -> LoadedTokenizer:
    from transformers import AutoTokenizer  # noqa: PLC0415, it takes a second, beside which the process opens its doors

    try:
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartupError("The model directory has no tokenizer that can be loaded.") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise StartupError("The model's tokenizer has no fast backend; a tokenizer.json is needed.")
    return LoadedTokenizer(
        backend,
        {name: str(token) for name, token in loaded.special_tokens_map.items()},
        "left" if loaded.truncation_side == "left" else "right",
    )


def _kept(made: LoadedTokenizer) -> Kept | None:
    """Return what the tokenizer is made of; ``None`` where one made of that would not be the same."""
    try:
        kept = Kept(
            made.backend.to_str(), made.backend.encode_special_tokens, made.special_tokens, made.truncation_side
        )
    except Exception:  # noqa: BLE001 -- tokenizers raises nothing narrower, here for parts that are written in Python
        return None
    again = _restored(kept)
    return kept if again is not None and again.backend.to_str() == kept.backend else None


def _restored(kept: Kept) -> LoadedTokenizer | None:
    try:
        backend = Tokenizer.from_str(kept.backend)
    except Exception:  # noqa: BLE001 -- as above
        _log.warning("a tokenizer that was kept cannot be read and is made anew")
        return None
    backend.encode_special_tokens = kept.encode_special_tokens
    return LoadedTokenizer(backend, kept.special_tokens, kept.truncation_side)
