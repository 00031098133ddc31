"""Walks a conversation: takes the media out and makes messages that the model's chat template understands.

Templates differ in what a message's ``content`` may be. Which one a template takes is read from its syntax tree:

========  ==========================================================  ==========================================
format    the template                                                 content that it gets
========  ==========================================================  ==========================================
string    never loops over a message's content                         a string; media as the card's ``part_text``
parts     loops over it, and nothing else                              a list of parts; media as
                                                                       ``{"type": "image", "image": ""}``
both      loops over it, and tests whether it is a string              as it was sent
========  ==========================================================  ==========================================

In format *string* the parts of a message are joined by line breaks, in the order in which they were sent. What a tool
answered is one text in every format, unless there is more to it than texts. A medium has a key of its modality beside its
type: some templates look for the one (Qwen2-Audio's), most for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec
from jinja2 import nodes

from mmprep.card import ModelCard, Placeholder
from mmprep.errors import InvalidRequest
from mmprep_frontend.render.attribution import is_attribution, without_attribution
from mmprep_frontend.render.parts import (
    AudioUrlPart,
    Content,
    ImageEmbedsPart,
    ImageUrlPart,
    InputAudioPart,
    InputImagePart,
    InputTextPart,
    MediumPart,
    Message,
    OutputTextPart,
    Part,
    RefusalPart,
    TextPart,
    ThinkingPart,
    ToolCall,
    ToolReferencePart,
    Url,
    VideoUrlPart,
)
from mmprep_frontend.render.sentinels import Sentinels

ContentFormat: TypeAlias = Literal["string", "parts", "both"]


@dataclass(frozen=True)
class MediaPart:
    """One medium of a conversation.

    Attributes
    ----------
    modality: ``image``, ``video`` or ``audio``.
    url: where its bytes are; where it is ``bare``, the bytes themselves, in base64; empty where it has none, but a uuid. A
        data URL may still be where it was in the request, see :mod:`.data_urls`.
    param: where the request says so.
    bare: whether there is no URL around the data.
    uuid: the caller's name for it, if any.
    grid: of a medium that is embedded already: its sides in patches, as the request says them; ``None`` for others.
    """

    modality: str
    url: str | memoryview
    param: str
    bare: bool = False
    uuid: str | None = None
    grid: str | tuple[int, ...] | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages for the template, and the media that were taken out of them, both in order.

    ``sentinels`` is the number of sentinels that the messages hold: all media in format *string*, else none.
    """

    messages: list[dict[str, Any]]
    media: list[MediaPart]
    sentinels: int


def walk(
    messages: Sequence[Message], card: ModelCard, content_format: ContentFormat, sentinels: Sentinels
) -> Conversation:
    """Return the conversation as the template takes it.

    Parameters
    ----------
    messages: as the request has them.
    card: of the served model; says which modalities it takes.
    content_format: of the template, from :func:`detect_format`.
    sentinels: of the card.

    Raises
    ------
    InvalidRequest
        A part is of a kind that the model or the service does not take, a content is missing, or a tool call's
        arguments are no JSON object. ``param`` names the place.
    """
    walker = _Walker(card, content_format, sentinels)
    converted = [walker.message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    return Conversation(converted, walker.media, len(walker.media) if content_format == "string" else 0)


def media_urls(messages: Sequence[Message]) -> Iterator[str]:
    """Return the URLs of all media in messages, in order; empty ones where they have none."""
    for message in messages:
        if isinstance(message.content, list):
            for part in message.content:
                if isinstance(part, MediumPart):
                    yield _source(part)[2]


class _Walker:
    def __init__(self, card: ModelCard, content_format: ContentFormat, sentinels: Sentinels) -> None:
        self.media: list[MediaPart] = []
        self._card = card
        self._format = content_format
        self._sentinels = sentinels

    def message(self, message: Message, param: str) -> dict[str, Any]:
        if message.content is None and message.role != "assistant":
            raise InvalidRequest(f"A message of role '{message.role}' needs a content.", param=f"{param}.content")
        content = self._content(message.content, param)
        if message.role == "tool":
            content = _one_text(content)
        elif message.role == "system":
            content = _without_attribution(content)
        converted: dict[str, Any] = {"role": message.role, "content": content}
        if message.name is not None:
            converted["name"] = message.name
        if message.tool_call_id is not None:
            converted["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            converted["tool_calls"] = [
                _tool_call(call, f"{param}.tool_calls[{index}]") for index, call in enumerate(message.tool_calls)
            ]
        given = (message.reasoning_content, message.thinking, message.reasoning)
        reasoning = next((text for text in given if text is not None), None)
        if reasoning is not None:
            # Templates read it under any of the names.
            converted |= {"reasoning_content": reasoning, "thinking": reasoning, "reasoning": reasoning}
        return converted

    def _content(self, content: Content | None, param: str) -> str | list[dict[str, Any]]:
        # An absent content becomes an empty one: templates that join it to a string would fail on a null.
        if content is None:
            content = ""
        if isinstance(content, str):
            if self._format != "parts":
                return content
            return [{"type": "text", "text": content}] if content else []
        parts = [self._part(part, f"{param}.content[{index}]") for index, part in enumerate(content)]
        if self._format == "string":
            return "\n".join(map(self._as_text, parts))
        return list(map(_as_part, parts))

    def _as_text(self, part: str | Placeholder | ToolReferencePart) -> str:
        if isinstance(part, ToolReferencePart):
            return part.name
        return self._sentinels.part_text(part) if isinstance(part, Placeholder) else part

    def _part(self, part: Part | str, param: str) -> str | Placeholder | ToolReferencePart:
        """Return the part's text, or the placeholder of its medium, which is noted in ``media``."""
        if isinstance(part, str | ToolReferencePart):
            return part
        if isinstance(part, TextPart | InputTextPart | OutputTextPart):
            return part.text
        if isinstance(part, ThinkingPart):
            return part.thinking
        if isinstance(part, RefusalPart):
            return part.refusal
        if isinstance(part, ImageEmbedsPart):
            if part.uuid is not None:
                raise InvalidRequest("Embeddings are found under no name: leave 'uuid' out.", param=f"{param}.uuid")
            medium = self._embedded(part, param)
        else:
            medium = _medium(part, param)
        placeholder = self._card.placeholder(medium.modality)
        if placeholder is None:
            raise InvalidRequest(f"This model takes no media of modality '{medium.modality}'.", param=f"{param}.type")
        if any(
            other.modality == medium.modality and (other.grid is None) != (medium.grid is None) for other in self.media
        ):
            raise InvalidRequest(
                f"Media of modality '{medium.modality}' are all embedded already or none is; engines take no mixture.",
                param=f"{param}.type",
            )
        self.media.append(medium)
        return placeholder

    def _embedded(self, part: ImageEmbedsPart, param: str) -> MediaPart:
        how = self._card.embeds.get("image")
        if how is None:
            raise InvalidRequest("This model takes no pictures that are embedded already.", param=f"{param}.type")
        given, place = part.image_embeds, f"{param}.image_embeds"
        rows = given.get(how.field) if isinstance(given, dict) else None
        grid = given.get(how.grid) if isinstance(given, dict) else None
        if not isinstance(given, dict) or not isinstance(rows, str) or grid is None or len(given) != len((rows, grid)):
            raise InvalidRequest(
                f"This model takes an object of '{how.field}', a .npy file in base64, and '{how.grid}', three numbers.",
                param=place,
            )
        return MediaPart("image", rows, place, bare=True, grid=grid if isinstance(grid, str) else tuple(grid))


def _as_part(part: str | Placeholder | ToolReferencePart) -> dict[str, Any]:
    if isinstance(part, ToolReferencePart):
        return {"type": "tool_reference", "name": part.name}
    if isinstance(part, Placeholder):
        return {"type": part.modality, part.modality: ""}
    return {"type": "text", "text": part}


def _one_text(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return texts as one, which is what templates take as a tool's answer; anything else as it is."""
    if isinstance(content, str) or any(part["type"] != "text" for part in content):
        return content
    return "\n".join(part["text"] for part in content)


def _without_attribution(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return without_attribution(content)
    marked = [part for part in content if part["type"] == "text" and is_attribution(part["text"])]
    if not marked:
        return content
    parts = ({**part, "text": without_attribution(part["text"])} if part in marked else part for part in content)
    return [part for part in parts if part["type"] != "text" or part["text"]]


def _source(part: MediumPart) -> tuple[str, str, str]:
    """Return a medium's modality, the name of the field that says where it is, and what that says."""
    match part:
        case ImageUrlPart() | InputImagePart():
            return "image", "image_url", _url(part.image_url)
        case VideoUrlPart():
            return "video", "video_url", _url(part.video_url)
        case AudioUrlPart():
            return "audio", "audio_url", _url(part.audio_url)
        case InputAudioPart():
            return "audio", "input_audio", (part.input_audio and part.input_audio.data) or ""


def _medium(part: MediumPart, param: str) -> MediaPart:
    modality, name, url = _source(part)
    if not url and part.uuid is None:
        raise InvalidRequest(
            "The part has no data: send them, or the 'uuid' with which they were sent before.", param=f"{param}.{name}"
        )
    place = f"{param}.{name}" if url else f"{param}.uuid"
    return MediaPart(modality, url, place, isinstance(part, InputAudioPart), part.uuid)


def _url(value: Url | str | None) -> str:
    return (value.url if isinstance(value, Url) else value) or ""


def _tool_call(call: ToolCall, param: str) -> dict[str, Any]:
    """Return ``call`` with its arguments as an object, which is what templates print."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        arguments = _arguments(arguments, f"{param}.function.arguments")
    converted: dict[str, Any] = {"type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
    return converted if call.id is None else {"id": call.id, **converted}


def _arguments(text: str, param: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        raise InvalidRequest("A tool call's arguments must be the text of a JSON object.", param=param) from None


def detect_format(tree: nodes.Template) -> ContentFormat:
    """Return what the template of syntax tree ``tree`` takes as a message's content.

    A content is ``….content`` or ``…['content']``, and any name that one is assigned to or that is the parameter of a
    macro called with one.
    """
    names = _content_names(tree)
    if not any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For)):
        return "string"
    tests = (test for test in tree.find_all(nodes.Test) if test.name == "string")
    return "both" if any(_is_content(test.node, names) for test in tests) else "parts"


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    while isinstance(node, nodes.Filter):
        node = node.node
    if isinstance(node, nodes.CondExpr):
        return _is_content(node.expr1, names) or _is_content(node.expr2, names)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names


def _content_names(tree: nodes.Template) -> set[str]:
    """Return the names that hold a content, followed through assignments and calls of macros until none is new."""
    macros = {macro.name: [str(arg.name) for arg in macro.args] for macro in tree.find_all(nodes.Macro)}
    flows = [*_assignments(tree), *_arguments_of_macros(tree, macros)]
    names: set[str] = set()
    while new := {name for name, value in flows if name not in names and _is_content(value, names)}:
        names |= new
    return names


def _assignments(tree: nodes.Template) -> Iterable[tuple[str, nodes.Node]]:
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name):
            yield assign.target.name, assign.node


def _arguments_of_macros(tree: nodes.Template, macros: dict[str, list[str]]) -> Iterable[tuple[str, nodes.Node]]:
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            yield from zip(macros[call.node.name], call.args, strict=False)
            yield from ((keyword.key, keyword.value) for keyword in call.kwargs)
