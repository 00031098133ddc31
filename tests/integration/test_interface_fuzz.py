"""Requests made from the interface's own description, right ones and wrong ones: none is answered with a fault of ours.

URLs of media are kept to ``data:``: whatever is made up here, nothing is asked for elsewhere.
"""

import msgpack
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from tests.integration.service import serving

from mmprep_frontend.http.openapi import OPERATIONS

#: What no answer may hold.
GIVEAWAYS = ("Traceback", "/site-packages", "mmprep_frontend", "mmprep_worker", "/dev/shm", "ipc://")
#: Examples of one route, also in long runs.
MOST = 500
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
#: Wrong requests are only made where there is something to get wrong.
ROUTES = [
    (operation.method, operation.path, mode)
    for operation in OPERATIONS
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    if operation.request is not None or mode is GenerationMode.POSITIVE
]


@schemathesis.serializer("application/msgpack")
def packed(_context, value):
    """Return what was made up as MessagePack; whole numbers that it cannot hold as text."""
    return msgpack.packb(value, default=str)


@pytest.fixture(scope="module")
def service():
    with serving(
        "--frontends", 1, "--cache-size", "64MiB", "--request-timeout", "20s", "--enable-injection"
    ) as service:
        yield service


@pytest.fixture(scope="module")
def schema(service):
    document = service.get("/openapi.json").json
    keep_to_data_urls(document["components"]["schemas"])
    return schemathesis.openapi.from_dict(document)


def keep_to_data_urls(node):
    """Give every text that is a URL a pattern."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name in {"url", "image_url", "video_url", "audio_url"} and isinstance(value, dict):
                for choice in (value, *value.get("anyOf", ())):
                    if choice.get("type") == "string":
                        choice["pattern"] = "^data:[a-z]{0,9}/?[a-z]{0,9}(;base64)?,[A-Za-z0-9+/]{0,40}={0,2}$"
        for value in node.values():
            keep_to_data_urls(value)
    elif isinstance(node, list):
        for value in node:
            keep_to_data_urls(value)


@pytest.mark.parametrize(("method", "path", "mode"), ROUTES)
def test_no_request_that_the_description_allows_or_forbids_is_a_fault_of_ours(service, schema, method, path, mode):
    operation = schema[path][method]

    @settings(
        max_examples=min(settings.default.max_examples, MOST),
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(data=st.data())
    def check(data):
        case = data.draw(operation.as_strategy(generation_mode=mode))
        answer = case.call(base_url=service.url, timeout=60)
        case.validate_response(answer, checks=CHECKS)
        assert not [word for word in GIVEAWAYS if word in answer.text]

    check()
