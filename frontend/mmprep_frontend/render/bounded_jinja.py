"""A sandbox for chat templates in which nothing runs or grows without end.

Templates come with a model, or with a request. They run on the one thread that renders, so one that never ends would
stop every request of its frontend, and a thread cannot be stopped from outside. Therefore a template pays as it goes:

1. each turn of a loop and each call of a macro costs as many *units* as its body has syntax, and each call or filter a
   few more. What is spent is bounded, and so is the processor time, which is looked at every few thousand units;
2. what could be huge in one step is judged before it is made: ``"x" * 10**9``, ``|center(10**9)``, ``10 ** 10 ** 10``,
   a list of two lists of two lists of ….

The costs are put into the syntax tree before it becomes Python.

Beside that, the environment is that of transformers' ``apply_chat_template``, so that prompts are equal: blocks trimmed,
``break`` and ``continue``, ``tojson`` without HTML escapes, ``raise_exception``, ``strftime_now`` and the
``{% generation %}`` tag.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from mmprep_frontend.render.growth import FILTERS, METHODS, TOO_LARGE, of_format, size

#: Units of one rendering, a second or two. A chat of a thousand turns takes a fortieth of it.
BUDGET = 5_000_000
#: Seconds of processor time of one rendering, which end it where single steps are slow.
SECONDS = 3.0
#: Characters and elements of the largest thing that a template may make.
LARGEST = 1 << 24
_CALL = 4
#: Units after which the clock is looked at.
_A_WHILE = 4096
#: Nodes of the syntax tree that are worth a unit.
_NODES = 4
_LARGEST_BITS = 4096
#: Characters that the compiler computes of one expression beforehand; a larger one is left to the rendering.
_LARGEST_CONSTANT = 4096


class OverBudgetError(jinja2.TemplateError):
    """The template does more than it may."""


class RaisedByTemplateError(jinja2.TemplateError):
    """The template called ``raise_exception``."""


class _Pricing(NodeTransformer):
    """Puts what the turns of loops and the calls of macros cost into a template's syntax tree."""

    def get_visitor(self, node: nodes.Node) -> Callable[..., Any] | None:
        return self._paid if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock) else None

    def _paid(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        units = 1 + sum(sum(1 for _ in statement.find_all(nodes.Node)) for statement in node.body) // _NODES
        # The compiler writes an attribute's name as it is.
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute(f"spend({units})"), lineno=node.lineno))
        return node


class _Generator(CodeGenerator):
    """Writes Python in which joined texts, and lists that are made, are measured."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - as the overridden one
        self.write("environment.join_texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802 - as the overridden one
        self._measured(super().visit_List, node, frame, node.items)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802 - as the overridden one
        if node.ctx == "load":
            self._measured(super().visit_Tuple, node, frame, node.items)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802 - as the overridden one
        self._measured(super().visit_Dict, node, frame, [pair.value for pair in node.items])

    def _measured(
        self, write: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame, items: list[nodes.Expr]
    ) -> None:
        if all(isinstance(item, nodes.Const) for item in items):
            write(node, frame)
            return
        self.write("environment.measured(")
        write(node, frame)
        self.write(")")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of a model's templates; used by one thread at a time.

    Parameters
    ----------
    budget, seconds, largest:
        As the constants of these names.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *, budget: int = BUDGET, seconds: float = SECONDS, largest: int = LARGEST) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self._budget, self._seconds, self._largest = budget, seconds, largest
        self._left = self._look_at = 0
        self._begun = 0.0
        #: Of the thread's processor time; what was before the first look is taken for it.
        self._until: float | None = None
        #: Sizes of lists and mappings, by identity; they are kept, so that no identity comes again.
        self._sizes: dict[int, tuple[Any, int]] = {}
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
        self.filters["tojson"] = _tojson
        for name, function in list(self.filters.items()):
            self.filters[name] = self._bounded(name, function)
        self.concat = self._concat  # type: ignore[method-assign]

    def compiled(self, source: str) -> jinja2.Template:
        """Return a template; raises ``jinja2.TemplateSyntaxError``, and others for monstrous ones."""
        self._begin()
        largest, self._largest = self._largest, min(self._largest, _LARGEST_CONSTANT)
        try:
            return self.from_string(source)
        finally:
            self._largest = largest

    def rendered(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Return the text of a template of this environment; raises :class:`OverBudgetError`, and what it raises."""
        self._begin()
        try:
            return self._concat(template.root_render_func(template.new_context(dict(variables))))
        finally:
            self._sizes.clear()

    def _begin(self) -> None:
        self._left = self._budget
        self._look_at = max(0, self._left - _A_WHILE)
        self._begun, self._until = time.monotonic(), None
        self._sizes.clear()

    # --- what templates call --------------------------------------------------------------------------------------

    def spend(self, units: int) -> None:
        """Take units from the budget; raises :class:`OverBudgetError` at its end."""
        self._left -= units
        if self._left < self._look_at:
            if self._left < 0 or self._is_late():
                raise OverBudgetError("it does too much: its loops, or what they work on, are too long")
            self._look_at = max(0, self._left - _A_WHILE)

    def _is_late(self) -> bool:
        # On some machines it takes 40 µs to be told, more than most templates do.
        spent = time.thread_time()
        if self._until is None:
            self._until = spent + self._seconds - (time.monotonic() - self._begun)
        return spent > self._until

    def join_texts(self, parts: tuple[Any, ...]) -> str:
        """Return what ``~`` makes of its operands."""
        texts = [part if type(part) is str else str(self.measured(part)) for part in parts]
        self._judge(sum(map(len, texts)))
        return "".join(texts)

    def measured(self, value: Any) -> Any:
        """Return ``value``, which is not too large with all that is in it; raises :class:`OverBudgetError`."""
        self._judge(self._size(value))
        return value

    # --- what jinja2 calls ----------------------------------------------------------------------------------------

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        return super()._generate(_Pricing().visit(source), name, filename, defer_init)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend(_CALL)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | bytes | int):
            args = self._judge_method(owner, function.__name__, args, kwargs)
        return self._kept(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if type(left) is str and type(right) is str and operator == "+":
            # What templates do most.
            self._judge(len(left) + len(right))
            return left + right
        match operator:
            case "+":
                self._judge(self._size(left) + self._size(right))
            case "*":
                for sequence, number in ((left, right), (right, left)):
                    if isinstance(number, int) and hasattr(sequence, "__len__"):
                        self._judge(self._size(sequence) * number)
                self._judge_bits(_bits(left) + _bits(right))
            case "**":
                self._judge_bits(_bits(left) * right if isinstance(right, int) else 0)
            case _:
                self._judge(of_format(left))
        return self._kept(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            self._judge(of_format(value.__self__))
        return wrapped

    # --- judging --------------------------------------------------------------------------------------------------

    def _judge(self, estimate: int) -> None:
        if estimate > self._largest:
            raise OverBudgetError("it makes a text, a list or a number that is too large")

    def _judge_bits(self, bits: int) -> None:
        self._judge(TOO_LARGE if bits > _LARGEST_BITS else 0)

    def _judge_method(self, owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Judge the call of a method of a text or number; returns the arguments, none of them used up."""
        if name == "join" and args:
            return (self._pieces(args[0], owner),)
        if name in METHODS:
            self._judge(METHODS[name](owner, args, kwargs))
        return args

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that is paid for and judged."""
        first = int(hasattr(function, "jinja_pass_arg"))
        estimate = FILTERS.get(name)

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.spend(_CALL)
            if name == "join":
                glue = kwargs.get("d", args[first + 1] if len(args) > first + 1 else "")
                args = (*args[:first], self._pieces(args[first], glue), *args[first + 1 :])
            elif estimate is not None:
                self._judge(estimate(args[first], args[first + 1 :], kwargs))
            return self._kept(function(*args, **kwargs))

        return bounded

    def _pieces(self, values: Iterable[Any], glue: Any) -> list[Any]:
        """Return the elements of what is to be joined, where the whole is not too large."""
        pieces, total = [], 0
        for value in values:
            self.spend(1)
            total += self._size(value) + size(glue)
            self._judge(total)
            pieces.append(value)
        return pieces

    def _kept(self, value: Any) -> Any:
        if isinstance(value, str):
            self._judge(len(value))
        elif isinstance(value, list | tuple | dict):
            self._judge(self._size(value))
        return value

    def _concat(self, pieces: Iterable[str]) -> str:
        texts, total, largest = [], 0, self._largest
        for piece in pieces:
            total += len(piece)
            if total > largest:
                self._judge(total)
            texts.append(piece)
        return "".join(texts)

    def _size(self, value: Any) -> int:
        """Return the characters and elements of a value with all that is in it."""
        if not isinstance(value, list | tuple | dict):
            return size(value)
        known = self._sizes.get(id(value))
        if known is None:
            self.spend(len(value))
            inner = (*value, *value.values()) if isinstance(value, dict) else value
            known = self._sizes[id(value)] = (value, 1 + sum(map(self._size, inner)))
        return known[1]


def _bits(number: Any) -> int:
    return number.bit_length() if isinstance(number, int) else 0


class _Namespace(Namespace):
    """Jinja's ``namespace()``, without names that lead into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        given = dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("names of a namespace do not begin with an underscore")


def _raise_exception(message: object) -> None:
    raise RaisedByTemplateError(str(message))


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
