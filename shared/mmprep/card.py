"""The model card: what a frontend must know of a model family, as data.

The worker's lanes know the family; the frontend knows none. It receives a card and expands any family's prompts by it.
"""

from __future__ import annotations

import msgspec

from mmprep.items import Normalization


class Placeholder(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The one token that stands for a medium in a rendered prompt.

    Attributes
    ----------
    modality: ``image``, ``video`` or ``audio``.
    token: its text, as the chat template writes it, ``<|image_pad|>``.
    token_id: its id.
    part_text: what a template that takes only strings needs in place of a medium, ``<|vision_start|><|image_pad|><|vision_end|>``.
    """

    modality: str
    token: str
    token_id: int
    part_text: str


class ModelCard(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the worker tells a frontend of the served model.

    Attributes
    ----------
    family: the worker's name for it, ``qwen2_vl``.
    fingerprint: digest of all that changes tensors: processor class and configuration, kernel and decoder versions.
    placeholders: one a modality that the model takes.
    dtypes: a modality's possible dtypes of its main tensor; the first is what ``auto`` means.
    normalization: a modality's constants, for those who receive uint8; may be empty.
    """

    family: str
    fingerprint: bytes
    placeholders: tuple[Placeholder, ...]
    dtypes: dict[str, tuple[str, ...]]
    normalization: dict[str, Normalization]

    def placeholder(self, modality: str) -> Placeholder | None:
        """Return the placeholder of ``modality``, or ``None`` where the model takes none of it."""
        return next((p for p in self.placeholders if p.modality == modality), None)
