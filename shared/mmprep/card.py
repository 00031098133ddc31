"""The model card: what a frontend must know of a model family, as data.

The worker's lanes know the family; the frontend knows none. It receives a card and expands any family's prompts by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeAlias

import msgspec

from mmprep.arguments import Argument
from mmprep.items import FieldKind, Normalization

_Text = Annotated[str, msgspec.Meta(max_length=64)]
_Packed = Annotated[bytes, msgspec.Meta(max_length=4096)]
_Whole = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
#: One value of ``media_io_kwargs``.
IoValue: TypeAlias = bool | _Whole | float | _Text | tuple[_Whole, ...] | None
#: What a request may choose about reading one medium: how many frames of a video are taken, say.
Io: TypeAlias = Annotated[dict[_Text, IoValue], msgspec.Meta(max_length=16)]

#: Patches.
LARGEST_SIDE = 1 << 20
_Side = Annotated[int, msgspec.Meta(ge=1, le=LARGEST_SIDE)]
#: Time, height and width of a medium, in patches.
Grid: TypeAlias = tuple[_Side, _Side, _Side]


class ItemOptions(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a request may choose for one medium. All of it is part of the item's key.

    Attributes
    ----------
    dtype: of the main tensor; one of the card's for the modality.
    io: how the medium is read, from :func:`pack_io`; empty where the request chose nothing.
    kwargs: how it is processed, from :func:`mmprep.arguments.choose`; empty where the request chose nothing.
    grid: of a medium that is embedded already, whose bytes :mod:`mmprep.embeddings` reads; ``None`` for all others.
    """

    dtype: _Text
    io: _Packed = b""
    kwargs: _Packed = b""
    grid: Grid | None = None


def pack_io(io: Mapping[str, IoValue]) -> bytes:
    """Return ``io`` as JSON, the same for equal choices; empty where nothing was chosen.

    JSON since the service's own messages have no place for floating-point numbers, of which some are no numbers.
    """
    return msgspec.json.encode(io, order="deterministic") if io else b""


def unpack_io(packed: bytes) -> dict[str, IoValue]:
    """Return what :func:`pack_io` packed; raises ``msgspec.MsgspecError`` for what it never packs."""
    return msgspec.json.decode(packed, type=Io) if packed else {}


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


class Embeds(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How a family takes media that somebody else has embedded already.

    Attributes
    ----------
    field: that holds the embeddings, one row a token, of shape (rows, ``width``): ``image_embeds``.
    width: of a row.
    grid: the field that tells time, height and width in patches, ``image_grid_thw``.
    merge: patches a token in each direction: the rows are ``prod(grid) / merge**2``.
    """

    field: str
    width: int
    grid: str
    merge: int


class FieldForm(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one tensor of an item is like, for whoever makes such items elsewhere.

    Attributes
    ----------
    name: of the field.
    dtypes: that it may have.
    shape: of one item's tensor; ``None`` where an extent differs from item to item.
    kind, keep_on_cpu: as :class:`mmprep.items.FieldSpec` has them.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int | None, ...]
    kind: FieldKind
    keep_on_cpu: bool


class ModelCard(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the worker tells a frontend of the served model.

    Attributes
    ----------
    family: the worker's name for it, ``qwen2_vl``.
    fingerprint: digest of all that changes tensors: processor class and configuration, kernel and decoder versions.
    placeholders: one a modality that the model takes.
    dtypes: a modality's possible dtypes of its main tensor; the first is what ``auto`` means.
    normalization: a modality's constants, for those who receive uint8; may be empty.
    embeds: how embedded media of a modality are taken; a modality that is not named takes none.
    arguments: what requests may choose about processing, by modality; one that is not named takes none.
    fields: exactly the fields of a modality's items, the main tensor first.
    """

    family: str
    fingerprint: bytes
    placeholders: tuple[Placeholder, ...]
    dtypes: dict[str, tuple[str, ...]]
    normalization: dict[str, Normalization]
    embeds: dict[str, Embeds] = {}
    arguments: dict[str, tuple[Argument, ...]] = {}
    fields: dict[str, tuple[FieldForm, ...]] = {}

    def placeholder(self, modality: str) -> Placeholder | None:
        """Return the placeholder of ``modality``, or ``None`` where the model takes none of it."""
        return next((p for p in self.placeholders if p.modality == modality), None)

    def dtype(self, modality: str, wanted: str) -> str | None:
        """Return the dtype in which a modality's main tensor comes where a request or the service wants ``wanted``.

        That is ``wanted`` itself, or, since uint8 is a matter of pixels, the modality's own default where only another
        modality comes in it. ``None``: none of the model's does.
        """
        dtypes = self.dtypes[modality]
        if wanted in dtypes:
            return wanted
        known = wanted == "auto" or any(wanted in others for others in self.dtypes.values())
        return dtypes[0] if known else None
