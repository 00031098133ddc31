"""The demonstration model and the photographs that come with the package, so that a bare install can show its work.

The model directory is in Hugging Face layout and of Qwen2-VL's family: its published processor values, chat format and
special tokens, with a small vocabulary of our own (``scripts/train_embedded_tokenizer.py``). It has no weights: what
turns requests into an engine's inputs needs none.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def path() -> Path:
    """Return the directory of the demonstration model.

    The package is installed as files, never as an archive, so that this is a directory on disk.
    """
    return Path(str(files(__name__) / "model"))


def photos() -> tuple[Path, ...]:
    """Return the photographs of the demonstration, in the order of their names.

    Their authors and licences stand in ``LICENSES.md`` beside them.
    """
    return tuple(sorted(Path(str(files(__name__) / "photos")).glob("*.jpg")))
