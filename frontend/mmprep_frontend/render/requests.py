"""The schemas of the requests that are rendered, and their parsing.

Rules
-----
- A field that is not listed here is ignored: clients send many that change nothing here.
- A field that would change the result and that this service does not honour is refused, never ignored
  (``_NOT_YET``, ``_FORMERLY``).
- An error's ``param`` is the place in the request, as ``messages[0].content[1].image_url``.

The fields and their defaults are those of OpenAI's API and of vLLM's extension of it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias, overload

from msgspec import Meta, Struct

from mmprep.card import Io
from mmprep.errors import InvalidRequest
from mmprep.wire.messages import Name
from mmprep_frontend.render.bounds import MAX_PROMPTS
from mmprep_frontend.render.depth import check_depth
from mmprep_frontend.render.parts import UNTYPED, Message
from mmprep_frontend.render.sampling import check_sampling, check_together
from mmprep_frontend.render.schema import Schema
from mmprep_frontend.render.tool_choice import NamedTool, ToolChoice, check_tool_choice, forced_schema, functions

Side: TypeAlias = Literal["left", "right"]
Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Payload: TypeAlias = Literal["tensors", "shm", "none"]
Kind: TypeAlias = Literal["chat", "completion", "tokenize", "detokenize"]

Positive: TypeAlias = Annotated[int, Meta(ge=1)]
Natural: TypeAlias = Annotated[int, Meta(ge=0)]
Int64: TypeAlias = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
Temperature: TypeAlias = Annotated[float, Meta(ge=0, le=2)]
TopP: TypeAlias = Annotated[float, Meta(gt=0, le=1)]
TopK: TypeAlias = Annotated[int, Meta(ge=-1)]
_Salt = Annotated[str, Meta(min_length=1, max_length=1024)]
_Dtype = Literal["auto", "uint8", "float32", "bfloat16", "float16"]
#: What OpenAI's completion API generates where a request sets no length; its chat API has no such limit.
COMPLETION_TOKENS = 16
#: Answers to one request, as vLLM bounds them.
MAX_ANSWERS = 16_384


class _Request(Struct, kw_only=True):
    """What every request has, and what every request is refused for."""

    model: str | None = None
    chat_template: str | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[Literal["image", "video", "audio"], Io] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    truncation_side: Side | None = None
    priority: Int64 | None = None
    cache_salt: _Salt | None = None
    deadline_ms: Positive | None = None
    mm_dtype: _Dtype | None = None

    @property
    def io(self) -> dict[str, Io]:
        """How media are read, by modality."""
        return {str(modality): io for modality, io in (self.media_io_kwargs or {}).items()}


class Delivered(_Request, kw_only=True):
    """What a request says of its answer: how the tensors travel, to whom, and what else is in it."""

    stream: bool | None = None
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None
    mm_payload: Payload | None = None
    return_mm_kwargs: bool | None = None
    backend_id: Name | None = None
    lease_kind: Literal["copy", "view"] | None = None
    return_prompt_text: bool | None = None
    return_token_offsets: bool | None = None
    queue: Name | None = None

    @property
    def payload(self) -> Payload:
        """How the tensors travel: what the request names, else ``tensors``, or by address where it goes to a queue."""
        if self.mm_payload is not None:
            return self.mm_payload
        if self.return_mm_kwargs is False:
            return "none"
        return "tensors" if self.queue is None else "shm"


class Sampled(Delivered, kw_only=True):
    """What a request says of how tokens are drawn, under names that all forms share."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Natural] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    watermarking: bool | None = None
    vllm_xargs: dict[str, Any] | None = None


#: Its own fields.
SAMPLING = tuple(name for name in Sampled.__struct_fields__ if name not in Delivered.__struct_fields__)


class _Generating(Sampled, kw_only=True):
    """What else a request says of the generation that is to follow."""

    n: Annotated[int, Meta(ge=1, le=MAX_ANSWERS)] | None = None
    max_tokens: Positive | None = None
    min_tokens: Natural | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[Natural] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    response_format: dict[str, Any] | None = None
    logprob_token_ids: list[Natural] | None = None
    thinking_token_budget: Annotated[int, Meta(ge=-1)] | None = None
    repetition_detection: dict[str, Any] | None = None
    stream_interval: Positive | None = None
    routed_experts_prompt_start: Natural | None = None
    stream_options: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    echo: bool | None = None
    use_beam_search: bool | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None


class ChatRequest(_Generating, kw_only=True):
    """A chat completion request."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool = True
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    functions: Any = None
    function_call: Any = None

    #: Whether what the model will say is to be parsed as an answer of the chat API.
    is_parsed: ClassVar[bool] = True

    @property
    def length_field(self) -> str:
        """The field that says how many tokens may be generated."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def wanted_tokens(self) -> int | None:
        """How many tokens may be generated, ``None`` where the request says nothing."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many log probabilities a token are asked for, ``None``: none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def forced(self) -> dict[str, Any] | None:
        """Return the JSON schema of the tool calls that must be generated, ``None`` where none must."""
        return forced_schema(self.tools, self.tool_choice, parallel=self.parallel_tool_calls is not False)


class CompletionRequest(_Generating, kw_only=True):
    """A text completion request; ``prompt`` is one text or list of ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    add_special_tokens: bool = True
    logprobs: Natural | None = None
    suffix: Any = None
    prompt_embeds: Any = None

    length_field: ClassVar[str] = "max_tokens"

    @property
    def wanted_tokens(self) -> int:
        """How many tokens may be generated; the API has a default."""
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many log probabilities a token are asked for, ``None``: none at all."""
        return self.logprobs

    def forced(self) -> None:
        """Tell that no tool must be called: there are none here."""

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one, each a text or token ids.

        Raises
        ------
        InvalidRequest
            The list is empty, too long, or mixes texts, ids and lists.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(element) for element in self.prompt}
        if kinds == {int}:
            return [self.prompt]  # type: ignore[list-item]
        if len(self.prompt) > MAX_PROMPTS:
            raise InvalidRequest(
                f"The request has {len(self.prompt)} prompts; at most {MAX_PROMPTS} are allowed in one.", param="prompt"
            )
        if kinds in ({str}, {list}):
            return list(self.prompt)  # type: ignore[arg-type]
        raise InvalidRequest(
            "'prompt' must be a text, a list of texts, a list of token ids or a list of such lists, and not be empty.",
            param="prompt",
        )

    @property
    def is_batch(self) -> bool:
        """Whether the prompt is a list of prompts, whose answers are numbered."""
        return not isinstance(self.prompt, str) and not all(isinstance(element, int) for element in self.prompt)


class TokenizeRequest(_Request, kw_only=True):
    """What ``/tokenize`` takes: a text as ``prompt``, or a conversation as ``messages``."""

    prompt: str | None = None
    messages: list[Message] | None = None
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None

    @property
    def adds_special_tokens(self) -> bool:
        """``add_special_tokens``, by default true for a text and false for a conversation."""
        return self.messages is None if self.add_special_tokens is None else self.add_special_tokens


class DetokenizeRequest(Struct, kw_only=True):
    """What ``/detokenize`` takes."""

    model: str | None = None
    tokens: list[int]
    deadline_ms: Positive | None = None


Request: TypeAlias = ChatRequest | CompletionRequest | TokenizeRequest | DetokenizeRequest


def wants_offsets(request: Request) -> bool:
    """Whether the answer is to tell where each token's text is."""
    return isinstance(request, Delivered) and bool(request.return_token_offsets)


def template_kwargs(request: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """Return the variables of the chat template that a request chooses freely, and those that its effort means."""
    variables = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        # Asking for an effort turns thinking on, or off, in templates that leave it to a switch.
        variables.setdefault("enable_thinking", request.reasoning_effort != "none")
        variables["reasoning_effort"] = request.reasoning_effort
    return variables


_SCHEMAS: dict[Kind, Schema[Any]] = {
    "chat": Schema(ChatRequest, untyped=UNTYPED),
    "completion": Schema(CompletionRequest),
    "tokenize": Schema(TokenizeRequest, untyped=UNTYPED),
    "detokenize": Schema(DetokenizeRequest),
}


@overload
def parse(
    body: bytes | memoryview, kind: Literal["chat"], *, trusted: bool = ..., templates: bool = ...
) -> ChatRequest: ...
@overload
def parse(
    body: bytes | memoryview, kind: Literal["completion"], *, trusted: bool = ..., templates: bool = ...
) -> CompletionRequest: ...
@overload
def parse(
    body: bytes | memoryview, kind: Literal["tokenize"], *, trusted: bool = ..., templates: bool = ...
) -> TokenizeRequest: ...
@overload
def parse(
    body: bytes | memoryview, kind: Literal["detokenize"], *, trusted: bool = ..., templates: bool = ...
) -> DetokenizeRequest: ...
def parse(body: bytes | memoryview, kind: Kind, *, trusted: bool = False, templates: bool = False) -> Request:
    """Return the request in ``body``.

    Parameters
    ----------
    body: the JSON text, UTF-8.
    kind: which schema it must follow.
    trusted: whether the request may say how media are read and processed, ``--trust-request-mm-kwargs``.
    templates: whether it may bring or choose its chat template, ``--trust-request-chat-template``.

    Raises
    ------
    InvalidRequest
        It is no JSON, breaks the schema, or asks for what this service does not do.
    """
    request: Request = _SCHEMAS[kind].decode(body)
    check(request, trusted=trusted, templates=templates)
    if isinstance(request, ChatRequest | CompletionRequest):
        check_together(request)
    return request


_NOT_YET = ("functions", "function_call", "suffix", "prompt_embeds")
#: Constraints that engines have had as fields of their own, and drop in silence now; by the names that they have today.
_FORMERLY = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar")}


def check(request: Request, *, trusted: bool, templates: bool) -> None:
    """Refuse what the schema allows and this service does not honour, or what contradicts itself.

    Raises
    ------
    InvalidRequest
        ``param`` names the field.
    """
    check_depth(request)
    for name in _NOT_YET:
        value = getattr(request, name, None)
        if value is not None and value is not False:
            raise InvalidRequest(f"'{name}' is not supported yet; leave it out.", param=name)
    for name, today in _FORMERLY.items():
        if getattr(request, name, None) is not None:
            raise InvalidRequest(f"Send '{name}' as 'structured_outputs': {{'{today}': …}}.", param=name)
    if isinstance(request, _Request):
        _check_trust(request, trusted=trusted, templates=templates)
        if request.truncate_prompt_tokens == 0:
            raise InvalidRequest("'truncate_prompt_tokens' of 0 leaves no prompt.", param="truncate_prompt_tokens")
    if isinstance(request, ChatRequest | CompletionRequest):
        _check_delivery(request)
        check_generation(request)
    if isinstance(request, ChatRequest | TokenizeRequest):
        _check_conversation(request)


def check_generation(request: ChatRequest | CompletionRequest) -> None:
    """Refuse a generation that no engine makes, or that contradicts itself; raises InvalidRequest."""
    if request.use_beam_search:
        raise InvalidRequest("Beam search is not supported in rendering; leave it out.", param="use_beam_search")
    check_sampling(request)
    if isinstance(request, CompletionRequest):
        request.prompts()
        return
    check_tool_choice(request.tools, request.tool_choice)
    if isinstance(request.tool_choice, NamedTool) and request.structured_outputs is not None:
        raise InvalidRequest(
            "A named 'tool_choice' decides what is generated; send no 'structured_outputs' with it.",
            param="structured_outputs",
        )


def _check_trust(request: _Request, *, trusted: bool, templates: bool) -> None:
    for name in ("mm_processor_kwargs", "media_io_kwargs"):
        if getattr(request, name) and not trusted:
            raise InvalidRequest(
                f"'{name}' is only accepted by a service that trusts its clients with it "
                "(--trust-request-mm-kwargs); leave it out.",
                param=name,
            )
    if request.chat_template is not None and not templates:
        raise InvalidRequest(
            "'chat_template' is only accepted by a service that trusts its clients with it "
            "(--trust-request-chat-template); leave it out.",
            param="chat_template",
        )


def _check_conversation(request: ChatRequest | TokenizeRequest) -> None:
    if isinstance(request, TokenizeRequest) and (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("Send either 'prompt' or 'messages'.", param="prompt")
    if request.messages is not None and not request.messages:
        raise InvalidRequest("'messages' must hold at least one message.", param="messages")
    functions(request.tools or ())
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidRequest(
            "'continue_final_message' needs 'add_generation_prompt': false.", param="continue_final_message"
        )


def _check_delivery(request: Delivered) -> None:
    if request.return_mm_kwargs is False and request.mm_payload not in (None, "none"):
        raise InvalidRequest(
            f"'return_mm_kwargs': false contradicts 'mm_payload': '{request.mm_payload}'.", param="return_mm_kwargs"
        )
    if request.queue is not None:
        _check_queued(request)
    elif request.payload == "shm" and request.backend_id is None:
        raise InvalidRequest(
            "'mm_payload': 'shm' needs the 'backend_id' of a registered backend, which leases the addresses.",
            param="backend_id",
        )


def _check_queued(request: Delivered) -> None:
    if isinstance(request, CompletionRequest) and len(request.prompts()) > 1:
        raise InvalidRequest("A job has one prompt: post one request for each.", param="prompt")
    if request.payload == "tensors":
        raise InvalidRequest(
            "A queue takes addresses or hashes: leave 'mm_payload' out, or send 'none'.", param="mm_payload"
        )
    for name in ("backend_id", "lease_kind"):
        if getattr(request, name) is not None:
            raise InvalidRequest(
                f"A queued request's tensors are leased to the backend that pulls it; leave '{name}' out.", param=name
            )
