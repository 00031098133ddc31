"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, pictures: an exact processor that needs neither torch nor transformers.

A picture is resized to multiples of the patch group's side within a range of pixels (:func:`smart_resize`), normalised,
cut into patches and flattened; one placeholder becomes one id for each group of patches. The reference is transformers'
``Qwen2VLImageProcessorPil``; float32 equals it to the bit, uint8 holds the resized pixels in the same layout.

Only configurations that this code honours exactly are taken; :func:`read_settings` says no to others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mmprep.card import Embeds, ItemOptions, ModelCard, Placeholder
from mmprep.errors import InvalidRequest, StartupError
from mmprep.items import ItemMeta, Normalization, Plan, Run, lay_out
from mmprep_worker.images.decode import Background, Picture, open_picture
from mmprep_worker.images.patches import write_patches
from mmprep_worker.images.resample import Resampler, make_resampler
from mmprep_worker.images.tables import lookup_tables
from mmprep_worker.models.family import MediaLimits, Prepared

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
#: ``auto`` is the first.
DTYPES = ("uint8", "float32", "bfloat16", "float16")

_BICUBIC = 3
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
#: The reference's defaults; what a configuration leaves out is meant to be this.
_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "resample": _BICUBIC,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
    "do_convert_rgb": True,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "do_center_crop": None,
    "do_pad": None,
}
_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}


class Settings(msgspec.Struct, frozen=True):
    """How pictures are processed.

    Attributes
    ----------
    patch, merge, times: a patch's side in pixels, a group's side in patches, how often a picture is repeated in time.
    min_pixels, max_pixels: of the resized picture.
    scale, mean, std: normalising, ``(pixel * scale - mean) / std``.
    """

    patch: int
    merge: int
    times: int
    min_pixels: int
    max_pixels: int
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_settings(config: Mapping[str, Any]) -> Settings | None:
    """Return the settings that an image processor's configuration means, or ``None`` where this code can't honour it.

    Parameters
    ----------
    config:
        ``preprocessor_config.json``, or the ``image_processor`` section of ``processor_config.json``.
    """
    merged = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    wanted = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    if not all(merged[name] is True for name in wanted) or merged["do_center_crop"] or merged["do_pad"]:
        return None
    if merged["resample"] != _BICUBIC or config.get("image_processor_type", PROCESSORS[0]) not in PROCESSORS:
        return None
    size = dict(config.get("size") or _SIZE) if isinstance(config.get("size"), Mapping | None) else {}
    # The names of the first release win over ``size``, as in the reference's constructor.
    for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if config.get(old) is not None:
            size[new] = config[old]
        size.pop(old, None)
    if set(size) != set(_SIZE):
        return None
    plain = {
        "patch": merged["patch_size"],
        "merge": merged["merge_size"],
        "times": merged["temporal_patch_size"],
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
        "scale": merged["rescale_factor"],
        "mean": merged["image_mean"],
        "std": merged["image_std"],
    }
    try:
        settings = msgspec.convert(plain, Settings)
    except msgspec.ValidationError:
        return None
    natural = (settings.patch, settings.merge, settings.times, settings.min_pixels, settings.max_pixels)
    return settings if min(natural) > 0 and 0.0 not in settings.std else None


def embeds_width(config: Mapping[str, Any]) -> int | None:
    """Return the width of the embedding of one group of patches, ``None`` where the configuration does not tell.

    It is that of the text model; Qwen3-VL's vision model adds as much again for each level that it hands to deeper layers.

    Parameters
    ----------
    config:
        ``config.json``.
    """
    vision, text = config.get("vision_config") or {}, config.get("text_config") or config
    levels = vision.get("deepstack_visual_indexes")
    width = text.get("hidden_size") if levels is None else vision.get("out_hidden_size")
    return width * (1 + len(levels or ())) if isinstance(width, int) and width > 0 else None


def smart_resize(height: int, width: int, settings: Settings) -> tuple[int, int]:
    """Return the height and width, in pixels, that a picture is resized to, as the reference's function of that name.

    Raises
    ------
    InvalidRequest
        One side is more than 200 times the other, or the picture would have no room for a group of patches.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > 200:
        raise InvalidRequest(
            f"the picture is {width} by {height} pixels: one side is {ratio:.0f} times the other, and this model takes "
            "at most 200 times; crop it"
        )
    factor = settings.patch * settings.merge
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > settings.max_pixels:
        beta = math.sqrt((height * width) / settings.max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < settings.min_pixels:
        beta = math.sqrt(settings.min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    if not new_height or not new_width:
        raise InvalidRequest(f"the picture of {width} by {height} pixels is too small for this model; enlarge it")
    return new_height, new_width


class Qwen2VLFamily:
    """The family, for one model directory.

    Parameters
    ----------
    settings:
        Of :func:`read_settings`.
    placeholder:
        The image token, its id, and the text a template needs in place of a picture.
    fingerprint:
        Of the card.
    limits:
        Of one medium.
    background:
        What transparency is put on.
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
        embeds_width: int | None = None,
    ) -> None:
        if settings.patch * settings.merge > 4096:
            raise StartupError("preprocessor_config.json: patch_size times merge_size is above 4096; correct it")
        self.settings = settings
        run = settings.times * settings.patch**2
        self.normalization = Normalization("pixel_values", settings.scale, settings.mean, settings.std, run)
        self.card = ModelCard(
            family="qwen2_vl",
            fingerprint=fingerprint,
            placeholders=(placeholder,),
            dtypes={"image": DTYPES},
            normalization={"image": self.normalization},
            embeds={}
            if embeds_width is None
            else {"image": Embeds("image_embeds", embeds_width, "image_grid_thw", settings.merge)},
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

    def plan(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Plan:  # noqa: ARG002, the seam
        """Return the plan of one picture, from its header."""
        return self._plan(self._grid(self._open(modality, medium)))

    def open(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Prepared:
        """Read one picture's header.

        Raises
        ------
        mmprep.errors.InvalidRequest
            A modality or dtype that is not on the card, or a picture of a shape that the model does not take.
        mmprep.errors.MediaError
            As :func:`mmprep_worker.images.decode.open_picture`.
        """
        started = time.monotonic_ns()
        picture = self._open(modality, medium)
        decode_ns = time.monotonic_ns() - started
        if options.dtype not in DTYPES:
            raise InvalidRequest(f"mm_dtype {options.dtype!r} is not one of {', '.join(DTYPES)}", param="mm_dtype")
        grid = self._grid(picture)
        settings = self.settings
        count = grid[0] * grid[1]
        width = 3 * settings.times * settings.patch**2
        meta = ItemMeta(
            modality="image",
            plan=self._plan(grid),
            fields=lay_out(
                [
                    ("pixel_values", options.dtype, (count, width), "flat", False),
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

    def _grid(self, picture: Picture) -> tuple[int, int]:
        height, width = smart_resize(picture.height, picture.width, self.settings)
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
