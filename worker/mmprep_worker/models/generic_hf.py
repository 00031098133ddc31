"""Any other model with pictures: its own Hugging Face processor, run on one picture at a time.

The fields are whatever the processor returns beside the text; the expansion is what its text path makes of the
placeholder alone. This needs transformers in the lane and decodes while opening, since only the processor knows the
shapes; families that matter deserve a kernel of their own.

Pictures are given to the processor as RGB, with transparency on the background colour: on white, transformers'
processors would do the same.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmprep.card import ModelCard, Placeholder
from mmprep.errors import DecodeError, InvalidRequest, StartupError
from mmprep.items import FieldSpec, ItemMeta, Plan, Run, lay_out
from mmprep_worker.images.decode import Background, Picture, open_picture
from mmprep_worker.images.tables import cast
from mmprep_worker.models.family import ItemOptions, Prepared

#: ``auto`` is the first.
DTYPES = ("float32", "bfloat16", "float16")
_TEXT = frozenset({"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"})
#: Pictures that the start tries: what the plan says of their headers must be what processing them gives.
_PROBES = ((64, 48), (333, 777), (640, 480))


def load_generic(
    model_dir: Path,
    config: Mapping[str, Any],
    *,
    fingerprint: Callable[..., bytes],
    max_image_pixels: int,
    background: Background,
) -> GenericFamily:
    """Return the family of a model that has no kernel of its own.

    Parameters
    ----------
    model_dir:
        In Hugging Face layout.
    config:
        Its ``config.json``.
    fingerprint:
        :func:`mmprep_worker.models.registry.fingerprint`.
    max_image_pixels, background:
        As for :func:`mmprep_worker.models.registry.load_family`.

    Raises
    ------
    StartupError
        The processor is missing or broken, takes no pictures, or needs torch.
    """
    from transformers import AutoProcessor  # noqa: PLC0415, slow to import and large

    kind = config.get("model_type", "unknown")
    try:
        load: Any = AutoProcessor.from_pretrained
        processor = load(model_dir, local_files_only=True)
        family = GenericFamily(
            processor, str(kind), fingerprint=fingerprint, max_image_pixels=max_image_pixels, background=background
        )
    except ImportError as error:
        missing = next((name for name in ("torchvision", "torch") if name in str(error).lower()), "a missing package")
        raise StartupError(
            f"MODEL: the processor of model type {kind!r} needs {missing}, which mmprep does not use; "
            "only processors that run on numpy and Pillow can be served"
        ) from None
    except StartupError:
        raise
    except Exception as error:
        raise StartupError(
            f"MODEL: the processor of model type {kind!r} does not load or run ({type(error).__name__}); check "
            "processor_config.json, preprocessor_config.json and the tokenizer's files"
        ) from error
    return family


class GenericFamily:
    """A model behind its own processor.

    Parameters
    ----------
    processor:
        As ``AutoProcessor`` gives it, with a tokenizer and an image processor.
    model_type:
        Of ``config.json``.
    """

    def __init__(
        self,
        processor: Any,
        model_type: str,
        *,
        fingerprint: Callable[..., bytes],
        max_image_pixels: int,
        background: Background,
    ) -> None:
        self.processor = processor
        token = getattr(processor, "image_token", None)
        if not isinstance(token, str) or getattr(processor, "image_processor", None) is None:
            raise StartupError(
                f"MODEL: the processor of model type {model_type!r} names no image token or has no image processor; "
                "models without pictures have nothing to preprocess"
            )
        self._token = token
        token_id = int(processor.tokenizer.convert_tokens_to_ids(token))
        self._token_id = token_id
        self._max_image_pixels = max_image_pixels
        self._background = background
        self._counts = self._counts_from_headers()
        self.card = ModelCard(
            family=f"hf:{model_type}",
            fingerprint=fingerprint(
                processor=type(processor).__name__,
                image_processor=type(processor.image_processor).__name__,
                config=processor.image_processor.to_dict(),
                options=processor.to_dict(),
                token=[token, token_id],
            ),
            placeholders=(Placeholder("image", token, token_id, token),),
            dtypes={"image": DTYPES},
            normalization={},
        )

    def plan(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Plan:
        """Return one picture's plan: from its header where the processor can count, else by processing it."""
        picture = self._open(modality, medium, options)
        if self._counts:
            return Plan((Run(self._token_id, self._count(picture.width, picture.height)),))
        return self._process(self._image(picture))[0]

    def open(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Prepared:
        """Decode and process one picture.

        Raises
        ------
        mmprep.errors.InvalidRequest
            A modality or dtype that is not on the card.
        mmprep.errors.MediaError
            The picture is broken, too large, or refused by the processor.
        """
        started = time.monotonic_ns()
        image = self._image(self._open(modality, medium, options))
        decode_ns = time.monotonic_ns() - started
        plan, arrays = self._process(image)
        named = {name: (_storage(array, options.dtype), array) for name, array in arrays.items()}
        specs = lay_out((name, dtype, array.shape, "batched", False) for name, (dtype, array) in named.items())
        return PreparedArrays(ItemMeta("image", plan, specs, {}), arrays, decode_ns)

    def _open(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Picture:
        if modality != "image":
            raise InvalidRequest(f"this model takes pictures here, not {modality}")
        if options.dtype not in DTYPES:
            raise InvalidRequest(f"mm_dtype {options.dtype!r} is not one of {', '.join(DTYPES)}", param="mm_dtype")
        return open_picture(medium, max_pixels=self._max_image_pixels)

    def _image(self, picture: Picture) -> Image.Image:
        return Image.fromarray(picture.rgb(self._background))

    def _process(self, image: Image.Image) -> tuple[Plan, dict[str, NDArray[Any]]]:
        """Return the plan of one picture, and the processor's arrays without their batch dimension."""
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow's and the processor's remarks on single pictures
                returned = self.processor(
                    images=[image], text=self._token, add_special_tokens=False, return_tensors="np"
                )
        except (ValueError, ZeroDivisionError, IndexError) as error:
            raise DecodeError(
                f"the model's processor refuses a picture of {image.width} by {image.height} pixels "
                f"({type(error).__name__}); send one of another size or shape"
            ) from None
        ids = np.asarray(returned["input_ids"])[0]
        embed = self._marks(ids) == 1
        arrays = {name: _first(name, value) for name, value in returned.items() if name not in _TEXT}
        return _run_lengths(ids.tolist(), embed.tolist()), arrays

    def _marks(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Return the modality of each position, 1 for pictures, as the processor itself marks them where it does."""
        if hasattr(self.processor, "create_mm_token_type_ids"):
            return np.asarray(self.processor.create_mm_token_type_ids([ids.tolist()])[0])
        return np.asarray(ids == self._token_id, np.int64)

    def _count(self, width: int, height: int) -> int:
        counted = self.processor._get_num_multimodal_tokens(image_sizes=[[height, width]])  # noqa: SLF001, transformers' seam for engines
        return int(counted["num_image_tokens"][0])

    def _counts_from_headers(self) -> bool:
        """Whether the processor can count tokens by size alone, as processing the probes confirms.

        Processing them also shows, before the first request, whether the processor needs what is not installed.
        """
        able = hasattr(self.processor, "_get_num_multimodal_tokens")
        for width, height in _PROBES:
            plan, _ = self._process(Image.new("RGB", (width, height), (120, 90, 60)))
            if able:
                able = plan == Plan((Run(self._token_id, self._count(width, height)),))
        return able


class PreparedArrays:
    """One picture, processed already: filling is a copy."""

    def __init__(self, meta: ItemMeta, arrays: Mapping[str, NDArray[Any]], decode_ns: int) -> None:
        self.meta = meta
        self.decode_ns = decode_ns
        self._arrays = arrays

    def fill(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Copy the tensors, rounded to their dtypes; see :meth:`mmprep_worker.models.family.Prepared.fill`."""
        for spec in self.meta.fields:
            tensors[spec.name][...] = _converted(self._arrays[spec.name], spec)


def _first(name: str, value: Any) -> NDArray[Any]:
    """Return the one item of a batch."""
    array: NDArray[Any] = np.asarray(value)
    if array.ndim == 0 or array.shape[0] != 1 or array.dtype.kind not in "fiub":
        raise StartupError(
            f"MODEL: the processor's output {name!r} is not one numeric array a picture; this model needs a family of "
            "its own"
        )
    item: NDArray[Any] = array[0]
    return item


def _storage(array: NDArray[Any], dtype: str) -> str:
    """Return an output's dtype: floats are of the chosen one, whole numbers keep theirs in 64 bits."""
    if array.dtype.kind == "f":
        return dtype
    return {"b": "bool"}.get(array.dtype.kind, "uint8" if array.dtype == np.uint8 else "int64")


def _converted(array: NDArray[Any], spec: FieldSpec) -> NDArray[Any]:
    return cast(array.astype(np.float32), spec.dtype) if array.dtype.kind == "f" else array


def _run_lengths(ids: list[int], embed: list[bool]) -> Plan:
    runs = itertools.groupby(zip(ids, embed, strict=True))
    return Plan(tuple(Run(token_id, len(list(group)), embeds) for (token_id, embeds), group in runs))
