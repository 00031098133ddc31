"""What an answer tells the engine of the generation: its sampling parameters.

Names and meanings are those of vLLM's ``SamplingParams``. A parameter is there where the request set it, or else where
the model's own ``generation_config.json`` does, as vLLM's servers have it by default; ``max_tokens`` is always there.
All else is left to the engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mmprep.errors import InvalidRequest, StartupError

if TYPE_CHECKING:
    from mmprep_frontend.render.requests import ChatRequest, CompletionRequest

#: Parameters that are the request's fields of the same name.
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
    "stop",
    "stop_token_ids",
    "bad_words",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "logprob_token_ids",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "logit_bias",
    "allowed_token_ids",
    "structured_outputs",
    "thinking_token_budget",
    "repetition_detection",
    "stream_interval",
    "watermarking",
    "routed_experts_prompt_start",
)
#: What makes a structured output; exactly one is allowed.
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
#: Parameters that are lists of token ids.
_OF_TOKEN_IDS = ("stop_token_ids", "allowed_token_ids", "logprob_token_ids")
_MOST_BIAS = 100.0
#: Digits of an id that is looked at as a number.
_MOST_DIGITS = 18


class Defaults(msgspec.Struct, frozen=True, rename={"max_tokens": "max_new_tokens"}):
    """What a model's ``generation_config.json`` says of sampling; ``None`` where it says nothing."""

    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    skip_special_tokens: bool | None = None
    max_tokens: int | None = None

    def given(self) -> dict[str, Any]:
        """Return the parameters that are given, without ``max_tokens``."""
        named = ((name, getattr(self, name)) for name in self.__struct_fields__ if name != "max_tokens")
        return {name: value for name, value in named if value is not None}


#: Of a model without such a file.
NO_DEFAULTS = Defaults()


def read_defaults(directory: Path) -> Defaults:
    """Return the defaults of a model directory in Hugging Face layout.

    Raises
    ------
    StartupError
        ``generation_config.json`` is there and cannot be read.
    """
    try:
        return msgspec.json.decode((directory / "generation_config.json").read_bytes(), type=Defaults)
    except FileNotFoundError:
        return NO_DEFAULTS
    except (OSError, msgspec.MsgspecError) as error:
        raise StartupError(f"generation_config.json of the model directory cannot be read: {error}") from None


def sampling_params(
    request: ChatRequest | CompletionRequest, room: int, defaults: Defaults = NO_DEFAULTS
) -> dict[str, Any]:
    """Return the sampling parameters of one prompt.

    Parameters
    ----------
    request: what was asked.
    room: tokens that the model still takes behind the prompt.
    defaults: of the model.
    """
    asked = ((name, getattr(request, name)) for name in _SAMPLING)
    params = defaults.given() | {name: value for name, value in asked if value is not None}
    if "logit_bias" in params:
        params["logit_bias"] = {
            token: min(_MOST_BIAS, max(-_MOST_BIAS, bias)) for token, bias in params["logit_bias"].items()
        }
    constraint = _constraint(request)
    if constraint is not None:
        params["structured_outputs"] = constraint
    if request.vllm_xargs is not None:
        params["extra_args"] = request.vllm_xargs
    params["max_tokens"] = max_tokens(request, room, defaults)
    logprobs = request.wanted_logprobs
    if logprobs is not None and not request.logprob_token_ids:
        params["logprobs"] = logprobs
    if request.echo and logprobs is not None:
        params.setdefault("prompt_logprobs", logprobs)
    return params


def max_tokens(request: ChatRequest | CompletionRequest, room: int, defaults: Defaults = NO_DEFAULTS) -> int:
    """Return how many tokens may be generated where the model still takes ``room``."""
    wanted = request.wanted_tokens
    if wanted is None:
        wanted = defaults.max_tokens
    return room if wanted is None else min(wanted, room)


def check_sampling(request: ChatRequest | CompletionRequest) -> None:
    """Refuse parameters that no engine takes; raises InvalidRequest."""
    for name in ("stop", "bad_words"):
        texts = getattr(request, name)
        if texts is not None and not all([texts] if isinstance(texts, str) else texts):
            raise InvalidRequest(f"'{name}' cannot hold an empty text.", param=name)
    for token in request.logit_bias or ():
        if not token.isascii() or not token.removeprefix("-").isdigit() or len(token) > _MOST_DIGITS:
            raise InvalidRequest(f"'logit_bias' is keyed by token ids; {token[:32]!r} is none.", param="logit_bias")
    if request.allowed_token_ids is not None and not request.allowed_token_ids:
        raise InvalidRequest("'allowed_token_ids' must hold at least one token id.", param="allowed_token_ids")
    wanted = request.wanted_tokens
    if request.min_tokens is not None and wanted is not None and request.min_tokens > wanted:
        raise InvalidRequest(
            f"'min_tokens' is {request.min_tokens}, and at most {wanted} tokens may be generated.", param="min_tokens"
        )
    if request.structured_outputs is not None:
        kinds = [name for name in _CONSTRAINTS if request.structured_outputs.get(name) is not None]
        if len(kinds) != 1:
            raise InvalidRequest(
                f"'structured_outputs' takes exactly one of {', '.join(_CONSTRAINTS)}.", param="structured_outputs"
            )
    _format_constraint(request)


def check_together(request: ChatRequest | CompletionRequest) -> None:
    """Refuse fields that mean nothing without others, which engines refuse too; raises InvalidRequest."""
    if request.stream_options and not request.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")
    if request.stream and request.prompt_logprobs:
        raise InvalidRequest("'prompt_logprobs' are not given with 'stream': true.", param="prompt_logprobs")
    if request.logprob_token_ids is not None and not request.logprob_token_ids:
        raise InvalidRequest("'logprob_token_ids' must hold at least one token id.", param="logprob_token_ids")
    if request.wanted_logprobs is None:
        for name in ("top_logprobs", "logprob_token_ids"):
            if getattr(request, name, None):
                raise InvalidRequest(f"'{name}' needs 'logprobs'.", param=name)


def check_against_model(request: ChatRequest | CompletionRequest, *, max_model_len: int, vocab_size: int) -> None:
    """Refuse a request for more tokens than the model takes at all, or with ids that it does not have.

    Raises
    ------
    InvalidRequest
        ``param`` is the field, or the element of its list.
    """
    param = request.length_field
    wanted = getattr(request, param)
    if wanted is not None and wanted > max_model_len:
        raise InvalidRequest(
            f"{wanted} tokens are asked for, and the model takes at most {max_model_len}, prompt and answer together.",
            param=param,
        )
    for name in _OF_TOKEN_IDS:
        for index, token_id in enumerate(getattr(request, name) or ()):
            _check_id(token_id, vocab_size, f"{name}[{index}]")
    for token in request.logit_bias or ():
        _check_id(int(token), vocab_size, "logit_bias")


def _check_id(token_id: int, vocab_size: int, param: str) -> None:
    if not 0 <= token_id < vocab_size:
        raise InvalidRequest(
            f"{token_id} is no token id of this model; they go from 0 to {vocab_size - 1}.", param=param
        )


def _constraint(request: ChatRequest | CompletionRequest) -> dict[str, Any] | None:
    """Return the structured output that a choice of tools or a response format means, ``None`` where neither does."""
    given = request.structured_outputs
    if given is None or given.get("structural_tag") is None:
        schema = request.forced()
        if schema is not None:
            return {"json": schema}
    return _format_constraint(request)


def _format_constraint(request: ChatRequest | CompletionRequest) -> dict[str, Any] | None:
    """Return what OpenAI's ``response_format`` means as a structured output; raises InvalidRequest for others."""
    response_format = request.response_format
    if response_format is None:
        return None
    kind = response_format.get("type")
    if kind == "text":
        return None
    if request.structured_outputs is not None:
        raise InvalidRequest("Send 'response_format' or 'structured_outputs', not both.", param="response_format")
    if kind == "json_object":
        return {"json_object": True}
    if kind == "structural_tag":
        return {"structural_tag": json.dumps(response_format)}
    named = response_format.get("json_schema")
    if kind != "json_schema" or not isinstance(named, Mapping) or not isinstance(named.get("schema"), Mapping):
        raise InvalidRequest(
            "'response_format' must be of type 'text', 'json_object', 'structural_tag', or 'json_schema' with a schema.",
            param="response_format",
        )
    return {"json": named["schema"]}
