"""Requests of OpenAI's Responses API, and how they become chat requests.

The conversion is that of vLLM's server for this API, so that prompts are equal:

- ``instructions`` are a message of the system, in front; an ``input`` that is a text is one of the user;
- calls, reasoning and answers that follow each other become one message of the assistant; a call's output is a message
  of the role ``tool``;
- of ``tools``, the template gets functions, also those of a namespace (as ``<namespace>__<name>``), and custom tools as
  functions of one text; tools that a server would run itself are not shown to the model;
- a last message or reasoning whose ``status`` says that it is not finished is continued.

Nothing is kept between requests: what refers to an earlier response is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.parts import (
    Content,
    FunctionCall,
    InputTextPart,
    Message,
    OutputTextPart,
    RefusalPart,
    TextPart,
    ToolCall,
)
from mmprep_frontend.render.places import Asked, Places
from mmprep_frontend.render.requests import ChatRequest, Delivered, check
from mmprep_frontend.render.responses_api import (
    SAME,
    CallOutputItem,
    CustomCallItem,
    CustomTool,
    FunctionCallItem,
    FunctionTool,
    MessageItem,
    NamedChoice,
    NamespaceTool,
    ReasoningItem,
    ResponsesRequest,
)
from mmprep_frontend.render.schema import Schema
from mmprep_frontend.render.tool_choice import NamedFunction, NamedTool, ToolChoice

_SCHEMA = Schema(ResponsesRequest)
_MESSAGE_ITEM = Schema(MessageItem)
_REASONING_ITEM = Schema(ReasoningItem)
_FUNCTION_CALL_ITEM = Schema(FunctionCallItem)
_CUSTOM_CALL_ITEM = Schema(CustomCallItem)
_CALL_OUTPUT_ITEM = Schema(CallOutputItem)
_FUNCTION_TOOL = Schema(FunctionTool)
_CUSTOM_TOOL = Schema(CustomTool)
_NAMESPACE_TOOL = Schema(NamespaceTool)
_STATEFUL = ("previous_response_id", "conversation", "prompt", "previous_input_messages")
_LOGPROBS = "message.output_text.logprobs"
#: Fields of the chat request that stand elsewhere here.
_PLACES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
#: What a custom tool's one argument is called, and says.
_CUSTOM_INPUT = "input"
_CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {_CUSTOM_INPUT: {"type": "string", "description": "The freeform text payload for this tool."}},
    "required": [_CUSTOM_INPUT],
    "additionalProperties": False,
}


class ResponsesChat(ChatRequest, kw_only=True):
    """The chat request that a Responses request means."""

    is_parsed: ClassVar[bool] = False


def read_responses(body: bytes | memoryview, *, trusted: bool, templates: bool) -> Asked:
    """Return the chat request that a Responses request means.

    Parameters
    ----------
    body: the JSON text, UTF-8.
    trusted, templates: as :func:`.requests.parse` has them.

    Raises
    ------
    InvalidRequest
        ``param`` is the place in ``body``.
    """
    asked = _SCHEMA.decode(body)
    for name in _STATEFUL:
        if getattr(asked, name) is not None:
            raise InvalidRequest(
                f"'{name}' is not supported: nothing is kept between requests; send the whole conversation as 'input'.",
                param=name,
            )
    conversation = _Conversation()
    conversation.read(asked)
    tools = [*_functions(asked.tools or ())]
    known = _PLACES | conversation.places
    for index, (_, origin) in enumerate(tools):
        known[f"tools[{index}]"] = known[f"tools[{index}].function"] = origin
    places = Places(known)
    with places.renaming():
        request = _chat_request(asked, conversation, [tool for tool, _ in tools])
        check(request, trusted=trusted, templates=templates)
    return Asked(request, places)


def _chat_request(asked: ResponsesRequest, conversation: _Conversation, tools: list[dict[str, Any]]) -> ResponsesChat:
    delivered = {name: getattr(asked, name) for name in Delivered.__struct_fields__}
    if asked.truncation != "disabled" and asked.truncate_prompt_tokens is None:
        delivered["truncate_prompt_tokens"] = -1
    wants_logprobs = asked.include is not None and _LOGPROBS in asked.include
    return ResponsesChat(
        **delivered,
        **{name: getattr(asked, name) for name in SAME},
        messages=conversation.messages,
        max_completion_tokens=asked.max_output_tokens,
        reasoning_effort=None if asked.reasoning is None else asked.reasoning.effort,
        response_format=_response_format(asked),
        logprobs=wants_logprobs,
        top_logprobs=asked.top_logprobs if wants_logprobs else None,
        tools=tools or None,
        tool_choice=_choice(asked, tools),
        add_generation_prompt=not conversation.is_open,
        continue_final_message=conversation.is_open,
    )


def _response_format(asked: ResponsesRequest) -> dict[str, Any] | None:
    given = None if asked.text is None else asked.text.format
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": given.name, "schema": given.schema}}


def _choice(asked: ResponsesRequest, tools: list[dict[str, Any]]) -> ToolChoice | None:
    choice = asked.tool_choice
    if not isinstance(choice, NamedChoice):
        return choice if tools or choice == "required" else None
    names = [tool["function"]["name"] for tool in tools]
    if choice.name not in names:
        inner = [name for name in names if name.partition("__")[2] == choice.name]
        if len(inner) > 1:
            raise InvalidRequest(
                f"'tool_choice' may mean {' or '.join(inner)[:400]}; give the whole name.", param="tool_choice.name"
            )
        return NamedTool(NamedFunction(inner[0] if inner else choice.name))
    return NamedTool(NamedFunction(choice.name))


# --- tools ------------------------------------------------------------------------------------------------------------


def _functions(tools: list[dict[str, Any]] | tuple[()]) -> Iterator[tuple[dict[str, Any], str]]:
    """Return the functions that the model is shown, as the chat API has them, each with its place."""
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        match tool.get("type"):
            case "function":
                yield _function(_FUNCTION_TOOL.convert(tool, place)), place
            case "custom":
                yield _custom(_CUSTOM_TOOL.convert(tool, place), place), place
            case "namespace":
                yield from _of_namespace(_NAMESPACE_TOOL.convert(tool, place), place)
            case str():
                pass  # the server would run it; the model is not told
            case _:
                raise InvalidRequest("A tool needs a type.", param=f"{place}.type")


def _function(tool: FunctionTool) -> dict[str, Any]:
    """Return a function with its fields in vLLM's order, which templates print."""
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    for name in ("strict", "defer_loading"):
        if getattr(tool, name) is not None:
            function[name] = getattr(tool, name)
    return {"type": "function", "function": function}


def _custom(tool: CustomTool, place: str) -> dict[str, Any]:
    if tool.format is not None and tool.format.get("type") == "grammar":
        raise InvalidRequest(
            "Custom tools of a grammar are not supported; only those of free text are.", param=f"{place}.format"
        )
    return _function(FunctionTool(name=tool.name, description=tool.description, parameters=_CUSTOM_PARAMETERS))


def _of_namespace(namespace: NamespaceTool, place: str) -> Iterator[tuple[dict[str, Any], str]]:
    for index, tool in enumerate(namespace.tools):
        at = f"{place}.tools[{index}]"
        if tool.get("type", "function") == "function":
            function = _FUNCTION_TOOL.convert(tool, at)
            function.name = f"{namespace.name}__{function.name}"
            yield _function(function), at


# --- items ------------------------------------------------------------------------------------------------------------


class _Conversation:
    """Builds the messages of the chat request, and notes where they come from."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.places: dict[str, str] = {}
        #: Whether the last message is to be continued.
        self.is_open = False

    def read(self, asked: ResponsesRequest) -> None:
        """Add what a request says."""
        if asked.instructions:
            self._add(Message(role="system", content=asked.instructions), "instructions")
        if isinstance(asked.input, str):
            self._add(Message(role="user", content=asked.input), "input")
            return
        if not asked.input:
            raise InvalidRequest("'input' must hold at least one item.", param="input")
        for index, item in enumerate(asked.input):
            self._item(item, f"input[{index}]")

    def _item(self, item: dict[str, Any], place: str) -> None:
        kind = item.get("type", "message" if "role" in item else None)
        read = self._readers.get(kind) if isinstance(kind, str) else None
        if read is None:
            told = f"{kind[:64]!r}" if isinstance(kind, str) else "this type"
            raise InvalidRequest(
                f"Items of {told} are not supported; send one of {', '.join(self._readers)}.", param=f"{place}.type"
            )
        self.is_open = False
        read(self, item, place)

    def _message(self, item: dict[str, Any], place: str) -> None:
        message = _MESSAGE_ITEM.convert(item, place)
        self.is_open = message.status in ("in_progress", "incomplete")
        content = _plain(message.content) if message.role == "assistant" else message.content
        previous = self._assistant() if message.role == "assistant" else None
        if previous is not None and previous.content is None:
            previous.content = content
            self._note("content", f"{place}.content")
        else:
            self._add(Message(role=message.role, content=content), place)

    def _reasoning(self, item: dict[str, Any], place: str) -> None:
        reasoning = _REASONING_ITEM.convert(item, place)
        if reasoning.encrypted_content:
            raise InvalidRequest(
                "Reasoning that is encrypted cannot be read here; send its text as 'content', or leave the item out.",
                param=f"{place}.encrypted_content",
            )
        self.is_open = reasoning.status in ("in_progress", "incomplete")
        texts = reasoning.content or reasoning.summary or []
        text = texts[0].text if texts else ""
        previous = self._assistant()
        if previous is not None and previous.reasoning is None:
            previous.reasoning = text
        else:
            self._add(Message(role="assistant", reasoning=text), place)

    def _function_call(self, item: dict[str, Any], place: str) -> None:
        call = _FUNCTION_CALL_ITEM.convert(item, place)
        name = f"{call.namespace}__{call.name}" if call.namespace else call.name
        self._call(ToolCall(id=call.call_id, function=FunctionCall(name, call.arguments)), place)

    def _custom_call(self, item: dict[str, Any], place: str) -> None:
        call = _CUSTOM_CALL_ITEM.convert(item, place)
        self._call(ToolCall(id=call.call_id, function=FunctionCall(call.name, {_CUSTOM_INPUT: call.input})), place)

    def _call(self, call: ToolCall, place: str) -> None:
        if (previous := self._assistant()) is None:
            previous = Message(role="assistant")
            self._add(previous, place)
        calls = previous.tool_calls = [*(previous.tool_calls or ()), call]
        number = f"tool_calls[{len(calls) - 1}]"
        self._note(number, place)
        self._note(f"{number}.function.arguments", f"{place}.arguments")

    def _output(self, item: dict[str, Any], place: str) -> None:
        output = _CALL_OUTPUT_ITEM.convert(item, place)
        self._add(Message(role="tool", content=output.output, tool_call_id=output.call_id), place)
        self._note("content", f"{place}.output")

    def _assistant(self) -> Message | None:
        """Return the last message, where it is the assistant's."""
        return self.messages[-1] if self.messages and self.messages[-1].role == "assistant" else None

    def _add(self, message: Message, place: str) -> None:
        self.places[f"messages[{len(self.messages)}]"] = place
        self.messages.append(message)

    def _note(self, inner: str, place: str) -> None:
        """Note where something in the last message comes from."""
        self.places[f"messages[{len(self.messages) - 1}].{inner}"] = place

    _readers: ClassVar[dict[str, Callable[[_Conversation, dict[str, Any], str], None]]] = {
        "message": _message,
        "reasoning": _reasoning,
        "function_call": _function_call,
        "function_call_output": _output,
        "custom_tool_call": _custom_call,
        "custom_tool_call_output": _output,
    }


def _plain(content: Content) -> Content:
    """Return an answer's one text as a text; anything else as it is."""
    match content:
        case [TextPart(text=text) | InputTextPart(text=text) | OutputTextPart(text=text) | RefusalPart(refusal=text)]:
            return text
    return content
