"""The description of the HTTP interface: OpenAPI 3.1, made from the types that requests are parsed by, and a page of it.

The page needs no script and nothing from elsewhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from mmprep_frontend.http import forms
from mmprep_frontend.http.door import LeaseRequest
from mmprep_frontend.render.encodings import JSON, MSGPACK
from mmprep_frontend.render.messages_api import MessagesRequest
from mmprep_frontend.render.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from mmprep_frontend.render.responses_api import ResponsesRequest


class Operation(NamedTuple):
    """One route.

    Attributes
    ----------
    request: the type of its body, ``None`` where it has none.
    answer: the type of its answer, ``None`` where that is no JSON.
    errors: the statuses that it may answer with beside 200.
    queued: whether its result may go to a queue, which answers 202.
    open: whether it needs no key.
    takes: the media type of its body.
    """

    method: str
    path: str
    summary: str
    request: Any
    answer: Any
    errors: tuple[int, ...] = ()
    open: bool = False
    takes: str = "application/json"
    queued: bool = False


_TEXT: Final = (400, 401, 404, 405, 408, 413, 429, 500, 503)
_MEDIA: Final = (*_TEXT, 415, 422, 502, 504)
_QUEUED: Final = (*_MEDIA, 409)
_LEASES: Final = (400, 401, 404, 405, 408, 413, 429, 500, 503)

OPERATIONS: Final = (
    Operation(
        "post",
        "/v1/chat/completions/render",
        "Render a chat",
        ChatRequest,
        forms.GenerateRequest,
        _QUEUED,
        queued=True,
    ),
    Operation(
        "post",
        "/v1/messages/render",
        "Render a Messages request",
        MessagesRequest,
        forms.GenerateRequest,
        _QUEUED,
        queued=True,
    ),
    Operation(
        "post",
        "/v1/responses/render",
        "Render a Responses request",
        ResponsesRequest,
        forms.GenerateRequest,
        _QUEUED,
        queued=True,
    ),
    Operation(
        "post",
        "/v1/completions/render",
        "Render prompts",
        CompletionRequest,
        list[forms.GenerateRequest],
        (*_TEXT, 409),
        queued=True,
    ),
    Operation("post", "/tokenize", "A text or a chat to token ids", TokenizeRequest, forms.Tokens, _MEDIA),
    Operation("post", "/detokenize", "Token ids to text", DetokenizeRequest, forms.DetokenizedText, _TEXT),
    Operation("post", "/leases/renew", "Prolong leases", LeaseRequest, forms.Renewed, _LEASES),
    Operation("post", "/leases/release", "End leases", LeaseRequest, forms.Released, _LEASES),
    Operation(
        "post",
        "/inject",
        "Put an item that was processed elsewhere into the cache",
        forms.InjectRequest,
        forms.InjectedItem,
        _TEXT,
        takes="application/msgpack",
    ),
    Operation("post", "/reset_mm_cache", "Empty the cache of processed items", None, forms.Reset, _LEASES),
    Operation("post", "/reset_media_cache", "Empty the disk cache of fetched media", None, forms.Reset, _LEASES),
    Operation("get", "/v1/models", "What is served", None, forms.ServedModels, (401,)),
    Operation("get", "/health", "Whether the process is alive", None, forms.Status, open=True),
    Operation("get", "/ready", "Whether requests are taken", None, forms.Status, (503,), open=True),
    Operation("get", "/metrics", "Metrics of the whole service, as Prometheus text", None, None, (503,), open=True),
    Operation("get", "/version", "The service's version", None, forms.Version, open=True),
    Operation("get", "/dashboard", "A page that shows what the service does", None, None, (401,)),
    Operation("get", "/dashboard/status", "What the page shows, as data", None, dict[str, Any], (401, 503)),
    Operation("get", "/openapi.json", "This description", None, dict[str, Any], open=True),
    Operation("get", "/docs", "This description as a page", None, None, open=True),
)

_KINDS: Final = {"/metrics": "text/plain", "/docs": "text/html", "/dashboard": "text/html"}
_PACKED: Final = "The same keys and values. The elements of kwargs_data and mm_metadata are raw bytes: the MessagePack that is base64 in JSON."
_ROLE: Final = re.compile(r":[a-z]+:`~?([^`]+)`")
_REF: Final = "#/components/schemas/{name}"
_KEY_PARAMETER: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Of a request that names a queue: sent again with the same key and body, it is posted once.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
_MEANINGS: Final = {
    400: "the request is wrong",
    401: "the key is missing or wrong",
    404: "something that the request names is not there",
    405: "the path takes another method",
    408: "the request's time was over",
    409: "the Idempotency-Key was sent with another body before",
    413: "too large",
    415: "not a kind of medium that is read",
    422: "a medium could not be fetched or decoded",
    429: "full; again after Retry-After",
    500: "a fault of the service",
    502: "a medium's host failed",
    503: "starting or draining; again after Retry-After",
    504: "a medium's host did not answer",
}


def describe(version: str, operations: Sequence[Operation] = OPERATIONS) -> dict[str, Any]:
    """Return the OpenAPI document of the interface.

    Parameters
    ----------
    version:
        Of the service.
    """
    types = [kind for operation in operations for kind in (operation.request, operation.answer) if kind is not None]
    types += [forms.Queued]
    schemas, components = msgspec.json.schema_components([*types, forms.Error], ref_template=_REF)
    for component in components.values():
        component["description"] = _plain(component.get("description", ""))
    by_type = dict(zip(map(str, [*types, forms.Error]), schemas, strict=True))
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, by_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": "mmprep", "version": version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _plain(docstring: str) -> str:
    """Return the first paragraph of a docstring, without markup for those who read the code."""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return _ROLE.sub(lambda role: role[1].rpartition(".")[2], paragraph).replace("``", "")


def _operation(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    answer = _content(operation.answer, schemas, _KINDS.get(operation.path, JSON.media_type))
    if operation.method == "post":
        (form,) = answer["content"].values()
        answer["content"][MSGPACK.media_type] = {"schema": {**form["schema"], "description": _PACKED}}
    responses = {"200": {"description": "the answer", **answer}}
    if operation.queued:
        queued = _content(forms.Queued, schemas, JSON.media_type)
        queued["content"][MSGPACK.media_type] = queued["content"][JSON.media_type]
        responses["202"] = {
            "description": "accepted; the result is a job in the queue that the request names",
            **queued,
        }
    for status in sorted(operation.errors):
        responses[str(status)] = {
            "description": _MEANINGS[status],
            **_content(forms.Error, schemas, JSON.media_type),
        }
    described: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if operation.queued:
        described["parameters"] = [_KEY_PARAMETER]
    if operation.request is not None:
        described["requestBody"] = {
            "required": True,
            **_content(operation.request, schemas, operation.takes),
        }
    described["security"] = [] if operation.open else [{"key": []}, {}]
    return described


def _content(kind: Any, schemas: dict[str, Any], media_type: str) -> dict[str, Any]:
    schema = {"type": "string"} if kind is None else schemas[str(kind)]
    return {"content": {media_type: {"schema": schema}}}


_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mmprep {version}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }}
code, pre {{ font: 14px/1.45 ui-monospace, monospace }}
pre {{ background: #f5f5f5; padding: .75rem; overflow: auto; max-height: 30rem }}
summary {{ cursor: pointer; padding: .35rem 0 }}
table {{ border-collapse: collapse }} td, th {{ text-align: left; padding: .1rem 1.2rem .1rem 0; vertical-align: top }}
.method {{ display: inline-block; min-width: 3.5rem; font-weight: 600 }}
@media (prefers-color-scheme: dark) {{ body {{ background: #161616; color: #e8e8e8 }} pre {{ background: #242424 }} a {{ color: #8ab4f8 }} }}
</style></head><body>
<h1>mmprep {version}</h1>
<p>The HTTP interface; as data: <a href="openapi.json">openapi.json</a>.</p>
{operations}
<h2>Types</h2>
{types}
</body></html>
"""


def page(document: dict[str, Any]) -> str:
    """Return the document of :func:`describe` as HTML."""
    operations = "\n".join(
        _operation_html(method, path, described)
        for path, methods in document["paths"].items()
        for method, described in methods.items()
    )
    types = "\n".join(_type_html(name, schema) for name, schema in sorted(document["components"]["schemas"].items()))
    return _PAGE.format(version=html.escape(document["info"]["version"]), operations=operations, types=types)


def _operation_html(method: str, path: str, described: dict[str, Any]) -> str:
    body = described.get("requestBody")
    rows = "".join(
        f"<tr><td><code>{status}</code></td><td>{html.escape(response['description'])}</td>"
        f"<td>{_named(response)}</td><td>{_kinds(response)}</td></tr>"
        for status, response in described["responses"].items()
    )
    return (
        f"<details><summary><span class=method>{method.upper()}</span> <code>{html.escape(path)}</code> "
        f"&nbsp; {html.escape(described['summary'])}</summary>"
        f"<p>Body: {_named(body) if body else 'none'}</p><table>{rows}</table></details>"
    )


def _type_html(name: str, schema: dict[str, Any]) -> str:
    text = html.escape(msgspec.json.format(msgspec.json.encode(schema), indent=2).decode())
    about = html.escape(schema.get("description", ""))
    return f'<details id="{html.escape(name)}"><summary><code>{html.escape(name)}</code> &nbsp; {about}</summary><pre>{text}</pre></details>'


def _kinds(described: dict[str, Any]) -> str:
    return html.escape(", ".join(described["content"]))


def _named(described: dict[str, Any]) -> str:
    kind, content = next(iter(described["content"].items()))
    schema = content["schema"]
    many = "a list of " if schema.get("type") == "array" else ""
    reference = schema.get("$ref") or schema.get("items", {}).get("$ref")
    if reference is None:
        return html.escape(kind)
    name = html.escape(reference.rpartition("/")[2])
    return f'{many}<a href="#{name}"><code>{name}</code></a>'
