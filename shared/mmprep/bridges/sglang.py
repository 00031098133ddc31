"""Items in the forms of SGLang 0.5.23: what its multimodal processors return, and what its ``Engine`` takes as processed.

Theory of operation: SGLang keeps a prompt's media in its prefix cache by *pad values*, numbers above all token ids that stand
in the place of an item's placeholders. They are derived from the item's hash, so equal pictures are found again. Here the
hash is the item's own (``mm_hashes``), and SGLang need not read the tensors for one.

- ``offsets`` are ranges of positions that take an embedding, first and last, both included.
- ``hash`` is the first 64 bits of the item's 256, ``identity`` all of them; the four ``pad_values`` come from the identity.
- ``feature`` is the tensor of pixels or of sound; other fields are in ``model_specific_data``.

Source: ``MultimodalDataItem``, ``MultimodalProcessorOutput`` and ``_compute_pad_values`` in
``sglang/srt/managers/schedule_batch.py``; ``collect_mm_items_from_processor_output`` in ``…/multimodal/processors/base_processor.py``.

The tensors are given beside the items, since who calls knows for how long they must live. SGLang moves them between its
processes after the call: give it copies (:func:`mmprep.bridges.torch.materialize` or ``to_device``), not what a view lends.
Its processors have tensors of torch; arrays are for where only the forms matter.
SGLang's package is imported where it is installed and only when a function is called; elsewhere there are dictionaries.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from mmprep.errors import InvalidRequest
from mmprep.item import Item

#: Fields that are an item's ``feature``.
FEATURES = frozenset({"pixel_values", "pixel_values_videos", "audio_features", "input_features"})
#: The field of a picture that came embedded already.
EMBEDDINGS = "image_embeds"
#: What ``MultimodalProcessorOutput`` calls the id of a modality's placeholder.
_TOKEN_IDS = {"image": "im_token_id", "video": "video_token_id", "audio": "audio_token_id"}

_PAD_TAG = b"sglang-mm-wide-pad-v1"
_PAD_START = 1_000_000
_PAD_MASK = (1 << 62) - 1

Fields = Mapping[str, Any]


class Request(Protocol):
    """A job of a queue, or a client's result."""

    @property
    def items(self) -> Mapping[str, Sequence[Item]]:
        """By modality, in the order of the prompt."""

    @property
    def token_ids(self) -> Any:
        """The prompt, placeholders expanded."""


def offsets(item: Item) -> list[tuple[int, int]]:
    """Return the first and the last position of each run of positions that take an embedding of ``item``."""
    if item.is_embed is None:
        return [(item.offset, item.offset + item.length - 1)]
    runs = []
    for embeds, run in groupby(enumerate(item.is_embed, item.offset), key=lambda place: place[1]):
        places = [place for place, _ in run]
        if embeds:
            runs.append((places[0], places[-1]))
    return runs


def pad_values(identity: bytes) -> tuple[int, int, int, int]:
    """Return the numbers that stand for an item in SGLang's prompts, by turns.

    Parameters
    ----------
    identity:
        32 bytes: the item's hash.
    """
    digest = hashlib.sha256(_PAD_TAG + identity).digest()
    first, second, third, fourth = (
        _PAD_START + (int.from_bytes(digest[start : start + 8], "big") & _PAD_MASK) for start in range(0, 32, 8)
    )
    return first, second, third, fourth


def to_mm_item(item: Item, tensors: Fields) -> Any:
    """Return an item as a ``MultimodalDataItem``, with its hash, pad values and offsets.

    Parameters
    ----------
    tensors:
        The item's, by field name; floats, tensors of torch or arrays (bfloat16 ones as tensors of torch).

    Returns
    -------
    The object, where SGLang is installed; else a dictionary of its attributes, in which ``modality`` and ``format`` are names.

    Raises
    ------
    InvalidRequest
        The pixels are not normalised, or are bit patterns.
    """
    fields = _batched(item, tensors)
    embeddings = fields.pop(EMBEDDINGS, None)
    feature = next((fields.pop(name) for name in sorted(FEATURES & fields.keys())), None)
    identity = bytes.fromhex(item.hash)
    values = pad_values(identity)
    plain = {
        "modality": item.modality.upper(),
        "format": "PROCESSOR_OUTPUT" if embeddings is None else "PRECOMPUTED_EMBEDDING",
        "hash": int.from_bytes(identity[:8], "big"),
        "identity": identity,
        "pad_value": values[0],
        "pad_values": values,
        "offsets": offsets(item),
        "feature": feature,
        "precomputed_embeddings": embeddings,
        "model_specific_data": fields,
    }
    if not _installed():
        return plain
    from sglang.srt.managers.schedule_batch import MultimodalDataItem  # noqa: PLC0415 -- an engine's package
    from sglang.srt.multimodal.modality import Modality, MultimodalInputFormat  # noqa: PLC0415 -- as above

    named = {"modality": Modality[plain["modality"]], "format": MultimodalInputFormat[plain["format"]]}
    own = {name: plain[name] for name in ("offsets", "feature", "precomputed_embeddings", "model_specific_data")}
    made = MultimodalDataItem(**named, **own)
    made.set_identity(identity)  # its own derivation, whatever it is in this release
    return made


def to_processor_output(request: Request, tensors: Mapping[str, Sequence[Fields]]) -> Any:
    """Return a request as a ``MultimodalProcessorOutput``, as a multimodal processor of SGLang returns it.

    Parameters
    ----------
    request:
        A job or a result.
    tensors:
        Of each item, by modality and in the order of the items.

    Returns
    -------
    The object, where SGLang is installed, else a dictionary: ``mm_items`` in the order of the prompt, ``input_ids``,
    ``padded_input_ids``, and ``im_token_id``, ``video_token_id``, ``audio_token_id`` of the modalities that are there.
    What depends on the model beyond that (``mrope_positions``: ``processor.compute_mrope_positions``) is to be added.

    Raises
    ------
    InvalidRequest
        As :func:`to_mm_item`.
    """
    pairs = [pair for modality, items in request.items.items() for pair in zip(items, tensors[modality], strict=True)]
    pairs.sort(key=lambda pair: pair[0].offset)
    made = [to_mm_item(item, of_item) for item, of_item in pairs]
    ids = [int(one) for one in request.token_ids]
    output: dict[str, Any] = {
        "mm_items": made,
        "input_ids": ids,
        "padded_input_ids": _padded(
            ids, [(offsets(item), pad) for (item, _), pad in zip(pairs, map(_pads, made), strict=True)]
        ),
        **{_TOKEN_IDS[item.modality]: _token_id(item) for item, _ in pairs},
    }
    if not _installed():
        return output
    from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput  # noqa: PLC0415 -- an engine's package

    return MultimodalProcessorOutput(**output)


def to_engine_arguments(request: Request, tensors: Mapping[str, Sequence[Fields]]) -> dict[str, Any]:
    """Return a request as arguments of ``sglang.Engine.generate``: ``input_ids``, and ``image_data`` and its like.

    SGLang takes one dictionary for each modality. Its items are joined, and SGLang takes them apart again, by ``offsets`` and
    grid. The hash of one item comes along; of several SGLang makes hashes of its own, from the tensors.

    Parameters
    ----------
    request, tensors:
        As for :func:`to_processor_output`.

    Raises
    ------
    InvalidRequest
        As :func:`to_mm_item`.
    """
    arguments: dict[str, Any] = {"input_ids": [int(one) for one in request.token_ids]}
    for modality, items in request.items.items():
        parts = [_batched(item, of_item) for item, of_item in zip(items, tensors[modality], strict=True)]
        joined = {name: _joined(items[0], name, [part[name] for part in parts]) for name in parts[0]}
        kind = "processor_output"
        if EMBEDDINGS in joined:
            kind, joined["feature"] = "precomputed_embedding", joined.pop(EMBEDDINGS)
        one = {"format": kind, **joined, "offsets": [run for item in items for run in offsets(item)]}
        if len(items) == 1:
            one["hash"] = int(items[0].hash[:16], 16)
        arguments[f"{modality}_data"] = [one]
    return arguments


# --- parts ------------------------------------------------------------------------------------------------------------


def _installed() -> bool:
    return importlib.util.find_spec("sglang") is not None


def _batched(item: Item, tensors: Fields) -> dict[str, Any]:
    """Return an item's tensors with the batch dimension that SGLang has in all of them; checked, not copied."""
    found = {}
    for spec in item.fields:
        tensor = tensors[spec.name]
        kind = str(tensor.dtype).removeprefix("torch.")
        if spec.name in FEATURES and kind == "uint8":
            raise InvalidRequest(
                "SGLang takes pixels as normalised floats: ask for mm_dtype float32, bfloat16 or float16, or give what "
                "mmprep.bridges.torch.normalized() or materialize(normalize=True) makes of them",
                param="tensors",
            )
        if spec.dtype == "bfloat16" and kind == "uint16":
            raise InvalidRequest(
                "NumPy has bfloat16 as bit patterns only: give tensors of mmprep.bridges.torch", param="tensors"
            )
        found[spec.name] = tensor[None] if spec.kind == "batched" else tensor
    return found


def _joined(item: Item, name: str, parts: list[Any]) -> Any:
    """Return a field of several items as one, as SGLang's processors return it."""
    kind = next(spec.kind for spec in item.fields if spec.name == name)
    if len(parts) == 1 or kind == "shared":
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    import torch  # noqa: PLC0415 -- whoever gives its tensors has it

    return torch.cat(parts)


def _pads(made: Any) -> Sequence[int]:
    values: Sequence[int] = made["pad_values"] if isinstance(made, dict) else made.padding_values()
    return values


def _padded(ids: list[int], items: Sequence[tuple[list[tuple[int, int]], Sequence[int]]]) -> list[int]:
    """Return the prompt with an item's pad values, by turns from the start of each run, in the place of its placeholders."""
    padded = list(ids)
    for runs, values in items:
        for first, last in runs:
            padded[first : last + 1] = [values[place % len(values)] for place in range(last - first + 1)]
    return padded


def _token_id(item: Item) -> int:
    return next(run.token_id for run in item.meta.plan.runs if run.embed)
