"""Builds the answer: one GenerateRequest, as plain data, and the packed tensors in it.

Field names, meanings and defaults are those of vLLM's ``GenerateRequest`` (its token-in, token-out endpoint), so that
an answer can be posted there as it is.

One item's tensors are MessagePack ``{field: {"data": [dtype, shape, Ext(3, raw)], "field": [kind, arguments]}}``: the form in
which vLLM's serializer takes a multimodal item. How an answer is encoded, and so whether that is base64 in it, is a matter of
:mod:`mmprep_frontend.render.encodings`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from mmprep.errors import InvalidRequest
from mmprep.items import FieldSpec, ItemMeta
from mmprep.kwargs_data import RAW, kind_arguments
from mmprep_frontend.render.expansion import Range
from mmprep_frontend.render.packing import Piece, array_head, ext_head, map_head
from mmprep_frontend.render.requests import ChatRequest, CompletionRequest, template_kwargs
from mmprep_frontend.render.sampling import NO_DEFAULTS, Defaults, sampling_params

#: What the ids of requests, and of the jobs that they become, begin with.
CHAT_PREFIX, COMPLETION_PREFIX, RESPONSE_PREFIX = "chatcmpl-", "cmpl-", "resp_"
#: Bytes of a tensor up to which it is copied to what stands around it.
_SMALL = 4096
_packed = msgspec.msgpack.encode
#: Before and behind a field's tensor: a map of two, "data" with an array of three, and "field".
_FIELD_HEAD, _FIELD_TAIL = map_head(2) + _packed("data") + array_head(3), _packed("field")


def new_request_id(prefix: str) -> str:
    """Return a new request id: ``prefix``, as ``chatcmpl-``, and what nobody has had."""
    return f"{prefix}{uuid.uuid4().hex}"


def check_length(length: int, max_model_len: int) -> None:
    """Refuse a prompt that leaves no room for an answer.

    Parameters
    ----------
    length: of the expanded prompt, in tokens.
    max_model_len: tokens that the model takes, prompt and answer together.

    Raises
    ------
    InvalidRequest
        The prompt is longer than ``max_model_len``, or as long.
    """
    if length >= max_model_len:
        raise InvalidRequest(
            f"The prompt has {length} tokens, and the model takes at most {max_model_len}, of which at least one is "
            "for the answer; shorten the text or send fewer or smaller media."
        )


def generate_request(
    request: ChatRequest | CompletionRequest,
    *,
    request_id: str,
    model: str,
    token_ids: list[int],
    max_model_len: int,
    defaults: Defaults = NO_DEFAULTS,
    features: dict[str, Any] | None = None,
    prompt_text: str | None = None,
    token_offsets: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Return the answer to one prompt.

    Parameters
    ----------
    request: what was asked.
    request_id: from :func:`new_request_id`.
    model: the served model's name, used where the request names none.
    token_ids: the expanded prompt.
    max_model_len: tokens that the model takes.
    defaults: of the model's sampling.
    features: from :func:`features`, ``None`` without media.
    prompt_text: the prompt as text, ``None`` where it was given as ids; only in the answer where it was asked for.
    token_offsets: first and last character but one of each token in the prompt's text, where they were asked for.

    Raises
    ------
    InvalidRequest
        The prompt is too long, or its response format is none that is known.
    """
    check_length(len(token_ids), max_model_len)
    answer: dict[str, Any] = {
        "request_id": request_id,
        "token_ids": token_ids,
        "token_offsets": token_offsets,
        "features": features,
        "content_parts": None,
        "sampling_params": sampling_params(request, max_model_len - len(token_ids), defaults),
        "model": request.model or model,
        "reasoning_ended": True if isinstance(request, ChatRequest) and not request.include_reasoning else None,
        "reasoning_parser_kwargs": None,
        "return_token_ids": request.return_token_ids,
        "output_mode": "tokens",
        "parse_context": parse_context(request) if isinstance(request, ChatRequest) else None,
        "stream": bool(request.stream),
        "stream_options": request.stream_options if request.stream else None,
        "cache_salt": request.cache_salt,
        "priority": request.priority or 0,
        "kv_transfer_params": request.kv_transfer_params,
        "ec_transfer_params": request.ec_transfer_params,
    }
    if request.return_prompt_text:
        answer["prompt_text"] = prompt_text
    return answer


def parse_context(request: ChatRequest) -> dict[str, Any] | None:
    """Return what an engine needs to know of a chat to parse what its model says, ``None`` where it is not to."""
    if not request.is_parsed:
        return None
    choice = request.tool_choice
    if choice is None:
        choice = "auto" if request.tools else "none"
    calls = (len(message.tool_calls or ()) for message in request.messages if message.role == "assistant")
    return {
        "tools": request.tools,
        "tool_choice": choice,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "include_reasoning": request.include_reasoning,
        "chat_template_kwargs": {
            **template_kwargs(request),
            **({} if request.documents is None else {"documents": request.documents}),
            "add_generation_prompt": request.add_generation_prompt,
            "continue_final_message": request.continue_final_message,
        },
        "history_tool_call_cnt": sum(calls),
    }


def features(
    ranges: Sequence[Range],
    hashes: Mapping[str, Sequence[str]],
    *,
    kwargs_data: Mapping[str, Sequence[Any]] | None = None,
    mm_metadata: Mapping[str, Sequence[Any]] | None = None,
    mm_addresses: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, Any] | None:
    """Return what the answer says of its media, ``None`` where there are none.

    Parameters
    ----------
    ranges: of all media, in the prompt's order.
    hashes: 64 hex digits each, by modality, in the order of that modality's ranges; so are the others.
    kwargs_data, mm_metadata: packed tensors, :func:`kwargs_data` and :func:`mm_metadata`.
    mm_addresses: where the tensors lie in shared memory.
    """
    if not ranges:
        return None
    placeholders: dict[str, list[dict[str, Any]]] = {}
    for placed in ranges:
        entry: dict[str, Any] = {"offset": placed.offset, "length": placed.length}
        if placed.is_embed is not None:
            entry["is_embed"] = placed.is_embed
        placeholders.setdefault(placed.modality, []).append(entry)
    return {
        "mm_hashes": {modality: list(hashes[modality]) for modality in placeholders},
        "mm_placeholders": placeholders,
        "kwargs_data": kwargs_data,
        "mm_metadata": mm_metadata,
        "mm_addresses": mm_addresses,
    }


def kwargs_data(meta: ItemMeta, region: memoryview, *, batch_size: int = 1) -> list[Piece]:
    """Return one item, packed: all its fields. Pieces that are memoryviews are parts of ``region``.

    Parameters
    ----------
    meta: of the item.
    region: the tensor region of its extent, contiguous.
    batch_size: items of this modality in the request; only *shared* fields hold it.
    """
    return _pack(meta.fields, lambda spec: region[spec.offset : spec.offset + spec.nbytes], batch_size)


def mm_metadata(meta: ItemMeta, *, batch_size: int = 1) -> list[Piece] | None:
    """Return one item, packed: only the fields that stay on the CPU; ``None`` where it has none."""
    fields = [spec for spec in meta.fields if spec.keep_on_cpu]
    return _pack(fields, lambda spec: meta.cpu[spec.name], batch_size) if fields else None


def _pack(fields: Sequence[FieldSpec], raw: Callable[[FieldSpec], Piece], batch_size: int) -> list[Piece]:
    pieces: list[Piece] = []
    small = bytearray(map_head(len(fields)))
    for spec in fields:
        data = raw(spec)
        small += _packed(spec.name) + _FIELD_HEAD + _packed(spec.dtype) + _packed(spec.shape) + ext_head(RAW, len(data))
        if len(data) > _SMALL:
            pieces += (bytes(small), data)
            small.clear()
        else:
            small += data
        small += _FIELD_TAIL + _packed((spec.kind, kind_arguments(spec, batch_size)))
    return [*pieces, bytes(small)]
