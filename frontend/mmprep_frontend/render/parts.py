"""The messages of a conversation and their parts, as the APIs name them.

A medium's data may be absent, empty or null in every form in which clients say so. That a part without them has a ``uuid`` is
checked where the conversation is walked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

_Encoded = Annotated[str, Meta(min_length=1)]
#: Clients of engines take hashes, and also whole URLs.
_Uuid = Annotated[str, Meta(min_length=1, max_length=1024)]


class TextPart(Struct, tag="text", tag_field="type"):
    """Text of a message."""

    text: str


class InputTextPart(Struct, tag="input_text", tag_field="type"):
    """Text, as OpenAI's responses API names what is asked."""

    text: str


class OutputTextPart(Struct, tag="output_text", tag_field="type"):
    """Text, as OpenAI's responses API names what was answered."""

    text: str


class ThinkingPart(Struct, tag="thinking", tag_field="type"):
    """What the assistant thought, as text among texts."""

    thinking: str


class ToolReferencePart(Struct, tag="tool_reference", tag_field="type"):
    """The name of a tool that a search found; templates expand it."""

    name: str


class RefusalPart(Struct, tag="refusal", tag_field="type"):
    """An earlier refusal of the assistant; it is text to the template."""

    refusal: str


class Url(Struct):
    """Where a medium is. ``detail``, of pictures, is accepted and changes nothing, as in engines."""

    url: str | None = None
    detail: str | None = None


class InputAudio(Struct):
    """A recording in base64. What ``format`` says is not looked at: its bytes tell."""

    data: str | None = None
    format: str | None = None


class ImageUrlPart(Struct, tag="image_url", tag_field="type"):
    """A picture, as OpenAI's chat API names it."""

    image_url: Url | str | None = None
    uuid: _Uuid | None = None


class InputImagePart(Struct, tag="input_image", tag_field="type"):
    """A picture, as OpenAI's responses API names it."""

    image_url: Url | str | None = None
    detail: str | None = None
    uuid: _Uuid | None = None


class VideoUrlPart(Struct, tag="video_url", tag_field="type"):
    """A video, as engines name it."""

    video_url: Url | str | None = None
    uuid: _Uuid | None = None


class AudioUrlPart(Struct, tag="audio_url", tag_field="type"):
    """A recording, as engines name it."""

    audio_url: Url | str | None = None
    uuid: _Uuid | None = None


class InputAudioPart(Struct, tag="input_audio", tag_field="type"):
    """A recording, as OpenAI's chat API names it."""

    input_audio: InputAudio | None = None
    uuid: _Uuid | None = None


class ImageEmbedsPart(Struct, tag="image_embeds", tag_field="type"):
    """A picture that is embedded already: a ``.npy`` file in base64, or that with what the family needs beside it."""

    image_embeds: _Encoded | dict[str, _Encoded | list[int]]
    uuid: Any = None


MediumPart: TypeAlias = ImageUrlPart | InputImagePart | VideoUrlPart | AudioUrlPart | InputAudioPart
WordsPart: TypeAlias = TextPart | InputTextPart | OutputTextPart | ThinkingPart | RefusalPart
Part: TypeAlias = WordsPart | ToolReferencePart | MediumPart | ImageEmbedsPart


#: Parts that engines know without their type, by the key that has its name; in their order.
UNTYPED = ("image_url", "image_embeds", "audio_url", "input_audio", "video_url", "tool_reference")


class FunctionCall(Struct):
    """Which function the assistant called; ``arguments`` is JSON text, or the object itself."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Struct, kw_only=True):
    """One call of a tool by the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


Content: TypeAlias = str | list[Part | str]


class Message(Struct, kw_only=True):
    """One message of a conversation. The three names of the reasoning are those that clients use for one thing."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    thinking: str | None = None
    reasoning: str | None = None
