"""Sends traces to a collector, by OTLP over HTTP, from a thread of its own.

The loop only appends to a queue with a bound. Where the collector is slow or gone, the queue fills and further traces are
dropped and counted; nothing waits for it. What the standard variables say of headers, certificates, compression and time
limits (``OTEL_EXPORTER_OTLP_…``) and of the resource (``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``) is read by the SDK.

Importing this module needs the extra ``otel``.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

import mmprep
from mmprep_frontend.tracing.spans import Span, Trace

_log = logging.getLogger(__name__)

#: Spans that may wait.
_MOST_WAITING = 8192
#: Spans in one message to the collector, about.
_BATCH = 512
#: Seconds that a batch waits for more spans.
_GATHER_SECONDS = 0.5
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class OtlpExporter:
    """A queue of traces, and the thread that sends them.

    Parameters
    ----------
    endpoint:
        URL that traces are posted to.

    Attributes
    ----------
    exported, dropped: spans so far.
    """

    def __init__(self, endpoint: str) -> None:
        self.exported = 0
        self.dropped = 0
        self._exporter = OTLPSpanExporter(endpoint=endpoint)
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "mmprep"}
        self._resource = Resource.create({"service.version": mmprep.__version__, **named})
        self._scope = InstrumentationScope("mmprep", mmprep.__version__)
        #: Traces, and their spans as they were when these were given: a thread may be about to note one more.
        self._waiting: deque[tuple[Trace, tuple[Span, ...]]] = deque()
        self._spans = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def give(self, trace: Trace) -> None:
        """Take a trace that has ended, or drop it; never waits for the collector."""
        spans = tuple(trace.spans)
        count = len(spans)
        with self._changed:
            if self._closing or self._spans + count > _MOST_WAITING:
                self.dropped += count
                return
            if not self._waiting or self._spans + count >= _BATCH:
                self._changed.notify()
            self._waiting.append((trace, spans))
            self._spans += count

    def close(self, seconds: float) -> None:
        """Send what waits, for at most so long; the rest is dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _run(self) -> None:
        while True:
            traces = self._next()
            if traces is None:
                return
            spans = [self._readable(trace, span) for trace, noted in traces for span in noted]
            if spans:
                sent = self._send(spans)
                self.exported += len(spans) if sent else 0
                with self._changed:
                    self.dropped += 0 if sent else len(spans)

    def _next(self) -> list[tuple[Trace, tuple[Span, ...]]] | None:
        """Return what waits, some at a time and perhaps nothing; ``None`` at the end."""
        with self._changed:
            if self._spans < _BATCH and not self._closing:
                self._changed.wait(_GATHER_SECONDS if self._waiting else None)
            if self._closing and not self._waiting:
                return None
            traces, taken = [], 0
            while self._waiting and taken < _BATCH:
                traces.append(self._waiting.popleft())
                taken += len(traces[-1][1])
            self._spans -= taken
            return traces

    def _send(self, spans: list[ReadableSpan]) -> bool:
        try:
            return self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception as error:  # noqa: BLE001 -- whatever it is, the next batch is tried
            _log.warning("traces could not be sent: %s", type(error).__name__)
            return False

    def _readable(self, trace: Trace, span: Span) -> ReadableSpan:
        state = TraceState(trace.parent.state if trace.parent is not None else ())
        trace_id = int.from_bytes(trace.trace_id, "big")

        def context(span_id: bytes, *, remote: bool) -> SpanContext:
            return SpanContext(trace_id, int.from_bytes(span_id, "big"), remote, _SAMPLED, state)

        return ReadableSpan(
            span.name,
            context(span.id, remote=False),
            None if span.parent is None else context(span.parent, remote=span.server),
            self._resource,
            dict(span.attributes),
            kind=SpanKind.SERVER if span.server else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR) if span.failed else Status(),
            start_time=round(span.start * 1e9) + trace.epoch,
            end_time=round(span.end * 1e9) + trace.epoch,
            instrumentation_scope=self._scope,
        )
