"""Opening recordings: by content, and never more than the limits.

:func:`open_recording` reads headers only and allocates nothing that a header asks for; what it gives decodes in blocks.
:mod:`.kinds` says what is read, :mod:`.sndfile` and :mod:`.ffmpeg` by which library, :mod:`.bounds` how much of it, and
:mod:`.structure` what neither library gets to see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from mmprep.errors import UnsupportedMedia
from mmprep_worker.audio.ffmpeg import open_ffmpeg
from mmprep_worker.audio.kinds import READ, Kind, sniff
from mmprep_worker.audio.sndfile import open_sndfile
from mmprep_worker.audio.structure import flac_length


class Recording(Protocol):
    """An opened recording, not decoded yet.

    Attributes
    ----------
    rate: samples a second, of each channel.
    channels: from 1 to :data:`~mmprep_worker.audio.bounds.MAX_CHANNELS`.
    frames: samples of each channel, where the header tells exactly; what decodes to another number is broken.
    max_frames: the most of them.
    """

    rate: int
    channels: int
    frames: int | None
    max_frames: int

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Decode, block by block; may be called once.

        Yields
        ------
        float32 ndarray (samples, channels)
            From -1 to 1; what is stored as float may hold anything.

        Raises
        ------
        mmprep.errors.DecodeError
            The data is truncated or broken.
        """


def open_recording(data: bytes | memoryview, *, max_seconds: float) -> Recording:
    """Read a recording's header.

    Parameters
    ----------
    data:
        The encoded bytes; the result keeps a reference.
    max_seconds:
        The longest recording, ``--max-audio-duration``.

    Raises
    ------
    mmprep.errors.UnsupportedMedia
        Empty, or none of :data:`~mmprep_worker.audio.kinds.READ`.
    mmprep.errors.DecodeError
        One of them, with a broken header, or truncated.
    mmprep.errors.TooLarge
        Longer than ``max_seconds``, or with too many channels.
    """
    view = memoryview(data)
    if not view:
        raise UnsupportedMedia(f"the recording is empty; send one of {READ}")
    kind, start = sniff(view)
    view = view[start:]
    if kind is None:
        raise UnsupportedMedia(f"not a recording of a kind that is read; send one of {READ}")
    if kind in {Kind.MP3, Kind.MP4, Kind.WEBM} or (kind is Kind.FLAC and not flac_length(view)):
        return open_ffmpeg(kind, view, max_seconds)
    return open_sndfile(kind, view, max_seconds)


def decoders() -> dict[str, str]:
    """Return the versions of all that decides over samples, for a model's fingerprint."""
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    return {"sndfile": soundfile.__libsndfile_version__, "ffmpeg": ffmpeg, "soxr": soxr.__libsoxr_version__}
