"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: an exact processor of pictures that needs neither torch nor transformers.

A picture is resized to multiples of the patch group's side within a range of pixels (:func:`.smart_resize`), normalised,
cut into patches and flattened; one placeholder becomes one id for each group of patches. The reference is transformers'
``Qwen2VLImageProcessorPil``; float32 equals it to the bit, uint8 holds the resized pixels in the same layout.

Videos are in :mod:`.qwen2_vl_video`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmprep.arguments import read_chosen
from mmprep.card import Embeds, FieldForm, ItemOptions, ModelCard, Placeholder
from mmprep.errors import InvalidRequest, StartupError
from mmprep.items import ItemMeta, Normalization, Plan, Run, lay_out
from mmprep_worker.images.decode import Background, Picture, open_picture
from mmprep_worker.images.patches import write_patches
from mmprep_worker.images.resample import Resampler, make_resampler
from mmprep_worker.images.tables import lookup_tables
from mmprep_worker.models.family import MediaLimits, Prepared
from mmprep_worker.models.qwen2_vl_arguments import picture_arguments, resized_by
from mmprep_worker.models.qwen2_vl_injected import check_picture, check_video
from mmprep_worker.models.qwen2_vl_settings import DTYPES, Settings, smart_resize
from mmprep_worker.models.qwen2_vl_video import Videos

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


class Qwen2VLFamily:
    """The family, for one model directory.

    Parameters
    ----------
    settings:
        Of :func:`.qwen2_vl_settings.read_settings`.
    placeholder:
        The image token, its id, and the text a template needs in place of a picture.
    fingerprint:
        Of the card.
    limits:
        Of one medium.
    background:
        What transparency is put on.
    videos:
        ``None`` where the model takes none.
    embeds_width:
        Of the embedding of one group of patches; ``None``: pictures that are embedded already are not taken.
    """

    def __init__(
        self,
        settings: Settings,
        placeholder: Placeholder,
        *,
        fingerprint: bytes,
        limits: MediaLimits,
        background: Background,
        videos: Videos | None = None,
        embeds_width: int | None = None,
    ) -> None:
        if settings.factor > 4096:
            raise StartupError("preprocessor_config.json: patch_size times merge_size is above 4096; correct it")
        self.settings = settings
        self.videos = videos
        run = settings.times * settings.patch**2
        self.normalization = Normalization("pixel_values", settings.scale, settings.mean, settings.std, run)
        placeholders: tuple[Placeholder, ...] = (placeholder,)
        normalization = {"image": self.normalization}
        arguments = {"image": picture_arguments(settings, limits)}
        if videos is not None:
            arguments["video"] = videos.arguments
        fields: dict[str, tuple[FieldForm, ...]] = {
            "image": (
                FieldForm("pixel_values", DTYPES, (None, settings.width), "flat", False),
                FieldForm("image_grid_thw", ("int64",), (3,), "batched", True),
            )
        }
        if videos is not None:
            fields["video"] = videos.fields
            placeholders = (placeholder, videos.placeholder)
            normalization["video"] = videos.normalization
        self.card = ModelCard(
            family="qwen2_vl",
            fingerprint=fingerprint,
            placeholders=placeholders,
            dtypes=dict.fromkeys(normalization, DTYPES),
            normalization=normalization,
            embeds={}
            if embeds_width is None
            else {"image": Embeds("image_embeds", embeds_width, "image_grid_thw", settings.merge)},
            arguments=arguments,
            fields=fields,
        )
        self.resampler: Resampler = make_resampler()
        self.tables = {dtype: lookup_tables(settings.scale, settings.mean, settings.std, dtype) for dtype in DTYPES}
        self._token_id = placeholder.token_id
        self._limits = limits
        self.background = background
        self._warm()

    def _warm(self) -> None:
        """Write one black pixel in every dtype, so that compiling is over before the first request."""
        settings = self.settings
        for tables in self.tables.values():
            shape = (settings.merge**2, 3, settings.times, settings.patch, settings.patch)
            out = np.empty(shape, tables.dtype)
            grid = (settings.merge, settings.merge)
            write_patches(
                self.resampler, np.zeros((1, 1, 3), np.uint8), grid, merge=settings.merge, out=out, tables=tables
            )

    def plan(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Plan:
        """Return the plan of one medium: a picture's from its header, a video's as :meth:`Videos.plan`."""
        if modality == "video" and self.videos is not None:
            return self.videos.plan(medium, options)
        return self._plan(self._grid(self._open(modality, medium), options))

    def check_injected(self, modality: str, plan: Plan, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Check a picture's or video's grid, rows and expansion; see :meth:`Family.check_injected <.family.Family.check_injected>`."""
        if modality == "video" and self.videos is not None:
            check_video(plan, tensors, self.videos.settings.frame.merge)
        else:
            check_picture(plan, tensors, self.settings.merge)

    def open(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Prepared:
        """Read one picture's header, or open a video, as :meth:`Videos.open`.

        Raises
        ------
        mmprep.errors.InvalidRequest
            A modality, dtype or argument that is not on the card, or a picture of a shape that the model does not take.
        mmprep.errors.MediaError
            As :func:`mmprep_worker.images.decode.open_picture`.
        """
        if modality == "video" and self.videos is not None:
            return self.videos.open(medium, options)
        started = time.monotonic_ns()
        picture = self._open(modality, medium)
        decode_ns = time.monotonic_ns() - started
        if options.dtype not in DTYPES:
            raise InvalidRequest(f"mm_dtype {options.dtype!r} is not one of {', '.join(DTYPES)}", param="mm_dtype")
        grid = self._grid(picture, options)
        count = grid[0] * grid[1]
        meta = ItemMeta(
            modality="image",
            plan=self._plan(grid),
            fields=lay_out(
                [
                    ("pixel_values", options.dtype, (count, self.settings.width), "flat", False),
                    ("image_grid_thw", "int64", (3,), "batched", True),
                ]
            ),
            cpu={"image_grid_thw": np.array([1, *grid], "<i8").tobytes()},
            normalization=self.normalization,
        )
        return PreparedPicture(self, picture, grid, options.dtype, meta, decode_ns=decode_ns)

    def _open(self, modality: str, medium: bytes | memoryview) -> Picture:
        if modality != "image":
            raise InvalidRequest(f"this model takes pictures here, not {modality}")
        return open_picture(medium, max_pixels=self._limits.image_pixels)

    def _grid(self, picture: Picture, options: ItemOptions) -> tuple[int, int]:
        settings = resized_by(self.settings, read_chosen(self.card.arguments["image"], options.kwargs))
        height, width = smart_resize(picture.height, picture.width, settings)
        return height // self.settings.patch, width // self.settings.patch

    def _plan(self, grid: tuple[int, int]) -> Plan:
        return Plan((Run(self._token_id, grid[0] * grid[1] // self.settings.merge**2),))


class PreparedPicture:
    """One picture of the family, opened."""

    def __init__(
        self,
        family: Qwen2VLFamily,
        picture: Picture,
        grid: tuple[int, int],
        dtype: str,
        meta: ItemMeta,
        *,
        decode_ns: int,
    ) -> None:
        self.meta = meta
        self.decode_ns = decode_ns
        self._family = family
        self._picture = picture
        self._grid = grid
        self._dtype = dtype

    def fill(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Decode, resize and write; see :meth:`mmprep_worker.models.family.Prepared.fill`."""
        settings = self._family.settings
        started = time.monotonic_ns()
        pixels = self._picture.rgb(self._family.background)
        self.decode_ns += time.monotonic_ns() - started
        tensors["image_grid_thw"][:] = (1, *self._grid)
        patches = tensors["pixel_values"].reshape(-1, 3, settings.times, settings.patch, settings.patch)
        write_patches(
            self._family.resampler,
            pixels,
            self._grid,
            merge=settings.merge,
            out=patches,
            tables=self._family.tables[self._dtype],
        )
