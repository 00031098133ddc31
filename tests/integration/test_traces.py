"""Traces of real requests, received by a small collector on loopback and decoded by OpenTelemetry's own protobuf."""

import gzip
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.integration.media_host import media_host
from tests.integration.service import environment, eventually, mmprep, photo, serving, text, user

from mmprep import Client
from mmprep_frontend.tracing import spans
from mmprep_frontend.tracing.export import OtlpExporter

SMALL = ("--cache-size", "16MiB", "--frontends", "1", "--lanes", "2")
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STATE = "rojo=00f067aa0ba902b7"


class Collector(ThreadingHTTPServer):
    """Keeps the spans that are posted to it, while its gate is open."""

    daemon_threads = True

    def __init__(self):
        self.spans, self.resources, self.paths = [], [], set()
        self.gate = threading.Event()
        self.gate.set()
        super().__init__(("127.0.0.1", 0), Posted)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def trace(self, trace_id, count=1):
        """Wait until the roots of so many requests of the trace are there, and return its spans by id."""
        wanted = bytes.fromhex(trace_id)

        def spans():
            found = [span for span in self.spans if span.trace_id == wanted]
            return found if sum(span.kind == span.SPAN_KIND_SERVER for span in found) >= count else None

        return {span.span_id: span for span in eventually(spans, "the trace")}


class Posted(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.gate.wait()
        request = ExportTraceServiceRequest()
        request.ParseFromString(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
        for resource in request.resource_spans:
            self.server.resources.append({a.key: a.value.string_value for a in resource.resource.attributes})
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.server.paths.add(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def collecting():
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            collector.gate.set()
            collector.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def collector():
    with collecting() as made:
        yield made


@pytest.fixture(scope="module")
def service(collector):
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url + "/",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
    }
    with serving(*SMALL, "--allow-private-networks", env=env) as made:
        yield made


def parent(trace_id, flags="01"):
    return {"traceparent": f"00-{trace_id}-{SPAN}-{flags}", "tracestate": STATE}


def root_of(spans):
    (root,) = (span for span in spans.values() if span.kind == span.SPAN_KIND_SERVER)
    return root


def attributes(span):
    return {a.key: a.value.string_value or a.value.int_value or a.value.bool_value for a in span.attributes}


def check_tree(spans):
    """Every span but the root lies within its parent, which is of the same trace."""
    root = root_of(spans)
    for span in spans.values():
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        if span.span_id != root.span_id:
            above = spans[span.parent_span_id]
            assert above.start_time_unix_nano <= span.start_time_unix_nano, (above.name, span.name)
            assert span.end_time_unix_nano <= above.end_time_unix_nano, (above.name, span.name)


def test_one_request_is_one_trace_from_its_parent_to_the_lanes(service, collector):
    answer = service.chat(user(photo("cat.png"), text("What is this?")), mm_dtype="uint8")
    assert answer.status == 200
    answer = service.post(
        "/v1/chat/completions/render",
        {"messages": user(photo("rocket.jpg"), text("And this?"))},
        X_Request_Id="mine-1",
        **parent(TRACE),
    )
    assert (answer.status, answer.headers["X-Request-Id"]) == (200, "mine-1")
    spans = collector.trace(TRACE)
    root = root_of(spans)
    assert (root.name, root.parent_span_id.hex(), root.trace_state) == (
        "POST /v1/chat/completions/render",
        SPAN,
        STATE,
    )
    assert attributes(root) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions/render",
        "http.response.status_code": 200,
        "mmprep.request_id": "mine-1",
    }
    names = {span.name: spans.get(span.parent_span_id, root).name for span in spans.values() if span is not root}
    of_request = dict.fromkeys(("template", "tokenize", "hash", "lookup", "expand", "serialize"), root.name)
    of_lookup = dict.fromkeys(("queue", "decode", "process", "publish"), "lookup")
    assert names == of_request | of_lookup
    check_tree(spans)
    (decode,) = (span for span in spans.values() if span.name == "decode")
    assert attributes(decode) == {"mmprep.item": 0, "mmprep.modality": "image", "mmprep.outcome": "computed"}
    resource = collector.resources[-1]
    assert (resource["service.name"], resource["deployment.environment"]) == ("mmprep", "test")
    assert collector.paths == {"/v1/traces"}


def test_a_plan_and_a_hit_have_no_tensors_in_their_traces(service, collector):
    for trace_id in ("11" * 16, "12" * 16):
        body = {"messages": user(photo("coffee.webp")), "mm_payload": "none"}
        assert service.post("/v1/chat/completions/render", body, **parent(trace_id)).status == 200
    first, second = (collector.trace(trace_id) for trace_id in ("11" * 16, "12" * 16))
    stages = {"queue", "decode", "process", "publish", "plan"}
    assert {span.name for span in first.values()} & stages == {"queue", "plan"}
    assert {span.name for span in second.values()} & stages == set()
    check_tree(first)
    check_tree(second)


def test_a_fetch_is_told_by_its_scheme_and_never_by_its_url(service, collector):
    with media_host() as host:
        url = f"{host.url}/cat.png?token=secret-token"
        body = {"messages": user({"type": "image_url", "image_url": {"url": url}}, text("a private question"))}
        assert service.post("/v1/chat/completions/render", body, **parent("22" * 16)).status == 200
    spans = collector.trace("22" * 16)
    (fetch,) = (span for span in spans.values() if span.name == "fetch")
    assert attributes(fetch) == {"url.scheme": "http"}
    check_tree(spans)
    everything = b"".join(span.SerializeToString() for span in collector.spans)
    for secret in (b"secret-token", b"127.0.0.1", b"private question", b"cat.png"):
        assert secret not in everything


def test_a_request_that_is_refused_tells_its_status_and_the_native_client_its_parent(service, collector):
    assert service.post("/v1/chat/completions/render", {"messages": 1}, **parent("33" * 16)).status == 400
    refused = root_of(collector.trace("33" * 16))
    assert attributes(refused)["http.response.status_code"] == 400
    assert refused.status.code == refused.status.STATUS_CODE_UNSET, "the service is not to blame"
    with Client(service.endpoint) as client:
        client.chat(user(text("Hello")), payload="none", **parent("44" * 16))
        client.tokenize(prompt="Hello", traceparent=f"00-{'45' * 16}-{SPAN}-01")
    spans = collector.trace("44" * 16)
    assert (root_of(spans).name, root_of(spans).parent_span_id.hex()) == ("native chat", SPAN)
    assert {"template", "tokenize", "serialize"} <= {span.name for span in spans.values()}
    check_tree(spans)
    assert root_of(collector.trace("45" * 16)).name == "native tokenize"


def test_the_parent_decides_what_is_sampled_and_a_malformed_one_is_as_none(service, collector):
    body = {"messages": user(text("Hello"))}
    path = "/v1/chat/completions/render"
    assert service.post(path, body, **parent("55" * 16, "00")).status == 200
    known = {span.trace_id for span in collector.spans}
    assert service.post(path, body, traceparent="00-xyz-01", X_Request_Id="after").status == 200

    def fresh():
        return [
            s for s in collector.spans if s.trace_id not in known and attributes(s).get("mmprep.request_id") == "after"
        ]

    (root,) = eventually(fresh, "a trace that begins here")
    assert root.parent_span_id == b""
    assert bytes.fromhex("55" * 16) not in {span.trace_id for span in collector.spans}
    assert service.metrics()['mmprep_trace_spans_total{outcome="exported"}'] > 0
    assert service.metrics()['mmprep_trace_spans_total{outcome="dropped"}'] == 0


def test_a_collector_that_is_silent_and_then_gone_harms_no_request_and_no_end():
    env = {"OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    with collecting() as collector:
        collector.gate.clear()
        endpoint = collector.url + "/v1/traces"
        with serving(*SMALL, "--otlp-traces-endpoint", endpoint, "--log-level", "error", env=env) as service:
            for _ in range(20):
                assert service.chat(user(text("Hello"))).status == 200
            eventually(
                lambda: service.metrics()['mmprep_trace_spans_total{outcome="dropped"}'] > 0, "spans that are dropped"
            )
            collector.socket.close()
            assert service.chat(user(text("Hello"))).status == 200


def test_traces_beyond_the_queue_are_dropped_and_counted_and_the_others_arrive():
    with collecting() as collector:
        collector.gate.clear()
        exporter = OtlpExporter(collector.url + "/v1/traces")
        given = 0
        for _ in range(3000):
            trace = spans.begin(None)
            for name in ("template", "tokenize", "serialize"):
                trace.add(name, trace.started, trace.started)
            trace.end("POST /tokenize", {}, failed=False)
            given += len(trace.spans)
            exporter.give(trace)
        dropped = exporter.dropped
        assert given - 8192 - 2 * 512 <= dropped <= given - 8192
        collector.gate.set()
        exporter.close(60.0)
        assert exporter.dropped == dropped
        assert exporter.exported == given - dropped == len(collector.spans)
        assert len({span.trace_id for span in collector.spans}) == len(collector.spans) / 4


HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
"""


def test_traces_without_their_extra_are_refused_at_the_start(runtime_dir, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    env = {"PYTHONPATH": f"{tmp_path}:{environment()['PYTHONPATH']}", "OTEL_TRACES_EXPORTER": "otlp"}
    done = mmprep("serve", "--runtime-dir", runtime_dir, "--port", 0, env=env)
    assert done.returncode == 1
    assert "opentelemetry-sdk, opentelemetry-exporter-otlp-proto-http cannot be found" in done.stderr
    assert "pip install 'mmprep[server,otel]'" in done.stderr
