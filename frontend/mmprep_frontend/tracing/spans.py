"""The spans of one request, noted while it runs and handed to the exporter when it has ended.

Whoever does a part of a request notes it with :func:`recording` or :func:`record`: the trace is found in the context, which
tasks inherit and threads are given. Where nobody traces, that costs a look at a variable. Times are those of the monotonic
clock, which all processes of a machine share; so the writer's can be put beside ours.

Attributes never hold content, URLs, addresses or keys.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from mmprep.errors import MmprepError
from mmprep.wire.messages import ItemAnswer, StageTimes
from mmprep_frontend.tracing.context import Parent

Attributes: TypeAlias = Mapping[str, str | int | bool]

#: Spans of one trace; a request has a few for each of its media, of which there are at most 256.
_MOST_SPANS = 4096
_SERVER_ERROR = 500


@dataclass(frozen=True, slots=True)
class Span:
    """One span; ``start`` and ``end`` in seconds of the monotonic clock.

    Attributes
    ----------
    parent: id of the span that it is part of; ``None``: of the root of a trace that begins here.
    server: whether it is a request as a whole.
    """

    name: str
    id: bytes
    parent: bytes | None
    start: float
    end: float
    attributes: Attributes
    failed: bool = False
    server: bool = False


@dataclass(slots=True)
class Trace:
    """What is known of one request.

    Attributes
    ----------
    trace_id: 16 bytes.
    parent: what came with the request, if anything.
    epoch: what to add to the monotonic clock for the time of day, in nanoseconds.
    root: id of the request's own span.
    """

    parent: Parent | None
    epoch: int
    started: float
    root: bytes = field(default_factory=lambda: _new_id(8))
    trace_id: bytes = b""
    spans: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trace_id = _new_id(16) if self.parent is None else self.parent.trace_id

    def add(
        self,
        name: str,
        start: float,
        end: float,
        attributes: Attributes | None = None,
        *,
        parent: bytes | None = None,
        failed: bool = False,
    ) -> bytes:
        """Note a part of the request, or of its part ``parent``, and return its id."""
        span = Span(name, _new_id(8), parent or self.root, start, end, attributes or {}, failed)
        if len(self.spans) < _MOST_SPANS:
            self.spans.append(span)
        return span.id

    def end(self, name: str, attributes: Attributes, *, failed: bool) -> None:
        """The request has ended."""
        above = None if self.parent is None else self.parent.span_id
        self.spans.append(Span(name, self.root, above, self.started, time.monotonic(), attributes, failed, server=True))


class Exporter(Protocol):
    """Where traces go."""

    def give(self, trace: Trace) -> None:
        """Take a trace that has ended, or drop it; never waits."""


current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def begin(parent: Parent | None) -> Trace | None:
    """Return the trace of a request that begins now; ``None`` where its parent is not sampled: this one is not either."""
    if parent is not None and not parent.sampled:
        return None
    return Trace(parent, time.time_ns() - time.monotonic_ns(), time.monotonic())


@contextlib.contextmanager
def tracing(exporter: Exporter | None, parent: Parent | None, name: str, attributes: Attributes) -> Iterator[None]:
    """Trace what is done for one request, as ``name``.

    Parameters
    ----------
    exporter:
        ``None``: nothing is traced.
    attributes:
        Of the request; its outcome is added.
    """
    trace = None if exporter is None else begin(parent)
    if exporter is None or trace is None:
        yield
        return
    token = current.set(trace)
    code = 200
    try:
        yield
    except MmprepError as error:
        code = error.code
        raise
    except Exception:
        code = _SERVER_ERROR
        raise
    except BaseException:  # the client hung up
        code = 0
        raise
    finally:
        current.reset(token)
        told: Attributes = {"http.response.status_code": code} if code else {"mmprep.cancelled": True}
        trace.end(name, {**attributes, **told}, failed=code >= _SERVER_ERROR)
        exporter.give(trace)


def record(name: str, start: float, end: float, attributes: Attributes | None = None) -> None:
    """Note a part of the present request."""
    trace = current.get()
    if trace is not None:
        trace.add(name, start, end, attributes)


@contextlib.contextmanager
def recording(name: str, attributes: Attributes | None = None) -> Iterator[None]:
    """Note the block as a part of the present request."""
    trace = current.get()
    if trace is None:
        yield
        return
    started, failed = time.monotonic(), True
    try:
        yield
        failed = False
    finally:
        trace.add(name, started, time.monotonic(), attributes, failed=failed)


def record_lookup(trace: Trace, start: float, end: float, answers: list[tuple[str, ItemAnswer]]) -> None:
    """Note what the writer and the lanes did for a request's items, between ``start`` and ``end``.

    Parameters
    ----------
    answers:
        Modality and answer of each item. One that joined a computation has its times, as far as they are of this request.
    """
    lookup = trace.add("lookup", start, end, {"mmprep.items": len(answers)})
    for position, (modality, answer) in enumerate(answers):
        about: Attributes = {"mmprep.item": position, "mmprep.modality": modality, "mmprep.outcome": answer.outcome}
        if answer.times is not None:
            for name, begun, ended in _stages(answer.times, end):
                inside = max(start, min(begun, end)), max(start, min(ended, end))
                trace.add(name, *inside, about, parent=lookup)


def _stages(times: StageTimes, answered: float) -> Iterator[tuple[str, float, float]]:
    """Return the stages of a computation; a lane's decoding and processing take turns, and are told one after the other."""
    queued, started, done = times.queued_us / 1e6, times.started_us / 1e6, times.done_us / 1e6
    yield "queue", queued, started
    if times.decode_us or times.process_us:
        decoded = min(started + times.decode_us / 1e6, done)
        yield "decode", started, decoded
        yield "process", max(decoded, done - times.process_us / 1e6), done
        yield "publish", done, answered
    else:
        yield "plan", started, done


def _new_id(nbytes: int) -> bytes:
    """Return random bytes that are not all zero, which would be no id."""
    while not any(made := os.urandom(nbytes)):
        pass
    return made
