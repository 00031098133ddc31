"""Any other model with pictures or recordings: its own Hugging Face processor, run on one medium at a time.

The fields are whatever the processor returns beside the text; the expansion is what its text path makes of the
placeholder alone. This needs transformers in the lane and decodes while opening, since only the processor knows the
shapes; families that matter deserve a kernel of their own. What the processor is given is a matter of
:mod:`.generic_media`.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmprep.arguments import Value, read_chosen
from mmprep.card import FieldForm, ItemOptions, ModelCard, Placeholder, unpack_io
from mmprep.errors import DecodeError, InvalidRequest, StartupError
from mmprep.items import FieldSpec, ItemMeta, Plan, Run, lay_out
from mmprep_worker.images.decode import Background
from mmprep_worker.images.tables import cast
from mmprep_worker.models.family import MediaLimits, Prepared
from mmprep_worker.models.generic_media import PROBES, Pictures, Taken, taken_by
from mmprep_worker.models.injected import embeds

#: ``auto`` is the first.
DTYPES = ("float32", "bfloat16", "float16")
_TEXT = frozenset({"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"})
_NAMES = {"image": "pictures", "audio": "recordings"}


def load_generic(
    model_dir: Path,
    config: Mapping[str, Any],
    *,
    fingerprint: Callable[..., bytes],
    limits: MediaLimits,
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
    limits, background:
        As for :func:`mmprep_worker.models.registry.load_family`.

    Raises
    ------
    StartupError
        The processor is missing or broken, takes neither pictures nor recordings, or needs torch.
    """
    from transformers import AutoProcessor  # noqa: PLC0415, slow to import and large

    kind = config.get("model_type", "unknown")
    try:
        load: Any = AutoProcessor.from_pretrained
        processor = load(model_dir, local_files_only=True)
        family = GenericFamily(processor, str(kind), fingerprint=fingerprint, limits=limits, background=background)
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
        As ``AutoProcessor`` gives it, with a tokenizer and an image processor, a feature extractor, or both.
    model_type:
        Of ``config.json``.
    """

    def __init__(
        self,
        processor: Any,
        model_type: str,
        *,
        fingerprint: Callable[..., bytes],
        limits: MediaLimits,
        background: Background,
    ) -> None:
        self.processor = processor
        taken = taken_by(processor, limits, background)
        if not taken:
            raise StartupError(
                f"MODEL: the processor of model type {model_type!r} names no image or audio token, or has nothing that "
                "works on such media; models without pictures and recordings have nothing to preprocess"
            )
        self._taken = {one.modality: one for one in taken}
        self._ids = {one.modality: int(processor.tokenizer.convert_tokens_to_ids(one.token)) for one in taken}
        #: What the probes of each modality became.
        self._probed: dict[str, list[_Probed]] = {}
        self._counts = self._try_probes()
        self.card = ModelCard(
            family=f"hf:{model_type}",
            fingerprint=fingerprint(
                processor=type(processor).__name__,
                parts={one.modality: one.deciding for one in taken},
                options=processor.to_dict(),
                tokens=[[one.token, self._ids[one.modality]] for one in taken],
            ),
            placeholders=tuple(
                Placeholder(one.modality, one.token, self._ids[one.modality], one.token) for one in taken
            ),
            dtypes=dict.fromkeys(self._taken, DTYPES),
            normalization={},
            arguments={one.modality: one.arguments for one in taken if one.arguments},
            fields={modality: _forms(probed) for modality, probed in self._probed.items()},
        )

    def check_injected(self, modality: str, plan: Plan, tensors: Mapping[str, NDArray[Any]]) -> None:  # noqa: ARG002, the seam
        """Check the length of the expansion, where it is the same for all media.

        See :meth:`Family.check_injected <.family.Family.check_injected>`. What else hangs together only the processor knows.
        """
        counts = {probed.embeds for probed in self._probed[modality]}
        fixed = len(counts) == 1 and len(self._probed[modality]) > 1
        if embeds(plan) < 1 or (fixed and embeds(plan) not in counts):
            wanted = f"{min(counts)}" if fixed else "at least one"
            raise InvalidRequest(
                f"{embeds(plan)} positions of the expansion take an embedding; give {wanted}", param="expansion"
            )

    def plan(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Plan:
        """Return one medium's plan: from its header where the processor can count, else by processing it."""
        taken, chosen = self._one(modality, options)
        if self._counts and not chosen and isinstance(taken, Pictures):
            picture = taken.opened(medium)
            return Plan((Run(self._ids[modality], self._count(picture.width, picture.height)),))
        return self._process(taken, *taken.inputs(medium, chosen))[0]

    def open(self, modality: str, medium: bytes | memoryview, options: ItemOptions) -> Prepared:
        """Decode and process one medium.

        Raises
        ------
        mmprep.errors.InvalidRequest
            A modality, dtype or argument that is not on the card, or a medium of which the processor makes nothing.
        mmprep.errors.MediaError
            The medium is broken, too large, or refused by the processor.
        """
        taken, chosen = self._one(modality, options)
        started = time.monotonic_ns()
        inputs, words = taken.inputs(medium, chosen)
        decode_ns = time.monotonic_ns() - started
        plan, arrays = self._process(taken, inputs, words)
        named = {name: (_storage(array, options.dtype), array) for name, array in arrays.items()}
        specs = lay_out((name, dtype, array.shape, "batched", False) for name, (dtype, array) in named.items())
        return PreparedArrays(ItemMeta(modality, plan, specs, {}), arrays, decode_ns)

    def _one(self, modality: str, options: ItemOptions) -> tuple[Taken, dict[str, Value]]:
        """Return the modality, and what was chosen about it."""
        if modality not in self._taken:
            raise InvalidRequest(f"this model takes {_NAMES[min(self._taken)]} here, not {modality}")
        if options.dtype not in DTYPES:
            raise InvalidRequest(f"mm_dtype {options.dtype!r} is not one of {', '.join(DTYPES)}", param="mm_dtype")
        for name in unpack_io(options.io):
            raise InvalidRequest(
                f"{_NAMES[modality]} can't be read with {name[:64]!r}; leave it out", param="media_io_kwargs"
            )
        taken = self._taken[modality]
        return taken, read_chosen(taken.arguments, options.kwargs)

    def _process(self, taken: Taken, inputs: dict[str, Any], words: str) -> tuple[Plan, dict[str, NDArray[Any]]]:
        """Return the plan of one medium, and the processor's arrays without their batch dimension."""
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow's and the processor's remarks on single media
                returned = self.processor(text=taken.token, add_special_tokens=False, return_tensors="np", **inputs)
        except (ValueError, ZeroDivisionError, IndexError) as error:
            raise DecodeError(
                f"the model's processor refuses {words} ({type(error).__name__}); send one of another size or shape"
            ) from None
        ids = np.asarray(returned["input_ids"])[0]
        embed = self._marks(taken, ids) == taken.mark
        if not embed.any():
            raise InvalidRequest(f"the model's processor makes nothing of {words}; send a longer or larger one")
        arrays = {name: _first(name, value) for name, value in returned.items() if name not in _TEXT}
        return _run_lengths(ids.tolist(), embed.tolist()), arrays

    def _marks(self, taken: Taken, ids: NDArray[Any]) -> NDArray[Any]:
        """Return the modality of each position, as the processor itself marks them where it does."""
        if hasattr(self.processor, "create_mm_token_type_ids"):
            return np.asarray(self.processor.create_mm_token_type_ids([ids.tolist()])[0])
        return np.where(ids == self._ids[taken.modality], taken.mark, 0)

    def _count(self, width: int, height: int) -> int:
        counted = self.processor._get_num_multimodal_tokens(image_sizes=[[height, width]])  # noqa: SLF001, transformers' seam for engines
        return int(counted["num_image_tokens"][0])

    def _try_probes(self) -> bool:
        """Whether the processor can count a picture's tokens by its size alone, as processing the probes confirms.

        Processing them also shows, before the first request, whether the processor needs what is not installed.
        """
        able = hasattr(self.processor, "_get_num_multimodal_tokens")
        for taken in self._taken.values():
            made = [self._process(taken, inputs, "a probe") for inputs in taken.probes()]
            plans = [plan for plan, _ in made]
            self._probed[taken.modality] = [_probed(plan, arrays) for plan, arrays in made]
            if able and taken.modality == "image":
                counted = (self._count(width, height) for width, height in PROBES)
                able = plans == [Plan((Run(self._ids["image"], count),)) for count in counted]
        return able


class _Probed(NamedTuple):
    """What a probe became: how many of its ids take an embedding, and dtypes and shapes of its arrays."""

    embeds: int
    arrays: dict[str, tuple[tuple[str, ...], tuple[int, ...]]]


def _probed(plan: Plan, arrays: Mapping[str, NDArray[Any]]) -> _Probed:
    dtypes = {name: DTYPES if array.dtype.kind == "f" else (_storage(array, ""),) for name, array in arrays.items()}
    return _Probed(embeds(plan), {name: (dtypes[name], array.shape) for name, array in arrays.items()})


def _forms(probed: Sequence[_Probed]) -> tuple[FieldForm, ...]:
    """Return what fields are like, by what they have in common; extents that differ, or of which one is known, are free."""
    forms = []
    for name, (dtypes, first) in probed[0].arrays.items():
        shapes = [one.arrays[name][1] for one in probed]
        same = len(shapes) > 1
        shape = tuple(
            extent if same and all(len(s) == len(first) and s[axis] == extent for s in shapes) else None
            for axis, extent in enumerate(first)
        )
        forms.append(FieldForm(name, dtypes, shape, "batched", False))
    return tuple(forms)


class PreparedArrays:
    """One medium, processed already: filling is a copy."""

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
            f"MODEL: the processor's output {name!r} is not one numeric array a medium; this model needs a family of "
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
