"""Decoders of media as targets: each runs in a process of its own, with little memory.

A new one needs a function that decodes one input there and returns its outcome, a corpus, and how inputs are changed; it
stands in :data:`MEDIA` then. :mod:`tests.fuzz.pictures` is an example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from tests.fuzz import pictures, recordings, videos
from tests.fuzz.child import Child

from mmprep.picture_header import FORMATS

#: Bytes of data that a decoder's process may have: an eighth of what a lane gets, for inputs of some kB.
MEMORY = 512 << 20


class Media:
    """One decoder.

    Parameters
    ----------
    name:
        Of the target.
    decode:
        What runs in the process, as ``module:function``; see :mod:`tests.fuzz.child`.
    corpus, mutate:
        As of every target.
    """

    def __init__(
        self,
        name: str,
        decode: str,
        corpus: Callable[[], list[bytes]],
        mutate: Callable[[Random, bytes, Sequence[bytes]], bytes],
    ) -> None:
        self.name = name
        self.corpus = corpus
        self.mutate = mutate
        self._child = Child(decode, MEMORY)

    def run(self, data: bytes) -> str:
        return self._child.run(data)

    def close(self) -> None:
        self._child.close()


_PICTURES = "tests.fuzz.pictures:decode"

#: Pictures of all formats, those of one at a time, videos and recordings.
MEDIA = (
    Media("pictures", _PICTURES, pictures.corpus, pictures.mutate),
    *(Media(name.lower(), _PICTURES, partial(pictures.corpus, name), pictures.mutate) for name in FORMATS),
    Media("videos", "tests.fuzz.videos:decode", videos.corpus, videos.mutate),
    Media("recordings", "tests.fuzz.recordings:decode", recordings.corpus, recordings.mutate),
)
