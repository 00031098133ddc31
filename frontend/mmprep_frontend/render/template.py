"""A model's chat templates: found in the model directory, compiled once, rendered in a bounded sandbox.

What runs is not quite the template's source: placeholders are hidden in it, see :mod:`.sentinels`. Where the operator
trusts requests with it, they may bring a template of their own, or name one of the model's. A request's own are kept for
a while, since clients send the same one again and again.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import msgspec

from mmprep.errors import InvalidRequest, StartupError
from mmprep_frontend.render.bounded_jinja import BoundedEnvironment, OverBudgetError, RaisedByTemplateError
from mmprep_frontend.render.conversation import ContentFormat, Conversation, detect_format
from mmprep_frontend.render.developers import developers_as_system
from mmprep_frontend.render.requests import ChatRequest, Effort, TokenizeRequest, template_kwargs
from mmprep_frontend.render.sentinels import Sentinels

#: Variables of a template that requests set by fields of their own, not by ``chat_template_kwargs``.
_RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
)
_LONGEST_REFUSAL = 1000
#: Conversations that are tried at the start; templates get nothing else, as where vLLM tries the same.
_LATE_SYSTEM = tuple({"role": role, "content": "t"} for role in ("system", "user", "system", "user"))
_ONE_TURN = ({"role": "user", "content": "Hi"},)
_EFFORTS: tuple[Effort, ...] = ("low", "medium", "high", "xhigh", "max")
#: Characters of a request's own template, and how many of them are kept.
_LONGEST_SOURCE = 64 * 1024
_MOST_KEPT = 32


class _Compiled(NamedTuple):
    """One template. ``knows_developers``: it makes something of a message's role ``developer``."""

    environment: BoundedEnvironment
    template: jinja2.Template
    content_format: ContentFormat
    depends_on_time: bool
    knows_developers: bool


class Habits(NamedTuple):
    """What a model's templates make of what other APIs allow.

    Attributes
    ----------
    late_system: they take messages of the system behind others.
    quiet_effort: the effort that means no thinking: ``none``, unless it is as good as one that means some.
    """

    late_system: bool
    quiet_effort: Effort


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
        self._sentinels = sentinels
        self._special_tokens = {name: sentinels.hide(text) for name, text in special_tokens.items()}
        self._compiled = {name: self._compile_own(source) for name, source in sources.items()}
        self._habits = self._probe()
        self._of_requests: OrderedDict[str, _Compiled] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def habits(self) -> Habits:
        """What the templates make of conversations of other APIs."""
        return self._habits

    def depends_on_time(self, request: ChatRequest | TokenizeRequest) -> bool:
        """Whether the template asks for the time, so that the same conversation may give another prompt later."""
        return self._select(request).depends_on_time

    def is_ready(self, request: ChatRequest | TokenizeRequest) -> bool:
        """Whether the template is compiled; if not, :meth:`prepare` is work for the render thread."""
        source = request.chat_template
        return source is None or source in self._compiled or source in self._of_requests

    def prepare(self, request: ChatRequest | TokenizeRequest) -> None:
        """Compile the request's own template; raises InvalidRequest where it cannot be."""
        self._select(request)

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
        chosen = self._select(request)
        variables = self._variables(conversation, request)
        if not chosen.knows_developers:
            variables["messages"] = developers_as_system(conversation.messages)
        if request.continue_final_message:
            variables["messages"] = self._open_ended(variables["messages"])
        try:
            text = chosen.environment.rendered(chosen.template, variables)
        except OverBudgetError as error:
            raise InvalidRequest(
                f"The chat template was stopped: {error}. Shorten the conversation.", param="messages"
            ) from None
        except RaisedByTemplateError as error:
            message = self._sentinels.show(str(error))[:_LONGEST_REFUSAL]
            raise InvalidRequest(f"The chat template refuses the conversation: {message}", param="messages") from None
        except Exception:  # noqa: BLE001 - a template can fail in any way, and only because of what it was given
            raise InvalidRequest(
                "The model's chat template cannot render this conversation; check the roles, their order and the tools.",
                param="messages",
            ) from None
        return self._cut(text) if request.continue_final_message else text

    def _select(self, request: ChatRequest | TokenizeRequest) -> _Compiled:
        if request.chat_template is not None:
            return self._compiled.get(request.chat_template) or self._of_request(request.chat_template)
        if request.tools is not None and "tool_use" in self._compiled:
            return self._compiled["tool_use"]
        if "default" not in self._compiled:
            raise InvalidRequest("This model has no chat template; send a text to /v1/completions/render instead.")
        return self._compiled["default"]

    def _of_request(self, source: str) -> _Compiled:
        """Return a request's own template, compiled now or before; from the loop and the render thread."""
        with self._lock:
            if (known := self._of_requests.get(source)) is not None:
                self._of_requests.move_to_end(source)
                return known
        if len(source) > _LONGEST_SOURCE:
            raise InvalidRequest(
                f"'chat_template' has {len(source)} characters; at most {_LONGEST_SOURCE} are allowed.",
                param="chat_template",
            )
        try:
            compiled = self._compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidRequest(
                f"'chat_template' cannot be compiled: line {error.lineno}: {error.message}.", param="chat_template"
            ) from None
        except Exception:  # noqa: BLE001 - Python's compiler has limits of its own, and any template may meet them
            raise InvalidRequest("'chat_template' cannot be compiled.", param="chat_template") from None
        with self._lock:
            self._of_requests[source] = compiled
            while len(self._of_requests) > _MOST_KEPT:
                self._of_requests.popitem(last=False)
        return compiled

    def _compile_own(self, source: str) -> _Compiled:
        try:
            return self._compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise StartupError(f"the chat template cannot be compiled: line {error.lineno}: {error.message}") from None

    def _compile(self, source: str) -> _Compiled:
        hidden = self._sentinels.hide(source)
        # One each: it counts what its template spends, and templates are compiled on more than one thread.
        environment = BoundedEnvironment()
        return _Compiled(
            environment,
            environment.compiled(hidden),
            detect_format(environment.parse(hidden)),
            "strftime_now" in source,
            "'developer'" in source or '"developer"' in source,
        )

    def _probe(self) -> Habits:
        """Find out by trying, on conversations of one word a message."""
        tried = [self._compiled[name] for name in ("default", "tool_use") if name in self._compiled]
        late_system = bool(tried) and all(_renders(compiled, _LATE_SYSTEM) is not None for compiled in tried)
        default, special = self._compiled.get("default"), self._special_tokens
        quiet = None if default is None else _renders(default, _ONE_TURN, **special, **_effort("none"))
        loud = (
            ()
            if default is None
            else (_renders(default, _ONE_TURN, **special, **_effort(effort)) for effort in _EFFORTS)
        )
        return Habits(late_system, "low" if quiet is None or quiet in loud else "none")

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


def _effort(effort: Effort) -> dict[str, Any]:
    return {"reasoning_effort": effort, "enable_thinking": effort != "none", "add_generation_prompt": True}


def _renders(compiled: _Compiled, messages: Sequence[dict[str, str]], **variables: Any) -> str | None:
    """Return the prompt of a conversation of texts, ``None`` where the template refuses it."""
    shaped: list[dict[str, Any]] = [dict(message) for message in messages]
    try:
        return compiled.environment.rendered(compiled.template, {"messages": shaped, **variables})
    except Exception:  # noqa: BLE001 - a template can fail in any way
        return None


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
