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
        features=_features(chat),
        prompt_text=chat.prompt.text,
    )
    return msgspec.json.encode(answer)


def _features(chat: RenderedChat) -> dict[str, Any] | None:
    by_modality: dict[str, list[RenderedItem]] = {}
    for item in chat.in_order():
        by_modality.setdefault(item.part.modality, []).append(item)
    payload = chat.request.payload
    tensors = metadata = addresses = None
    if payload != "none":
        metadata = {m: [mm_metadata(i.meta, batch_size=len(items)) for i in items] for m, items in by_modality.items()}
    # Where addresses were asked for, tensors are only those that found no shared memory.
    if payload == "tensors" or any(item.answer.inline for item in chat.items):
        tensors = {m: [_tensors(chat, i, len(items)) for i in items] for m, items in by_modality.items()}
    if payload == "tensors" and chat.offered is not None:
        chat.offered.check()
    if payload == "shm":
        addresses = {m: [_address(chat, i) for i in items] for m, items in by_modality.items()}
    return features(
        chat.expanded.ranges,
        {m: [i.key.hex() for i in items] for m, items in by_modality.items()},
        kwargs_data=_text(tensors),
        mm_metadata=_text(metadata),
        mm_addresses=addresses,
    )


def _text(encoded: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
    """Return base64 bytes as the JSON strings that they are."""
    if encoded is None:
        return None
    return {m: [None if one is None else json_string(one) for one in items] for m, items in encoded.items()}


def _tensors(chat: RenderedChat, item: RenderedItem, batch_size: int) -> bytes | None:
    """Return one item's tensors, encoded as they lie there; ``None`` where it has an address in their place."""
    assert chat.offered is not None
    if chat.request.payload == "shm" and not item.answer.inline:
        return None
    return kwargs_data(item.meta, chat.offered.region(item.answer), batch_size=batch_size)


def _address(chat: RenderedChat, item: RenderedItem) -> Address | None:
    assert chat.offered is not None
    answer, mapping = item.answer, chat.offered.mapping
    if answer.inline:
        return None
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
