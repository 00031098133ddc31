"""Recordings for tests, made on the spot: tones that rise, noise, silence, in every format that is read.

``FORMATS`` names them all; ``encoded`` makes one. What is lossless decodes to the samples that were given, so that these
are a reference which no decoder of ours has touched.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import av
import numpy as np
import soundfile


def sound(rate=16_000, seconds=1.0, channels=1, seed=0):
    """Return float32 (samples, channels): in each channel another rising tone, and some noise."""
    count = round(rate * seconds)
    times = np.arange(count)[:, None] / rate
    pitch = 180.0 * (1 + np.arange(channels))
    tone = 0.4 * np.sin(2 * np.pi * (pitch * times + 300 * times**2 / max(seconds, 1e-9)))
    noise = np.random.default_rng(seed).normal(0, 0.02, (count, channels))
    return np.clip(tone + noise, -0.99, 0.99).astype(np.float32)


def with_sndfile(samples, rate, container, coding, endian=None):
    """Encode float32 (samples, channels) by libsndfile."""
    into = io.BytesIO()
    soundfile.write(into, samples, rate, format=container, subtype=coding, endian=endian)
    return into.getvalue()


def with_ffmpeg(samples, rate, container, codec, *, sample_format="fltp", options=None, video=None):
    """Encode float32 (samples, channels) by FFmpeg; ``video`` names a codec of moving pictures beside it.

    ``samples`` may be ``None``: then there is no sound.
    """
    into = io.BytesIO()
    with av.open(into, "w", format=container, options=options or {}) as output:
        pictures = None
        if video is not None:
            pictures = output.add_stream(video, rate=10)
            pictures.width = pictures.height = 64
            pictures.pix_fmt = "yuv420p"
        track = None
        if samples is not None:
            layout = {1: "mono", 2: "stereo", 6: "5.1"}[samples.shape[1]]
            track = output.add_stream(codec, rate=rate, layout=layout, format=sample_format)
        if pictures is not None:
            for index in range(10):
                shade = np.full((64, 64, 3), 20 * index, np.uint8)
                output.mux(pictures.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
            output.mux(pictures.encode(None))
        if track is not None:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
            frame.sample_rate = rate
            size = track.codec_context.frame_size or 1024
            convert = av.AudioResampler(format=sample_format, layout=layout, rate=rate, frame_size=size)
            for piece in [*convert.resample(frame), *convert.resample(None)]:
                output.mux(track.encode(piece))
            output.mux(track.encode(None))
    return into.getvalue()


def without_length(flac, length=0):
    """Return a FLAC whose header announces so many samples, by default none, as programs write that do not know yet."""
    head = int.from_bytes(flac[18:26], "big") >> 36
    return flac[:18] + ((head << 36) | length).to_bytes(8, "big") + flac[26:]


def ogg_checksum(page):
    """Return an Ogg page with its checksum put right (RFC 3533)."""
    crc = 0
    page = page[:22] + bytes(4) + page[26:]
    for byte in page:
        crc = (crc << 8) & 0xFFFFFFFF ^ _CRC[crc >> 24 ^ byte]
    return page[:22] + crc.to_bytes(4, "little") + page[26:]


def _crc_of(byte):
    crc = byte << 24
    for _ in range(8):
        crc = (crc << 1) ^ (0x104C11DB7 if crc & 0x80000000 else 0)
    return crc


_CRC = [_crc_of(byte) for byte in range(256)]


def with_granule(ogg, granule):
    """Return an Ogg whose last page says that so many samples end with it."""
    last = ogg.rindex(b"OggS")
    page = ogg[last:]
    return ogg[:last] + ogg_checksum(page[:6] + granule.to_bytes(8, "little") + page[14:])


class Format(NamedTuple):
    """One way to encode a recording.

    Attributes
    ----------
    encode: of float32 (samples, channels) and their rate.
    error: by how much a decoded sample may differ at most where the format keeps samples; ``None``: it does not.
    exact: whether its header tells how many samples it decodes to.
    rates: those that the format takes; empty: all.
    """

    encode: Callable[[np.ndarray, int], bytes]
    error: float | None
    exact: bool = True
    rates: tuple[int, ...] = ()


def _sndfile(container, coding, error, endian=None, rates=()):
    return Format(lambda samples, rate: with_sndfile(samples, rate, container, coding, endian), error, True, rates)


def _ffmpeg(container, codec, *, error=None, sample_format="fltp", options=None, rates=()):
    return Format(
        lambda samples, rate: with_ffmpeg(
            samples, rate, container, codec, sample_format=sample_format, options=options
        ),
        error,
        False,
        rates,
    )


_OPUS_RATES = (8_000, 16_000, 24_000, 48_000)
_MP3_RATES = (16_000, 22_050, 24_000, 32_000, 44_100, 48_000)

FORMATS = {
    "wav-u8": _sndfile("WAV", "PCM_U8", 1.01 / 2**7),
    "wav-16": _sndfile("WAV", "PCM_16", 1.01 / 2**15),
    "wav-24": _sndfile("WAV", "PCM_24", 1.01 / 2**23),
    "wav-32": _sndfile("WAV", "PCM_32", 1.01 / 2**24),
    "wav-float": _sndfile("WAV", "FLOAT", 0.0),
    "wav-double": _sndfile("WAV", "DOUBLE", 0.0),
    "wav-ulaw": _sndfile("WAV", "ULAW", 0.02),
    "wav-alaw": _sndfile("WAV", "ALAW", 0.02),
    "wav-ima": _sndfile("WAV", "IMA_ADPCM", None),
    "wav-ms": _sndfile("WAV", "MS_ADPCM", None),
    "wav-extensible": _sndfile("WAVEX", "PCM_16", 1.01 / 2**15),
    "rf64": _sndfile("RF64", "PCM_16", 1.01 / 2**15),
    "aiff-16": _sndfile("AIFF", "PCM_16", 1.01 / 2**15),
    "aiff-little": _sndfile("AIFF", "PCM_16", 1.01 / 2**15, endian="LITTLE"),
    "aiff-float": _sndfile("AIFF", "FLOAT", 0.0),
    "flac-16": _sndfile("FLAC", "PCM_16", 1.01 / 2**15),
    "flac-24": _sndfile("FLAC", "PCM_24", 1.01 / 2**23),
    "flac-stream": Format(
        lambda samples, rate: without_length(with_sndfile(samples, rate, "FLAC", "PCM_16")), 1.01 / 2**15, False
    ),
    "ogg-vorbis": _sndfile("OGG", "VORBIS", None),
    "ogg-opus": _sndfile("OGG", "OPUS", None, rates=_OPUS_RATES),
    "mp3": Format(lambda samples, rate: with_sndfile(samples, rate, "MP3", "MPEG_LAYER_III"), None, False, _MP3_RATES),
    "mp3-id3": _ffmpeg("mp3", "libmp3lame", rates=_MP3_RATES),
    "mp3-bare": _ffmpeg("mp3", "libmp3lame", options={"write_xing": "0", "id3v2_version": "0"}, rates=_MP3_RATES),
    "m4a-aac": _ffmpeg("mp4", "aac"),
    "m4a-fragments": _ffmpeg("mp4", "aac", options={"movflags": "frag_keyframe+empty_moov"}),
    "m4a-alac": _ffmpeg("ipod", "alac", error=1.01 / 2**15, sample_format="s16p"),
    "webm-opus": _ffmpeg("webm", "libopus", sample_format="flt", rates=_OPUS_RATES),
}
LOSSLESS = [name for name, how in FORMATS.items() if how.error is not None]


def encoded(name, samples, rate):
    """Return float32 (samples, channels) in the format of that name."""
    return FORMATS[name].encode(samples, rate)
