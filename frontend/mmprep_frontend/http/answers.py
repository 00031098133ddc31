"""Answers of the HTTP edge: small ones, errors, and the request id that goes in and out.

The one place where an error becomes a status and a body:
``{"error": {"message", "type", "code", "param"}}``, with ``Retry-After`` where another try makes sense.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from aiohttp import web

from mmprep.errors import AuthenticationError, InternalError, InvalidRequest, MethodNotAllowed, MmprepError, NotFound
from mmprep_frontend.http.keyring import PasswordError
from mmprep_frontend.render.encodings import JSON
from mmprep_frontend.room import RETRY_AFTER

REQUEST_ID_HEADER: Final = "X-Request-Id"
IDEMPOTENCY_HEADER: Final = "Idempotency-Key"
#: What a fault of ours looks like from outside; its details are in the log.
INTERNAL_ERROR: Final = "the service failed on this request; its operator finds the reason in the log"

#: Paths of servers that generate, each of which has its like here.
_GENERATING: Final = {f"/v1/{name}" for name in ("chat/completions", "completions", "messages", "responses")}
_KEY = re.compile(r"[ -~]{1,255}", re.ASCII)
_REQUEST_ID = re.compile(r"[!-~]{1,128}", re.ASCII)


def json_answer(body: bytes, status: int = 200) -> web.Response:
    """Return an answer with ``body``, JSON that is encoded already."""
    return web.Response(body=body, status=status, content_type=JSON.media_type)


def plain_answer(data: Any) -> web.Response:
    """Return an answer with ``data``, of dicts, lists, strings and numbers, as JSON."""
    return json_answer(msgspec.json.encode(data))


def error_answer(error: MmprepError) -> web.Response:
    """Return the answer that tells ``error``: JSON, whatever the client accepts."""
    answer = json_answer(
        msgspec.json.encode(
            {"error": {"message": error.message, "type": error.type, "code": error.code, "param": error.param}}
        ),
        error.code,
    )
    if isinstance(error, AuthenticationError):
        answer.headers["WWW-Authenticate"] = 'Basic realm="mmprep"' if isinstance(error, PasswordError) else "Bearer"
    if error.retryable:
        answer.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or RETRY_AFTER)))
    return answer


def internal_error() -> web.Response:
    """Return the answer for what is no error of the tree."""
    return error_answer(InternalError(INTERNAL_ERROR))


def sign(answer: web.StreamResponse, request_id: str) -> None:
    """Give ``answer`` the headers that every answer has."""
    answer.headers[REQUEST_ID_HEADER] = request_id
    answer.headers["Server"] = "mmprep"


def routing_error(error: web.HTTPException, path: str) -> web.Response:
    """Return the answer for what the HTTP library itself refuses: an unknown path, a method, a header."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        answer = error_answer(MethodNotAllowed(f"this path takes {allowed}, not {error.method[:32]}"))
        answer.headers["Allow"] = allowed
        return answer
    if error.status == NotFound.code:
        if path in _GENERATING:
            return error_answer(
                NotFound(f"this service renders prompts and generates nothing: send it to {path}/render")
            )
        return error_answer(NotFound("there is no such path; /docs shows those that there are"))
    if error.status < InternalError.code:
        return error_answer(InvalidRequest("the request is not one that this service can read"))
    return internal_error()


def idempotency_keys(request: web.BaseRequest) -> tuple[str, ...]:
    """Return what the client has sent as keys under which it may send the request again; one at most is right."""
    return tuple(request.headers.getall(IDEMPOTENCY_HEADER, ()))


def one_key(keys: Sequence[str]) -> str | None:
    """Return the key of a request for a queue, ``None`` where it has none.

    Raises
    ------
    mmprep.errors.InvalidRequest
        It is not of 1 to 255 printable ASCII characters, or there are several.
    """
    if not keys:
        return None
    if len(keys) > 1 or not _KEY.fullmatch(keys[0]):
        raise InvalidRequest(f"{IDEMPOTENCY_HEADER} takes one key of 1 to 255 printable ASCII characters")
    return keys[0]


def request_id_of(request: web.BaseRequest) -> str:
    """Return the id that the client chose, 1 to 128 printable ASCII characters without blanks, else a fresh one."""
    chosen = request.headers.get(REQUEST_ID_HEADER, "")
    return chosen if _REQUEST_ID.fullmatch(chosen) else uuid.uuid4().hex
