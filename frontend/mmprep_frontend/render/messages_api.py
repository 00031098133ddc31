"""The schema of Anthropic's Messages API, as far as it changes what is rendered; other fields are ignored.

Names and bounds are the API's. The fields beyond them, of :class:`.requests.Delivered`, are those of every request.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct, field

from mmprep_frontend.render.requests import Delivered, Temperature, TopK, TopP

_Words = Annotated[str, Meta(min_length=1)]


class Base64Source(Struct, tag="base64", tag_field="type"):
    """A picture's bytes in base64. What ``media_type`` says is not looked at: the bytes tell."""

    data: _Words
    media_type: str = "image/jpeg"

    def url(self) -> str:
        """Return the source as a URL."""
        return f"data:{self.media_type};base64,{self.data}"


class UrlSource(Struct, tag="url", tag_field="type"):
    """Where a picture is."""

    address: _Words = field(name="url")

    def url(self) -> str:
        """Return the source as a URL."""
        return self.address


class Text(Struct, tag="text", tag_field="type"):
    """Text."""

    text: str


class Image(Struct, tag="image", tag_field="type"):
    """A picture."""

    source: Base64Source | UrlSource


class ToolUse(Struct, tag="tool_use", tag_field="type"):
    """A call of a tool by the assistant."""

    name: str
    input: dict[str, Any] | None = None
    id: str | None = None


class ToolReference(Struct, tag="tool_reference", tag_field="type"):
    """A tool that a search found."""

    tool_name: str | None = None
    name: str | None = None


class ToolResult(Struct, tag="tool_result", tag_field="type"):
    """What a tool answered."""

    tool_use_id: str = ""
    content: str | list[Text | Image | ToolReference] | None = None


class Thinking(Struct, tag="thinking", tag_field="type"):
    """What the assistant thought."""

    thinking: str


class RedactedThinking(Struct, tag="redacted_thinking", tag_field="type"):
    """What the assistant thought, closed to us."""


class Tool(Struct):
    """A tool that may be called."""

    name: _Words
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    defer_loading: bool | None = None

    def as_function(self) -> dict[str, Any]:
        """Return the tool as the chat API has it, its fields in vLLM's order, which templates print."""
        function: dict[str, Any] = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema if "type" in self.input_schema else {**self.input_schema, "type": "object"},
        }
        for name in ("strict", "defer_loading"):
            if getattr(self, name) is not None:
                function[name] = getattr(self, name)
        return {"type": "function", "function": function}


class NamedChange(Struct, tag="tool_reference", tag_field="type"):
    """A tool by its name."""

    name: str


class DefinedChange(Struct, tag="tool_definition", tag_field="type"):
    """A tool by its definition."""

    definition: Tool


class ToolAddition(Struct, tag="tool_addition", tag_field="type"):
    """A tool that may be called from here on."""

    tool: NamedChange | DefinedChange


class ToolRemoval(Struct, tag="tool_removal", tag_field="type"):
    """A tool that may not be called any more."""

    tool: NamedChange


Block: TypeAlias = (
    Text | Image | ToolUse | ToolResult | ToolReference | Thinking | RedactedThinking | ToolAddition | ToolRemoval
)


class AnthropicMessage(Struct):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AutoChoice(Struct, tag="auto", tag_field="type"):
    """The model decides."""

    disable_parallel_tool_use: bool = False


class AnyChoice(Struct, tag="any", tag_field="type"):
    """Some tool must be called."""

    disable_parallel_tool_use: bool = False


class ToolNameChoice(Struct, tag="tool", tag_field="type"):
    """One tool must be called."""

    name: _Words
    disable_parallel_tool_use: bool = False


class NoChoice(Struct, tag="none", tag_field="type"):
    """No tool is to be called."""

    disable_parallel_tool_use: bool = False


class ThinkingEnabled(Struct, tag="enabled", tag_field="type"):
    """Thinking, for so many tokens."""

    budget_tokens: Annotated[int, Meta(ge=1024)]


class ThinkingDisabled(Struct, tag="disabled", tag_field="type"):
    """No thinking."""


class ThinkingAdaptive(Struct, tag="adaptive", tag_field="type"):
    """As much thinking as the model likes."""


class JsonFormat(Struct):
    """What the answer must look like."""

    schema: dict[str, Any] | None = None
    type: Literal["json_schema"] = "json_schema"


class OutputConfig(Struct):
    """How the answer is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class MessagesRequest(Delivered, kw_only=True):
    """What ``/v1/messages/render`` takes; with it, what all requests say of their answers."""

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)]
    system: str | list[Text] | None = None
    tools: list[Tool] | None = None
    tool_choice: AutoChoice | AnyChoice | ToolNameChoice | NoChoice | None = None
    thinking: ThinkingEnabled | ThinkingDisabled | ThinkingAdaptive | None = None
    output_config: OutputConfig | None = None
    stop_sequences: list[str] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    watermarking: bool | None = None
    vllm_xargs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
