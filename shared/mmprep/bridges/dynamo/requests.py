"""What a Dynamo frontend sends to its router and workers, from a chat that the service has rendered. Pure.

The form is Dynamo 1.6's ``PreprocessedRequest`` (``lib/llm/src/protocols/common/preprocessor.rs``). Its ``extra_args`` are free;
the names of hashes and placeholders in them are those of Dynamo's own frontend for vLLM. A worker that knows nothing of
mmprep finds no ``multi_modal_data`` and would answer as if there were no media: these requests are for workers that do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmprep.bridges.vllm.requests import addresses_of
from mmprep.errors import InvalidRequest
from mmprep.item import Item, features_of
from mmprep.rendered import Result

#: What every position that takes an embedding of a medium holds for the router: this and the hash's first 16 hex digits,
#: cut to so many values. Dynamo's routers and SGLang have the same rule (``pad_value_for_mm_hash``).
_PAD_START = 1_000_000
_PAD_VALUES = 1 << 30
_HASH_DIGITS = 16

#: The bridge's own business, whatever a request says.
_OURS = frozenset({"mm_payload", "backend_id", "lease_kind", "queue", "return_mm_kwargs", "deadline_ms"})
#: Dynamo's business, which the service does not know; it serves one model, whatever Dynamo calls it.
_DYNAMOS = frozenset({"model", "nvext", "routing", "stream", "stream_options"})
#: What would change the answer and is not made here.
_UNSUPPORTED = ("logprobs", "top_logprobs")

_STOPS = ("max_tokens", "stop", "stop_token_ids", "min_tokens", "ignore_eos")
_SAMPLING = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "include_stop_str_in_output",
)
_GUIDES = ("json", "regex", "choice", "grammar")
_ELSEWHERE = ("skip_special_tokens", "structured_outputs", "thinking_token_budget")
_KNOWN = frozenset((*_STOPS, *_SAMPLING, *_ELSEWHERE))


def chat_fields(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a chat as the service is asked for it, ``messages`` among them.

    Parameters
    ----------
    request:
        A chat completion request, as Dynamo's HTTP server passes it on.

    Raises
    ------
    InvalidRequest
        It asks for what this bridge does not do; ``param`` names it.
    """
    for name in _OURS & request.keys():
        raise InvalidRequest(f"{name!r} is not for a request through Dynamo", param=name)
    for name in _UNSUPPORTED:
        if request.get(name):
            raise InvalidRequest(f"{name!r} is not supported through this frontend", param=name)
    if request.get("n") not in {None, 1}:
        raise InvalidRequest("'n' is 1 through this frontend", param="n")
    return {name: value for name, value in request.items() if name not in _DYNAMOS and value is not None}


def to_extra_args(result: Result) -> dict[str, Any]:
    """Return what workers are told of a chat's media; empty where it has none.

    Parameters
    ----------
    result:
        From a client, with ``payload="shm"``. Hold it until the worker has opened the items: the addresses are without a
        lease, each worker takes its own.

    Returns
    -------
    ``mm_hashes_by_modality``, ``mm_placeholders_by_modality`` (``{"offset", "length"}``, and ``"is_embed"`` where not every
    position takes an embedding) and ``mm_addresses``, lists by modality. An item in no shared memory has ``None`` for an address
    and its tensors in ``kwargs_data``. ``mm_hashes`` and ``mm_placeholders`` are the plain lists where all media are images.
    """
    features = features_of(result.items)
    if features is None:
        return {}
    hashes, placeholders = features["mm_hashes"], features["mm_placeholders"]
    args: dict[str, Any] = {
        "mm_hashes_by_modality": hashes,
        "mm_placeholders_by_modality": placeholders,
        **addresses_of(result.items),
    }
    if hashes.keys() == {"image"}:
        args |= {"mm_hashes": hashes["image"], "mm_placeholders": placeholders["image"]}
    return args


def routing_token_ids(token_ids: Sequence[int], items: Mapping[str, Sequence[Item]]) -> list[int]:
    """Return the ids by which a router tells prompts with different media apart.

    Parameters
    ----------
    token_ids:
        The prompt, placeholders expanded.
    items:
        By modality, as in :attr:`mmprep.client.Result.items`.

    Returns
    -------
    ``token_ids`` with each position that takes an embedding replaced by 1,000,000 + (first 16 hex digits of the item's hash
    mod 2**30).
    """
    routed = list(token_ids)
    for item in (item for ones in items.values() for item in ones):
        value = _PAD_START + int(item.hash[:_HASH_DIGITS], 16) % _PAD_VALUES
        for number in range(item.length):
            if item.is_embed is None or item.is_embed[number]:
                routed[item.offset + number] = value
    return routed


def preprocessed(result: Result, request: Mapping[str, Any], eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """Return a ``PreprocessedRequest`` for the routed engine.

    Parameters
    ----------
    result:
        Of the chat, from a client.
    request:
        The chat completion request.
    eos_token_ids:
        Of the model.

    Raises
    ------
    InvalidRequest
        The request sets a sampling parameter that Dynamo's form has no place for.
    """
    told = result.request
    params = told["sampling_params"]
    for name in params.keys() - _KNOWN:
        raise InvalidRequest(f"{name!r} is not supported through this frontend", param=name)
    prepared: dict[str, Any] = {
        "model": request["model"],
        "token_ids": told["token_ids"],
        "stop_conditions": {name: params[name] for name in _STOPS if name in params},
        "sampling_options": {name: params[name] for name in _SAMPLING if name in params},
        "output_options": {"skip_special_tokens": params.get("skip_special_tokens", True)},
        "eos_token_ids": list(eos_token_ids),
        "annotations": [],
        "routing": _routing(request, told),
    }
    stops = prepared["stop_conditions"]
    if isinstance(stops.get("stop"), str):
        stops["stop"] = [stops["stop"]]
    if "thinking_token_budget" in params:
        stops["max_thinking_tokens"] = params["thinking_token_budget"]
    if guide := _guide(params.get("structured_outputs")):
        prepared["sampling_options"]["guided_decoding"] = guide
    if result.items:
        prepared["extra_args"] = to_extra_args(result)
        routed = routing_token_ids(told["token_ids"], result.items)
        prepared["mm_routing_info"] = {
            "routing_token_ids": routed,
            "block_mm_infos": [],
            "expanded_prompt_len": len(routed),
        }
    return prepared


def _routing(request: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any] | None:
    routing = dict(request.get("routing") or {})
    if told["cache_salt"] is not None:
        routing["cache_salt"] = told["cache_salt"]
    if told["priority"]:
        routing["priority"] = told["priority"]
    return routing or None


def _guide(outputs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what guides decoding; raises InvalidRequest for what Dynamo's form has no place for."""
    if not outputs:
        return None
    given = {name: value for name, value in outputs.items() if value is not None and value is not False}
    if given.pop("json_object", None):
        given["json"] = {"type": "object"}
    for name in given:
        if name not in _GUIDES:
            raise InvalidRequest(f"{name!r} of structured outputs is not supported through this frontend")
    return given or None
