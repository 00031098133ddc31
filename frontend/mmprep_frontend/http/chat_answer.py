"""The HTTP form of a rendered chat: one GenerateRequest as JSON. Encoding tensors is work for a thread."""

from __future__ import annotations

from typing import Any

import msgspec

from mmprep.address import Address, address_fields
from mmprep.segment import sibling_name
from mmprep_frontend.model import ServedModel
from mmprep_frontend.render.answer import features, generate_request, json_string, kwargs_data, mm_metadata
from mmprep_frontend.service import RenderedChat, RenderedItem


def encode_chat_answer(chat: RenderedChat, model: ServedModel, request_id: str) -> bytes:
    """Return the answer's JSON."""
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
    return msgspec.json.encode(answer)


def _features(chat: RenderedChat) -> dict[str, Any] | None:
    by_modality: dict[str, list[RenderedItem]] = {}
    for item in chat.in_order():
        by_modality.setdefault(item.part.modality, []).append(item)
    payload = chat.request.payload
    tensors = metadata = addresses = None
    if payload != "none":
        metadata = {
            m: [_text(mm_metadata(i.meta, batch_size=len(items))) for i in items] for m, items in by_modality.items()
        }
    # Where addresses were asked for, tensors are only those that found no shared memory.
    if any(map(chat.travels, chat.items)):
        tensors = {m: [_text(_tensors(chat, i, len(items))) for i in items] for m, items in by_modality.items()}
    if payload == "tensors" and chat.offered is not None:
        chat.offered.check()
    if payload == "shm":
        addresses = {m: [_address(chat, i) for i in items] for m, items in by_modality.items()}
    return features(
        chat.expanded.ranges,
        {m: [i.key.hex() for i in items] for m, items in by_modality.items()},
        kwargs_data=tensors,
        mm_metadata=metadata,
        mm_addresses=addresses,
    )


def _text(encoded: bytes | None) -> msgspec.Raw | None:
    """Return base64 bytes as the JSON string that they are."""
    return None if encoded is None else json_string(encoded)


def _tensors(chat: RenderedChat, item: RenderedItem, batch_size: int) -> bytes | None:
    """Return one item's tensors, encoded as they lie there; ``None`` where it has an address in their place."""
    return kwargs_data(item.meta, chat.region(item), batch_size=batch_size) if chat.travels(item) else None


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
