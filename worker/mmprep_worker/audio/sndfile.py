"""Recordings that libsndfile reads: WAV, AIFF, FLAC, Ogg Vorbis and Ogg Opus.

How long such a recording is, its header says exactly: what is decoded is that, or an error. libsndfile never reads
beyond, so that what a header leaves out is not there, and nothing is allocated by what it promises.

Not for several threads at once: soundfile reads libsndfile's last error from a place that all share.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import soundfile
from numpy.typing import NDArray

from mmprep.errors import DecodeError, MmprepError, UnsupportedMedia
from mmprep_worker.audio.bounds import check_seconds, check_sound, reason
from mmprep_worker.audio.kinds import READ, Kind
from mmprep_worker.audio.structure import check_chunks, ogg_end
from mmprep_worker.memory_file import MemoryFile

#: Samples of each channel that are decoded at a time.
BLOCK = 1 << 16

_PCM = frozenset({"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"})
#: Codings by kind, by libsndfile's names.
_CODINGS = {
    Kind.WAV: _PCM | {"IMA_ADPCM", "MS_ADPCM"},
    Kind.AIFF: _PCM,
    Kind.FLAC: frozenset({"PCM_S8", "PCM_16", "PCM_24"}),
    Kind.OGG: frozenset({"VORBIS", "OPUS"}),
}
#: libsndfile's numbers for "format not recognised" and "unsupported encoding".
_NOT_READ = frozenset({1, 4})


class SndfileRecording:
    """An opened recording; see :class:`mmprep_worker.audio.recording.Recording`."""

    def __init__(self, sound: soundfile.SoundFile, max_seconds: float) -> None:
        self.rate: int = sound.samplerate
        self.channels: int = sound.channels
        self.frames: int | None = sound.frames
        self.max_frames = int(max_seconds * self.rate)
        self._sound = sound

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Decode; see :meth:`mmprep_worker.audio.recording.Recording.blocks`."""
        with self._sound:
            while len(block := self._read()):
                yield block

    def _read(self) -> NDArray[np.float32]:
        try:
            block: NDArray[np.float32] = self._sound.read(BLOCK, dtype="float32", always_2d=True)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001, on broken data soundfile raises whatever it stumbles over
            raise _broken(error) from None
        return block


def open_sndfile(kind: Kind, data: memoryview, max_seconds: float) -> SndfileRecording:
    """Read a recording's header.

    Parameters
    ----------
    kind:
        One of WAV, AIFF, FLAC and Ogg, from :func:`~mmprep_worker.audio.kinds.sniff`.
    data:
        The encoded bytes; the result keeps a reference.
    max_seconds:
        The longest recording, ``--max-audio-duration``.

    Raises
    ------
    UnsupportedMedia
        Its samples are coded in a way that is not read, or have an odd rate.
    DecodeError
        Its header is broken, or it is truncated.
    TooLarge
        Too many channels, or too long.
    """
    if kind in {Kind.WAV, Kind.AIFF}:
        problem = check_chunks(kind, data)
        if problem is not None:
            raise UnsupportedMedia(f"the {kind} cannot be used: {problem}")
    if kind is Kind.OGG:
        data = data[: ogg_end(data)]
    try:
        sound = soundfile.SoundFile(MemoryFile(data))
        coding = sound.subtype
    except (MmprepError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001, as above
        if getattr(error, "code", None) in _NOT_READ:
            raise UnsupportedMedia(f"not a {kind} that is read; send one of {READ}") from None
        raise _broken(error) from None
    if coding not in _CODINGS[kind]:
        raise UnsupportedMedia(f"the {kind}'s coding ({coding}) is not read; send one of {READ}")
    check_sound(sound.samplerate, sound.channels)
    if sound.frames < 0:
        raise DecodeError("the recording is broken: its header tells a length below zero")
    check_seconds(sound.frames / sound.samplerate, max_seconds)
    return SndfileRecording(sound, max_seconds)


def _broken(error: Exception) -> DecodeError:
    said = reason(error, getattr(error, "error_string", None))
    return DecodeError(f"the recording is broken or truncated: {said}")
