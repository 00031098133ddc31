"""Requests of Anthropic's Messages API, and how they become chat requests.

The conversion is that of vLLM's server for this API, so that prompts are equal:

- ``system`` and the messages of that role become messages of the system, all in one in front where the model's template
  takes no later one;
- a block of type ``tool_use`` becomes a call, ``thinking`` the message's reasoning, and ``tool_result`` a message of the
  role ``tool`` before the message it stands in, pictures in it a message of the user behind that;
- ``tool_addition`` and ``tool_removal`` change the list of tools, of which templates see the last state;
- ``redacted_thinking`` is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.attribution import is_attribution
from mmprep_frontend.render.messages_api import (
    AnthropicMessage,
    AnyChoice,
    Block,
    DefinedChange,
    Image,
    MessagesRequest,
    NamedChange,
    NoChoice,
    OutputConfig,
    Text,
    Thinking,
    ThinkingDisabled,
    ThinkingEnabled,
    Tool,
    ToolAddition,
    ToolNameChoice,
    ToolReference,
    ToolRemoval,
    ToolResult,
    ToolUse,
)
from mmprep_frontend.render.parts import (
    FunctionCall,
    ImageUrlPart,
    Message,
    Part,
    TextPart,
    ToolCall,
    ToolReferencePart,
)
from mmprep_frontend.render.places import Asked, Places
from mmprep_frontend.render.requests import ChatRequest, Delivered, Effort, check
from mmprep_frontend.render.schema import Schema
from mmprep_frontend.render.template import Habits
from mmprep_frontend.render.tool_choice import NamedFunction, NamedTool, ToolChoice

_SCHEMA = Schema(MessagesRequest)
#: Fields of the chat request that stand elsewhere here.
_PLACES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
}


def read_messages(body: bytes | memoryview, habits: Habits, *, trusted: bool, templates: bool) -> Asked:
    """Return the chat request that a Messages request means.

    Parameters
    ----------
    body: the JSON text, UTF-8.
    habits: of the model's templates.
    trusted, templates: as :func:`.requests.parse` has them.

    Raises
    ------
    InvalidRequest
        ``param`` is the place in ``body``.
    """
    asked = _SCHEMA.decode(body)
    conversation = _Conversation(habits)
    conversation.system(asked)
    for index, message in enumerate(asked.messages):
        conversation.message(message, f"messages[{index}]")
    tools = _tools(asked)
    known = _PLACES | conversation.places
    for index, (_, origin) in enumerate(tools):
        known[f"tools[{index}].function.parameters"] = f"{origin}.input_schema"
        known[f"tools[{index}]"] = known[f"tools[{index}].function"] = origin
    places = Places(known)
    with places.renaming():
        request = _chat_request(asked, conversation.messages, [tool.as_function() for tool, _ in tools] or None, habits)
        check(request, trusted=trusted, templates=templates)
    return Asked(request, places)


def _chat_request(
    asked: MessagesRequest, messages: list[Message], tools: list[dict[str, Any]] | None, habits: Habits
) -> ChatRequest:
    config = asked.output_config or OutputConfig()
    effort: Effort | None = habits.quiet_effort if isinstance(asked.thinking, ThinkingDisabled) else config.effort
    schema = None if config.format is None else config.format.schema
    named = {"name": "json_schema", "schema": schema}
    return ChatRequest(
        **{name: getattr(asked, name) for name in Delivered.__struct_fields__},
        messages=messages,
        max_completion_tokens=asked.max_tokens,
        stop=asked.stop_sequences,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        watermarking=asked.watermarking,
        vllm_xargs=asked.vllm_xargs,
        chat_template_kwargs=asked.chat_template_kwargs,
        reasoning_effort=effort,
        thinking_token_budget=_thinking_budget(asked),
        response_format=None if schema is None else {"type": "json_schema", "json_schema": named},
        stream_options={"include_usage": True, "continuous_usage_stats": True} if asked.stream else None,
        tools=tools,
        tool_choice=_choice(asked, tools),
        parallel_tool_calls=None if asked.tool_choice is None else not asked.tool_choice.disable_parallel_tool_use,
    )


def _thinking_budget(asked: MessagesRequest) -> int | None:
    if not isinstance(asked.thinking, ThinkingEnabled):
        return None
    budget = asked.thinking.budget_tokens
    # A request that only fills the cache of another engine has a length of its own, which is no promise.
    if budget >= asked.max_tokens and not (asked.kv_transfer_params or {}).get("do_remote_decode"):
        raise InvalidRequest(
            f"'thinking.budget_tokens' is {budget} and must be less than 'max_tokens', {asked.max_tokens}.",
            param="thinking.budget_tokens",
        )
    return budget


def _choice(asked: MessagesRequest, tools: list[dict[str, Any]] | None) -> ToolChoice | None:
    match asked.tool_choice:
        case AnyChoice():
            return "required"
        case ToolNameChoice(name=name):
            return NamedTool(NamedFunction(name))
        case NoChoice():
            return "none"
        case _:
            return None if tools is None else "auto"


def _tools(asked: MessagesRequest) -> list[tuple[Tool, str]]:
    """Return the tools at the end of the conversation, each with its place."""
    tools = {tool.name: (tool, f"tools[{index}]") for index, tool in enumerate(asked.tools or ())}
    removed: set[str] = set()
    for index, message in enumerate(asked.messages):
        for number, block in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(block, ToolAddition | ToolRemoval):
                _change(tools, removed, block, f"messages[{index}].content[{number}].tool")
    return [tool for name, tool in tools.items() if name not in removed]


def _change(
    tools: dict[str, tuple[Tool, str]], removed: set[str], block: ToolAddition | ToolRemoval, param: str
) -> None:
    change = block.tool
    if isinstance(change, DefinedChange):
        name = change.definition.name
        tools[name] = (change.definition, f"{param}.definition")
    elif (name := change.name) not in tools:
        raise InvalidRequest(f"No tool is named {name[:200]!r}.", param=f"{param}.name")
    if isinstance(block, ToolRemoval):
        removed.add(name)
        return
    removed.discard(name)
    if isinstance(change, NamedChange):
        tool, origin = tools[name]
        tools[name] = (msgspec.structs.replace(tool, defer_loading=None), origin)


@dataclass
class _Turn:
    """What the blocks of one message become, each with its place."""

    parts: list[tuple[Part, str]] = field(default_factory=list)
    calls: list[tuple[ToolCall, str]] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)

    def take(self, block: Block, at: str) -> None:
        """Add what one block becomes; nothing, where it is closed to us or empty."""
        match block:
            case Text(text=text):
                self.parts += [(TextPart(text), at)] if text else []
            case Image(source=source):
                self.parts.append((ImageUrlPart(source.url()), at))
            case Thinking(thinking=thinking):
                self.thoughts.append(thinking)
            case ToolUse():
                self.calls.append((ToolCall(id=block.id, function=FunctionCall(block.name, block.input or {})), at))
            case ToolResult():
                self.parts.append((TextPart(f"Tool result: {_result_text(block, at)}"), at))
            case ToolAddition() | ToolRemoval():
                raise InvalidRequest("Tools are added and removed in messages of the system only.", param=at)


class _Conversation:
    """Builds the messages of the chat request, and notes where they come from."""

    def __init__(self, habits: Habits) -> None:
        self.messages: list[Message] = []
        self.places: dict[str, str] = {}
        self._habits = habits

    def system(self, asked: MessagesRequest) -> None:
        """Add the leading message of the system."""
        texts = [asked.system] if isinstance(asked.system, str) else _system_texts(asked.system or ())
        if not self._habits.late_system:
            for message in asked.messages:
                if message.role == "system":
                    texts += _system_texts(message.content)
        if any(texts):
            self._add(Message(role="system", content="".join(texts)), "system")

    def message(self, message: AnthropicMessage, place: str) -> None:
        """Add what one message becomes."""
        if message.role == "system":
            if self._habits.late_system and (text := "".join(_system_texts(message.content))):
                self._add(Message(role="system", content=text), place)
            return
        if isinstance(message.content, str):
            self._add(Message(role=message.role, content=message.content), place)
            return
        self._blocks(message.role, message.content, place)

    def _blocks(self, role: Literal["user", "assistant"], blocks: Sequence[Block], place: str) -> None:
        turn = _Turn()
        for index, block in enumerate(blocks):
            at = f"{place}.content[{index}]"
            if isinstance(block, ToolResult) and role == "user":
                self._result(block, at)
            else:
                turn.take(block, at)
        if role == "user" and not turn.parts and not turn.calls and not turn.thoughts:
            return
        message = Message(role=role, reasoning="".join(turn.thoughts) if turn.thoughts else None)
        message.tool_calls = [call for call, _ in turn.calls] or None
        self._add(message, place, turn.parts)
        for number, (_, at) in enumerate(turn.calls):
            self.places[f"messages[{len(self.messages) - 1}].tool_calls[{number}]"] = at

    def _result(self, result: ToolResult, place: str) -> None:
        texts, pictures, references = [], [], []
        blocks = [Text(result.content)] if isinstance(result.content, str) else result.content or []
        for index, block in enumerate(blocks):
            at = f"{place}.content[{index}]"
            match block:
                case Text(text=text):
                    texts.append(text)
                case Image(source=source):
                    pictures.append((ImageUrlPart(source.url()), at))
                case ToolReference():
                    name = block.tool_name or block.name
                    references += [(ToolReferencePart(name), at)] if name else []
        identity = result.tool_use_id
        self._add(Message(role="tool", tool_call_id=identity, content="\n".join(texts)), place)
        if pictures:
            self._add(Message(role="user"), place, pictures)
        if references:
            self._add(Message(role="tool", tool_call_id=identity), place, references)

    def _add(self, message: Message, place: str, parts: Sequence[tuple[Part, str]] = ()) -> None:
        """Add a message, with ``parts`` as its content where it has any."""
        at = f"messages[{len(self.messages)}]"
        self.places[at] = place
        match parts:
            case []:
                pass
            case [(TextPart(text=text), _)]:
                message.content = text
            case _:
                message.content = [part for part, _ in parts]
        for number, (part, origin) in enumerate(parts):
            self.places[f"{at}.content[{number}]"] = origin
            if isinstance(part, ImageUrlPart):
                self.places[f"{at}.content[{number}].image_url"] = f"{origin}.source"
        self.messages.append(message)


def _system_texts(content: str | Sequence[Block]) -> list[str]:
    texts = [content] if isinstance(content, str) else [block.text for block in content if isinstance(block, Text)]
    return [text for text in texts if text and not is_attribution(text)]


def _result_text(result: ToolResult, place: str) -> str:
    """Return the text of a result that the assistant repeats."""
    if not isinstance(result.content, list):
        return result.content or ""
    for index, block in enumerate(result.content):
        if not isinstance(block, Text):
            raise InvalidRequest("A result that the assistant repeats is text.", param=f"{place}.content[{index}]")
    return "\n".join(block.text for block in result.content if isinstance(block, Text))
