"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, videos: frames are chosen, resized one by one, and written in pairs into patches.

A patch spans two frames; where their number is odd, the last one is repeated. Frames are chosen as vLLM does by default, or,
where a request lets it, as the processor itself does (:mod:`mmprep_worker.video.sampling`). What stands for a video differs:

=====================  =====================================================  ==========================================
family                 one placeholder becomes                                tensors beside pixels and grid
=====================  =====================================================  ==========================================
Qwen2-VL               its id for each group of patches                       none
Qwen2.5-VL             the same                                               ``second_per_grid_ts``, seconds a pair spans
Qwen3-VL               for each pair: its time as text, the vision start,     ``timestamps``, the time of each pair in
                       its ids, the vision end; the ids take embeddings       seconds
=====================  =====================================================  ==========================================

Each frame is resized and normalised as transformers' ``Qwen2VLImageProcessorPil`` does with a picture, and equals it to the
bit. The video processors of transformers need torch and resize by its bicubic filter, which rounds otherwise: less than a
hundredth of the values of a resized frame differ, by one of 255; where Pillow runs its vertical pass first (see
:mod:`mmprep_worker.images.resample`), which torch never does, values at sharp edges differ by more.

Frames are decoded one by one into the tensors: never is there more than one in memory beside what the decoder keeps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from mmprep.arguments import read_chosen
from mmprep.card import FieldForm, ItemOptions, Placeholder, unpack_io
from mmprep.errors import DecodeError, InvalidRequest, StartupError, TooLarge
from mmprep.items import FieldKind, ItemMeta, Normalization, Plan, Run, lay_out
from mmprep_worker.images.patches import write_patches
from mmprep_worker.images.resample import make_resampler
from mmprep_worker.images.tables import lookup_tables
from mmprep_worker.models.family import MediaLimits, Prepared
from mmprep_worker.models.qwen2_vl_arguments import resized_by, sampled_by, video_arguments
from mmprep_worker.models.qwen2_vl_settings import DTYPES, VideoSettings
from mmprep_worker.models.qwen3_vl_times import TimeTokens
from mmprep_worker.video.clip import Clip, open_clip
from mmprep_worker.video.sampling import evenly, in_pairs, paced, read_choice, spread

#: Runs of a plan, each of up to 10 bytes: what is above does not fit into one message of the service's.
_MOST_RUNS = 6_000


class TimeMarks(NamedTuple):
    """What Qwen3-VL puts around each pair of frames.

    Attributes
    ----------
    tokens: encodes the time before it.
    start, end: ids of the vision marks.
    """

    tokens: TimeTokens
    start: int
    end: int


class _Chosen(NamedTuple):
    """The frames of one video that are taken, and the patches that they become."""

    clip: Clip
    indices: list[int]
    #: Pairs of frames, patches down and across.
    grid: tuple[int, int, int]


class Videos:
    """The family's videos, for one model directory.

    Parameters
    ----------
    settings:
        Of :func:`mmprep_worker.models.qwen2_vl_settings.read_video_settings`.
    placeholder:
        The video token and its id.
    limits:
        Of one medium.
    rated:
        Whether the model is told how many seconds a pair of frames spans (Qwen2.5-VL).
    marks:
        Of Qwen3-VL; ``None`` for the others.
    """

    def __init__(
        self,
        settings: VideoSettings,
        placeholder: Placeholder,
        limits: MediaLimits,
        *,
        rated: bool = False,
        marks: TimeMarks | None = None,
    ) -> None:
        frame = settings.frame
        if settings.whole and limits.video_frames < frame.times:
            raise StartupError(f"--max-video-frames {limits.video_frames}: this model takes at least {frame.times}")
        self.settings = settings
        self.placeholder = placeholder
        self.arguments = video_arguments(settings, limits)
        run = frame.times * frame.patch**2
        self.normalization = Normalization("pixel_values_videos", frame.scale, frame.mean, frame.std, run)
        self.resampler = make_resampler()
        self.tables = {dtype: lookup_tables(frame.scale, frame.mean, frame.std, dtype) for dtype in DTYPES}
        self._limits = limits
        self._rated = rated
        self._marks = marks

    @property
    def fields(self) -> tuple[FieldForm, ...]:
        """What a video's tensors are like, for the card."""
        forms = [
            FieldForm("pixel_values_videos", DTYPES, (None, self.settings.frame.width), "flat", False),
            FieldForm("video_grid_thw", ("int64",), (3,), "batched", True),
        ]
        if self._rated:
            forms.append(FieldForm("second_per_grid_ts", ("float32",), (), "batched", True))
        if self._marks is not None:
            forms.append(FieldForm("timestamps", ("float64",), (None,), "batched", True))
        return tuple(forms)

    def plan(self, medium: bytes | memoryview, options: ItemOptions) -> Plan:
        """Return the plan of one video: its packets are read and its first frame is decoded."""
        return self._plan(self._choose(medium, options))

    def open(self, medium: bytes | memoryview, options: ItemOptions) -> Prepared:
        """Read one video's packets and choose its frames.

        Raises
        ------
        mmprep.errors.InvalidRequest
            A dtype or argument that is not on the card, wrong ``media_io_kwargs``, or frames of a shape that the model
            does not take.
        mmprep.errors.MediaError
            As :func:`mmprep_worker.video.clip.open_clip`.
        """
        if options.dtype not in DTYPES:
            raise InvalidRequest(f"mm_dtype {options.dtype!r} is not one of {', '.join(DTYPES)}", param="mm_dtype")
        started = time.monotonic_ns()
        chosen = self._choose(medium, options)
        decode_ns = time.monotonic_ns() - started
        small = self._small(chosen)
        return PreparedVideo(self, chosen, small, self._meta(chosen, small, options.dtype), decode_ns=decode_ns)

    def _small(self, chosen: _Chosen) -> dict[str, NDArray[Any]]:
        """Return the tensors beside the pixels, which stay on the CPU."""
        small: dict[str, NDArray[Any]] = {"video_grid_thw": np.array(chosen.grid, "<i8")}
        if self._rated:
            small["second_per_grid_ts"] = np.array(self._seconds_a_pair(chosen), "<f4")
        if self._marks is not None:
            small["timestamps"] = np.array(self._times(chosen), "<f8")
        return small

    def _meta(self, chosen: _Chosen, small: Mapping[str, NDArray[Any]], dtype: str) -> ItemMeta:
        pairs, down, across = chosen.grid
        shape = (pairs * down * across, self.settings.frame.width)
        fields: list[tuple[str, str, Sequence[int], FieldKind, bool]]
        fields = [("pixel_values_videos", dtype, shape, "flat", False)]
        fields += [(name, array.dtype.name, array.shape, "batched", True) for name, array in small.items()]
        return ItemMeta(
            modality="video",
            plan=self._plan(chosen),
            fields=lay_out(fields),
            cpu={name: array.tobytes() for name, array in small.items()},
            normalization=self.normalization,
        )

    def _choose(self, medium: bytes | memoryview, options: ItemOptions) -> _Chosen:
        most = self._limits.video_frames
        choice = read_choice(unpack_io(options.io), most=most)
        chosen = read_chosen(self.arguments, options.kwargs)
        sampled = sampled_by(chosen, choice)
        clip = open_clip(medium, self._limits)
        third = self._marks is not None
        if sampled is None:
            indices = (paced if third else spread)(clip.count, clip.rate, choice, most)
        else:
            indices = (evenly if third else in_pairs)(clip.count, clip.rate, sampled, most, self.settings.sampler)
        frame = resized_by(self.settings.frame, chosen)
        settings = msgspec.structs.replace(self.settings, frame=frame)
        height, width = settings.size(len(indices), clip.height, clip.width)
        pairs = -(-len(indices) // frame.times)
        return _Chosen(clip, indices, (pairs, height // frame.patch, width // frame.patch))

    def _plan(self, chosen: _Chosen) -> Plan:
        pairs, down, across = chosen.grid
        groups = down * across // self.settings.frame.merge**2
        token_id = self.placeholder.token_id
        if self._marks is None:
            return Plan((Run(token_id, pairs * groups),))
        runs: list[Run] = []
        for seconds in self._times(chosen):
            runs += (Run(text_id, 1, embed=False) for text_id in self._marks.tokens.encode(seconds))
            runs += (
                Run(self._marks.start, 1, embed=False),
                Run(token_id, groups),
                Run(self._marks.end, 1, embed=False),
            )
            if len(runs) > _MOST_RUNS:
                raise TooLarge(
                    f"the {len(chosen.indices)} frames of the video that are taken need too much text for their times; "
                    "let fewer be taken (--max-video-frames)"
                )
        return Plan(tuple(runs))

    def _seconds_a_pair(self, chosen: _Chosen) -> float:
        """Return what transformers' ``Qwen2_5_VLProcessor`` computes, in the order in which it does."""
        return self.settings.frame.times / (len(chosen.indices) / chosen.clip.count * chosen.clip.rate)

    def _times(self, chosen: _Chosen) -> list[float]:
        """Return the time of each pair in seconds, as transformers' ``Qwen3VLProcessor._calculate_timestamps``."""
        times = self.settings.frame.times
        indices = chosen.indices + chosen.indices[-1:] * (-len(chosen.indices) % times)
        seconds = [index / chosen.clip.rate for index in indices]
        return [(seconds[at] + seconds[at + times - 1]) / 2 for at in range(0, len(seconds), times)]


class PreparedVideo:
    """One video of the family, opened."""

    def __init__(
        self,
        videos: Videos,
        chosen: _Chosen,
        small: Mapping[str, NDArray[Any]],
        meta: ItemMeta,
        *,
        decode_ns: int,
    ) -> None:
        self.meta = meta
        self.decode_ns = decode_ns
        self._videos = videos
        self._chosen = chosen
        self._small = small
        self._tables = videos.tables[meta.fields[0].dtype]

    def fill(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Decode, resize and write frame by frame; see :meth:`mmprep_worker.models.family.Prepared.fill`."""
        for name, array in self._small.items():
            tensors[name][...] = array
        settings = self._videos.settings.frame
        _, down, across = self._chosen.grid
        patches = tensors["pixel_values_videos"].reshape(-1, 3, settings.times, settings.patch, settings.patch)
        last = len(self._chosen.indices) - 1
        done = 0
        for done, pixels in enumerate(self._frames(), start=1):
            pair, at = divmod(done - 1, settings.times)
            write_patches(
                self._videos.resampler,
                pixels,
                (down, across),
                merge=settings.merge,
                out=patches[pair * down * across : (pair + 1) * down * across],
                tables=self._tables,
                times=range(at, settings.times if done - 1 == last else at + 1),
            )
        if done != last + 1:
            raise DecodeError("the video is broken: it has fewer frames than were counted")

    def _frames(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames that are taken, and count the time that decoding them takes."""
        frames = self._chosen.clip.frames(self._chosen.indices)
        while True:
            started = time.monotonic_ns()
            pixels = next(frames, None)
            self.decode_ns += time.monotonic_ns() - started
            if pixels is None:
                return
            yield pixels
