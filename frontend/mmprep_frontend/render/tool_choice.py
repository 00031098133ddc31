"""What a choice of tools asks of the generation: none, or JSON that calls one of them.

A call of a *named* tool is JSON of that tool's parameters, a *required* call is a list of ``{"name", "parameters"}`` of
any of them. These are the schemas that vLLM's JSON-based tool parsers read, and put into ``structured_outputs``.
Templates get the tools as they were sent, whatever the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from mmprep.errors import InvalidRequest


class NamedFunction(Struct):
    """The one function that must be called."""

    name: str


class NamedTool(Struct):
    """A choice of one tool."""

    function: NamedFunction
    type: Literal["function"] = "function"


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | NamedTool
Tools: TypeAlias = Sequence[dict[str, Any]]

_ANY_OBJECT = {"type": "object", "properties": {}}


def check_tool_choice(tools: Tools | None, choice: ToolChoice | None) -> None:
    """Refuse a choice that the tools do not allow.

    Raises
    ------
    InvalidRequest
        There are no tools, the named one is not among them, or one that may have to be called has no name.
    """
    if tools is not None and not tools:
        raise InvalidRequest("'tools' must hold at least one tool; leave it out where there is none.", param="tools")
    if choice is None or choice == "none":
        return
    if tools is None:
        raise InvalidRequest("'tool_choice' needs 'tools'.", param="tool_choice")
    if choice == "auto":
        return
    names = [name for name, _ in functions(tools)]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise InvalidRequest(
            f"'tool_choice' names {choice.function.name[:200]!r}, which is none of 'tools'.", param="tool_choice"
        )
    _definitions(tools)


def forced_schema(tools: Tools | None, choice: ToolChoice | None, *, parallel: bool) -> dict[str, Any] | None:
    """Return the JSON schema of what must be generated, ``None`` where nothing must.

    Parameters
    ----------
    tools, choice: that :func:`check_tool_choice` has let through.
    parallel: whether several tools may be called at once.
    """
    if tools is None or choice is None or choice in ("none", "auto"):
        return None
    if isinstance(choice, NamedTool):
        return next(parameters for name, parameters in functions(tools) if name == choice.function.name)
    calls = [
        {
            "properties": {"name": {"type": "string", "enum": [name]}, "parameters": _without_definitions(parameters)},
            "required": ["name", "parameters"],
        }
        for name, parameters in functions(tools)
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    if definitions := _definitions(tools):
        schema["$defs"] = definitions
    return schema


def functions(tools: Tools) -> list[tuple[str, dict[str, Any]]]:
    """Return name and parameters of every tool; raises InvalidRequest for one that is no function with a name."""
    found = []
    for index, tool in enumerate(tools):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise InvalidRequest("A tool needs a function with a name.", param=f"tools[{index}].function.name")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise InvalidRequest("A tool's parameters are a JSON schema.", param=f"tools[{index}].function.parameters")
        found.append((name, parameters or _ANY_OBJECT))
    return found


def _definitions(tools: Tools) -> dict[str, Any]:
    """Return the ``$defs`` of all tools; raises InvalidRequest where two define one name differently."""
    found: dict[str, Any] = {}
    for index, (_, parameters) in enumerate(functions(tools)):
        definitions = parameters.get("$defs", {})
        if not isinstance(definitions, dict):
            raise InvalidRequest("'$defs' must be an object.", param=f"tools[{index}].function.parameters")
        for name, definition in definitions.items():
            if found.setdefault(name, definition) != definition:
                raise InvalidRequest(
                    f"Two tools define {name[:200]!r} in their '$defs' differently; give them different names.",
                    param=f"tools[{index}].function.parameters",
                )
    return found


def _without_definitions(parameters: dict[str, Any]) -> dict[str, Any]:
    # References like "#/$defs/Point" are looked up at the root of the whole schema.
    return {name: value for name, value in parameters.items() if name != "$defs"}
