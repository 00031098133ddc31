"""The schema of OpenAI's Responses API, as far as it changes what is rendered; other fields are ignored.

Names and bounds are the API's and vLLM's. Items and tools are taken one by one, by :mod:`.responses`, since an item may
leave its type out. The fields of :class:`.requests.Delivered` are those of every request.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from mmprep_frontend.render.parts import Content
from mmprep_frontend.render.requests import SAMPLING, Effort, Positive, Sampled

Status = Literal["in_progress", "completed", "incomplete"]
_Words = Annotated[str, Meta(min_length=1)]


class MessageItem(Struct, kw_only=True):
    """A message of anybody's."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    type: Literal["message"] = "message"
    status: Status | None = None


class FunctionCallItem(Struct, kw_only=True):
    """A call of a function by the assistant; ``arguments`` is JSON text."""

    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class CustomCallItem(Struct, kw_only=True):
    """A call of a tool that takes a text."""

    call_id: str
    name: str
    input: str = ""


class CallOutputItem(Struct, kw_only=True):
    """What a function or tool answered."""

    call_id: str
    output: Content


class ThoughtText(Struct):
    """A piece of reasoning, or of its summary."""

    text: str


class ReasoningItem(Struct, kw_only=True):
    """What the assistant thought."""

    content: list[ThoughtText] | None = None
    summary: list[ThoughtText] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


class FunctionTool(Struct, kw_only=True):
    """A function that may be called."""

    name: _Words
    type: Literal["function"] = "function"
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class CustomTool(Struct, kw_only=True):
    """A tool that takes a text."""

    name: _Words
    description: str | None = None
    format: dict[str, Any] | None = None


class NamespaceTool(Struct, kw_only=True):
    """Functions under one name."""

    name: _Words
    tools: list[dict[str, Any]]


class NamedChoice(Struct, kw_only=True):
    """A choice of one tool."""

    type: Literal["function", "custom"]
    name: _Words


class TextFormat(Struct, kw_only=True):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None


class TextConfig(Struct):
    """How the answer is to be."""

    format: TextFormat | None = None


class Reasoning(Struct):
    """How much is to be thought."""

    effort: Effort | None = None


class ResponsesRequest(Sampled, kw_only=True):
    """What ``/v1/responses/render`` takes; with it, what all requests say of their answers."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    include_reasoning: bool = True
    text: TextConfig | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    max_output_tokens: Positive | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    previous_input_messages: Any = None


#: Fields of a ResponsesRequest that are the chat request's fields of the same name.
SAME = (
    "include_reasoning",
    "parallel_tool_calls",
    *SAMPLING,
    "chat_template_kwargs",
)
