"""Where traces go, by the option and by OpenTelemetry's variables."""

import re

import pytest

from mmprep.cli.traces import traces_endpoint
from mmprep.errors import StartupError

LOCAL = "http://localhost:4318/v1/traces"


@pytest.mark.parametrize(
    ("given", "environment", "endpoint"),
    [
        (None, {}, None),
        (None, {"OTEL_SERVICE_NAME": "x"}, None),
        (None, {"OTEL_TRACES_EXPORTER": "otlp"}, LOCAL),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:1/"}, "http://c:1/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:1/base"}, "http://c:1/base/v1/traces"),
        (
            None,
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://t/x"},
            "https://t/x",
        ),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, None),
        ("http://mine/path", {"OTEL_TRACES_EXPORTER": "none"}, "http://mine/path"),
        (
            None,
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "http://c/v1/traces",
        ),
    ],
)
def test_the_option_wins_then_the_variable_of_traces_then_that_of_everything(given, environment, endpoint):
    assert traces_endpoint(given, environment) == endpoint


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: 'zipkin'"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL: 'grpc'",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector"}, "OTEL_EXPORTER_OTLP_ENDPOINT: give an http or https URL"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_name(environment, words):
    with pytest.raises(StartupError, match=re.escape(words)):
        traces_endpoint(None, environment)
