"""The HTTP form of a rendered chat: one GenerateRequest, encoded; its tensors are encoded as they are sent."""

from __future__ import annotations

from typing import Any

from mmprep.address import Address, address_fields
from mmprep.segment import sibling_name
from mmprep_frontend.model import ServedModel
from mmprep_frontend.render.answer import features, generate_request, kwargs_data, mm_metadata
from mmprep_frontend.render.encodings import Encoding
from mmprep_frontend.render.written import Encoded, Packed
from mmprep_frontend.rendered import RenderedChat, RenderedItem


def encode_chat_answer(chat: RenderedChat, model: ServedModel, request_id: str, encoding: Encoding) -> Encoded:
    """Return the answer, encoded. Its tensors are those of the ring, until it is detached from them."""
    answer = generate_request(
        chat.request,
        request_id=request_id,
        model=model.name,
        token_ids=chat.expanded.token_ids,
        max_model_len=model.max_model_len,
        defaults=model.sampling,
        features=_features(chat),
        prompt_text=chat.prompt.text,
        token_offsets=chat.offsets,
    )
    return encoding.generate_request(answer)


def _features(chat: RenderedChat) -> dict[str, Any] | None:
    by_modality: dict[str, list[RenderedItem]] = {}
    for item in chat.in_order():
        by_modality.setdefault(item.part.modality, []).append(item)
    payload = chat.request.payload
    tensors = metadata = addresses = None
    if payload != "none":
        metadata = {m: [mm_metadata(i.meta, batch_size=len(items)) for i in items] for m, items in by_modality.items()}
    # Where addresses were asked for, tensors are only those that found no shared memory.
    if any(map(chat.travels, chat.items)):
        tensors = {m: [_tensors(chat, i, len(items)) for i in items] for m, items in by_modality.items()}
    if payload == "shm":
        addresses = {m: [_address(chat, i) for i in items] for m, items in by_modality.items()}
    return features(
        chat.expanded.ranges,
        {m: [i.key.hex() for i in items] for m, items in by_modality.items()},
        kwargs_data=tensors,
        mm_metadata=metadata,
        mm_addresses=addresses,
    )


def _tensors(chat: RenderedChat, item: RenderedItem, batch_size: int) -> Packed | None:
    """Return one item's tensors, packed; ``None`` where it has an address in their place."""
    if not chat.travels(item):
        return None
    pieces = kwargs_data(item.meta, chat.region(item), batch_size=batch_size)
    return Packed(pieces, borrowed=chat.borrows(item))


def _address(chat: RenderedChat, item: RenderedItem) -> Address | None:
    if chat.travels(item):
        return None
    assert chat.offered is not None
    answer, mapping = item.answer, chat.offered.mapping
    return Address(
        segment=mapping.name if answer.spill is None else sibling_name(mapping.name, answer.spill),
        epoch=mapping.epoch if answer.spill is None else answer.spill.hex(),
        slot=answer.slot,
        offset=answer.offset,
        length=answer.length,
        generation=answer.generation,
        metadata_length=len(answer.meta),
        fields=address_fields(item.meta, len(answer.meta)),
        lease=answer.lease.hex() if answer.lease is not None else None,
        lease_kind=chat.request.lease_kind or "copy",
        lease_seconds=chat.offered.lease_ms // 1000,
    )
