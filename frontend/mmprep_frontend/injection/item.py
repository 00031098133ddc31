"""From the body of an injection to an item that fits the model card, as far as it can be told without looking at values. Pure."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from mmprep.card import FieldForm, ModelCard
from mmprep.errors import InvalidRequest, TooLarge
from mmprep.injected import check_forms, pack_item
from mmprep.items import DTYPE_SIZES, FieldKind, ItemMeta, Plan, Run, lay_out, region_size
from mmprep.wire.codec import CONTROL_LIMIT
from mmprep_frontend.injection.body import Given, Injection

#: The largest packed metadata: an answer about an item has to fit into a control frame.
_MAX_METADATA = CONTROL_LIMIT - 2048


class PackedItem(NamedTuple):
    """An item, checked and packed for a lane.

    Attributes
    ----------
    length: of its range in a prompt.
    """

    modality: str
    frame: bytearray
    length: int


def pack(injection: Injection, card: ModelCard, max_bytes: int) -> PackedItem:
    """Return the item that a body describes.

    Parameters
    ----------
    injection:
        Whose token ids are the vocabulary's.
    max_bytes:
        Of its tensors, ``--max-media-size``.

    Raises
    ------
    InvalidRequest
        It is no item of this model; ``param`` names the place.
    TooLarge
        Its tensors or its metadata have too many bytes.
    """
    forms = card.fields.get(injection.modality)
    if forms is None:
        known = ", ".join(card.fields)
        raise InvalidRequest(f"this model has items of modality {known}", param="modality")
    names = [form.name for form in forms]
    if injection.fields.keys() != set(names):
        raise InvalidRequest(f"an item of this model has exactly the fields {', '.join(names)}", param="fields")
    for form in forms:
        _check_bytes(form.name, injection.fields[form.name])
    specs = lay_out(_laid_out(form, injection.fields[form.name]) for form in forms)
    if region_size(specs) > max_bytes:
        raise TooLarge(
            f"the tensors have {region_size(specs):,} bytes, above the limit of {max_bytes:,} (--max-media-size)",
            param="fields",
        )
    plan = _plan(injection, card)
    raw = {name: injection.fields[name].raw for name in names}
    small = {spec.name: bytes(raw[spec.name]) for spec in specs if spec.keep_on_cpu and spec.nbytes <= _MAX_METADATA}
    meta = ItemMeta(injection.modality, plan, specs, small, card.normalization.get(injection.modality), bytes(32))
    check_forms(card, meta)
    if len(meta.pack()) > _MAX_METADATA or any(spec.keep_on_cpu and spec.name not in small for spec in specs):
        raise TooLarge(
            "the fields that stay on the CPU and the runs of equal ids in the expansion are too many for one item",
            param="expansion",
        )
    return PackedItem(injection.modality, pack_item(meta, raw), plan.length)


def _check_bytes(name: str, given: Given) -> None:
    size = DTYPE_SIZES.get(given.dtype)
    if size is None:
        raise InvalidRequest(
            f"{given.dtype[:64]!r} is none of {', '.join(DTYPE_SIZES)}", param=f"fields.{name}.data[0]"
        )
    if math.prod(given.shape) * size != len(given.raw):
        raise InvalidRequest(
            f"{len(given.raw)} bytes are no tensor of shape {given.shape} and dtype {given.dtype}",
            param=f"fields.{name}.data",
        )


def _laid_out(form: FieldForm, given: Given) -> tuple[str, str, tuple[int, ...], FieldKind, bool]:
    kind = form.kind if given.kind is None else given.kind
    return (
        form.name,
        given.dtype,
        given.shape,
        kind,
        form.keep_on_cpu if given.keep_on_cpu is None else given.keep_on_cpu,
    )


def _plan(injection: Injection, card: ModelCard) -> Plan:
    placeholder = card.placeholder(injection.modality)
    assert placeholder is not None
    token_ids = injection.token_ids
    is_embed = injection.is_embed or [True] * len(token_ids)
    for position, (token_id, embeds) in enumerate(zip(token_ids, is_embed, strict=True)):
        if embeds != (token_id == placeholder.token_id):
            raise InvalidRequest(
                f"the positions that take an embedding have this model's {placeholder.token} "
                f"({placeholder.token_id}), and no others have it",
                param=f"expansion.token_ids[{position}]",
            )
    runs = itertools.groupby(zip(token_ids, is_embed, strict=True))
    return Plan(tuple(Run(token_id, len(list(group)), embeds) for (token_id, embeds), group in runs))
