"""A model's chat template: found in the model directory, compiled once, rendered in a sandbox.

The environment behaves as that of transformers' ``apply_chat_template``, so that prompts are equal: blocks trimmed,
``break`` and ``continue``, ``tojson`` without HTML escapes, ``raise_exception``, ``strftime_now`` and the
``{% generation %}`` tag. What differs is the source: placeholders are hidden in it, see :mod:`.sentinels`.

Templates of requests are not accepted: the only one that runs is the model's, which the operator chose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmprep.errors import InvalidRequest, StartupError
from mmprep_frontend.render.conversation import ContentFormat, Conversation, detect_format
from mmprep_frontend.render.requests import ChatRequest, TokenizeRequest, template_kwargs
from mmprep_frontend.render.sentinels import Sentinels

#: Variables of a template that requests set by fields of their own, not by ``chat_template_kwargs``.
_RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
)
_LONGEST_REFUSAL = 1000


class _Compiled(NamedTuple):
    template: jinja2.Template
    content_format: ContentFormat


class ChatTemplate:
    """The chat templates of one model, by name.

    Parameters
    ----------
    sources:
        The templates' texts by name: ``default``, and ``tool_use`` for requests with tools, where the model has one.
        May be empty: then every rendering is refused.
    special_tokens:
        The tokenizer's, by name, as ``{"eos_token": "<|im_end|>"}``: variables of the template.
    sentinels:
        Of the model's card.

    Raises
    ------
    StartupError
        A template cannot be compiled.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], sentinels: Sentinels) -> None:
        environment = _environment()
        self._sentinels = sentinels
        self._special_tokens = {name: sentinels.hide(text) for name, text in special_tokens.items()}
        self._depends_on_time = any("strftime_now" in source for source in sources.values())
        self._compiled = {name: _compile(environment, sentinels.hide(source)) for name, source in sources.items()}

    @property
    def depends_on_time(self) -> bool:
        """Whether a template asks for the time, so that the same conversation may give another prompt later."""
        return self._depends_on_time

    def format_for(self, request: ChatRequest | TokenizeRequest) -> ContentFormat:
        """Return what the template for ``request`` takes as a message's content."""
        return self._select(request).content_format

    def render(self, conversation: Conversation, request: ChatRequest | TokenizeRequest) -> str:
        """Return the prompt's text, with sentinels where media belong.

        Parameters
        ----------
        conversation: the request's, from :func:`.conversation.walk` in this template's format.
        request: gives the template its other variables.

        Raises
        ------
        InvalidRequest
            The model has no template, the template refuses the conversation or fails on it, or the request sets a
            variable that is not its to set.
        """
        template = self._select(request).template
        variables = self._variables(conversation, request)
        if request.continue_final_message:
            variables["messages"] = self._open_ended(conversation.messages)
        try:
            text = template.render(variables)
        except _RaisedByTemplateError as error:
            message = self._sentinels.show(str(error))[:_LONGEST_REFUSAL]
            raise InvalidRequest(f"The chat template refuses the conversation: {message}", param="messages") from None
        except Exception:  # noqa: BLE001 - a template can fail in any way, and only because of what it was given
            raise InvalidRequest(
                "The model's chat template cannot render this conversation; check the roles, their order and the tools.",
                param="messages",
            ) from None
        return self._cut(text) if request.continue_final_message else text

    def _select(self, request: ChatRequest | TokenizeRequest) -> _Compiled:
        if request.tools is not None and "tool_use" in self._compiled:
            return self._compiled["tool_use"]
        if "default" not in self._compiled:
            raise InvalidRequest("This model has no chat template; send a text to /v1/completions/render instead.")
        return self._compiled["default"]

    def _variables(self, conversation: Conversation, request: ChatRequest | TokenizeRequest) -> dict[str, Any]:
        extra = template_kwargs(request)
        if reserved := _RESERVED.intersection(extra):
            name = min(reserved)
            raise InvalidRequest(
                f"'chat_template_kwargs' cannot set '{name}'; use the request's own field.",
                param=f"chat_template_kwargs.{name}",
            )
        self._refuse_sentinels(conversation, request, extra)
        return {
            **self._special_tokens,
            **extra,
            "messages": conversation.messages,
            "tools": request.tools,
            "documents": request.documents,
            "add_generation_prompt": request.add_generation_prompt,
        }

    def _refuse_sentinels(
        self, conversation: Conversation, request: ChatRequest | TokenizeRequest, extra: dict[str, Any]
    ) -> None:
        """Refuse a request that holds sentinels which the walk did not put there."""
        try:
            sent = msgspec.json.encode((conversation.messages, request.tools, request.documents, extra))
        except RecursionError:
            raise InvalidRequest("The request is nested too deeply.") from None
        if self._sentinels.count(sent) != conversation.sentinels:
            raise InvalidRequest("The text holds a word that is reserved by this service.", param="messages")

    def _open_ended(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return ``messages`` with a tail on the last one's last text, so that the prompt can be cut there.

        The tail ends in a space: where it is gone from the rendered text, the template strips contents.
        """
        tail = f"{self._sentinels.tail} "
        content = messages[-1]["content"]
        if isinstance(content, str):
            content += tail
        else:
            last = max((index for index, part in enumerate(content) if part["type"] == "text"), default=None)
            if last is None:
                raise InvalidRequest("The final message has no text to continue.", param="continue_final_message")
            content = [*content]
            content[last] = {**content[last], "text": content[last]["text"] + tail}
        return [*messages[:-1], {**messages[-1], "content": content}]

    def _cut(self, text: str) -> str:
        tail = self._sentinels.tail
        end = text.rfind(tail)
        if end < 0:
            raise InvalidRequest(
                "The chat template leaves the final message out, so it cannot be continued.",
                param="continue_final_message",
            )
        kept = text[:end]
        return kept if text.startswith(" ", end + len(tail)) else kept.rstrip()


def load_sources(directory: Path) -> dict[str, str]:
    """Return the chat templates of a model directory in Hugging Face layout, by name; empty where it has none.

    The first of ``chat_template.jinja``, ``chat_template.json`` and ``tokenizer_config.json`` that gives a template
    counts; ``additional_chat_templates/*.jinja`` add to it.

    Raises
    ------
    StartupError
        One of the files is broken.
    """
    sources: dict[str, str] = {}
    try:
        if (file := directory / "chat_template.jinja").is_file():
            sources["default"] = file.read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            if not sources and (file := directory / name).is_file():
                sources = _named(json.loads(file.read_text(encoding="utf-8")).get("chat_template"))
        for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            sources.setdefault(file.stem, file.read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise StartupError("A chat template file of the model directory cannot be read; check its JSON.") from None
    return sources


def _named(entry: Any) -> dict[str, str]:
    """Return the templates of a ``chat_template`` entry: one text, a list of named ones, or nothing."""
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {"default": entry}
    return {str(one["name"]): str(one["template"]) for one in entry}


class _RaisedByTemplateError(jinja2.TemplateError):
    """The template called ``raise_exception``."""


def _raise_exception(message: object) -> None:
    raise _RaisedByTemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - templates mean the local time, as the reference does


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}``, which marks the assistant's words for training, renders its body."""

    tags = {"generation"}  # noqa: RUF012 - declared so by the base class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _compile(environment: ImmutableSandboxedEnvironment, source: str) -> _Compiled:
    try:
        return _Compiled(environment.from_string(source), detect_format(environment.parse(source)))
    except jinja2.TemplateSyntaxError as error:
        raise StartupError(f"The model's chat template cannot be compiled: line {error.lineno}.") from None
