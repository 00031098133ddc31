"""The description of the HTTP interface is whole, and what the service answers is of the forms that it promises."""

import json
import re

import msgspec
import pytest
from tests.integration.service import photo, serving, text, user

from mmprep_frontend.http import forms
from mmprep_frontend.http.app import make_app
from mmprep_frontend.http.openapi import OPERATIONS

LEASE = "0" * 32


@pytest.fixture(scope="module")
def service():
    with serving("--frontends", 1, "--cache-size", "64MiB") as service:
        yield service


@pytest.fixture(scope="module")
def document(service):
    return service.get("/openapi.json").json


class Nothing:
    def __getattr__(self, name):
        return name


def test_every_route_is_described_and_every_description_is_of_a_route():
    resources = make_app(Nothing(), version="1").router.resources()
    routes = {(route.method.lower(), route.resource.canonical) for resource in resources for route in resource}
    described = {(operation.method, operation.path) for operation in OPERATIONS}
    assert {route for route in routes if route[0] != "head"} == described


def test_every_reference_leads_somewhere_and_requests_name_their_fields(document):
    whole = json.dumps(document)
    for name in re.findall(r'"#/components/schemas/(\w+)"', whole):
        assert name in document["components"]["schemas"]
    chat = document["components"]["schemas"]["ChatRequest"]
    assert {"messages", "mm_payload", "tools", "deadline_ms"} <= set(chat["properties"])
    assert chat["required"] == ["messages"]


def test_the_page_shows_every_path_and_needs_nothing_from_elsewhere(service):
    answer = service.get("/docs")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    page = answer.body.decode()
    for operation in OPERATIONS:
        assert f"<code>{operation.path}</code>" in page
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=\"(?!#|openapi\.json)", page)


@pytest.mark.parametrize("payload", ["none", "tensors"])
def test_a_rendered_chat_is_of_its_form(service, payload):
    for messages in (user(text("Hello")), user(photo("cat.png"), text("?"), photo("coffee.webp"))):
        answer = service.chat(messages, mm_payload=payload, return_prompt_text=True)
        msgspec.json.decode(answer.body, type=forms.GenerateRequest)


def test_an_address_is_of_its_form(service):
    from mmprep import Backend

    with Backend(service.endpoint, id="engine-0"):
        answer = service.chat(user(photo("cat.png")), mm_payload="shm", backend_id="engine-0")
        rendered = msgspec.json.decode(answer.body, type=forms.GenerateRequest)
        leases = [rendered.features.mm_addresses["image"][0].lease]
        renewed = service.post("/leases/renew", {"backend_id": "engine-0", "leases": [*leases, LEASE]})
        assert msgspec.json.decode(renewed.body, type=forms.Renewed).lost == [LEASE]
        released = service.post("/leases/release", {"backend_id": "engine-0", "leases": leases})
        assert msgspec.json.decode(released.body, type=forms.Released).released


@pytest.mark.parametrize(
    ("path", "body", "form"),
    [
        ("/v1/completions/render", {"prompt": ["a", "b"]}, list[forms.GenerateRequest]),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, forms.Tokens),
        ("/tokenize", {"messages": user(photo("cat.png"))}, forms.Tokens),
        ("/detokenize", {"tokens": [1, 2, 3]}, forms.DetokenizedText),
        ("/tokenize", {}, forms.Error),
        ("/nowhere", {}, forms.Error),
    ],
)
def test_other_answers_are_of_their_forms(service, path, body, form):
    msgspec.json.decode(service.post(path, body).body, type=form)


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.method == "get" and o.answer not in (None, dict)])
def test_what_is_read_is_of_its_form(service, operation):
    answer = service.get(operation.path)
    assert answer.status == 200
    msgspec.json.decode(answer.body, type=operation.answer)
