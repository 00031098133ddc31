"""The forms of the answers, for the description of the interface and for those who check answers against it.

Answers are built as plain data, where they are made; the tests hold real answers against these forms, so that neither
drifts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from mmprep.address import Address

_Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
_Natural = Annotated[int, Meta(ge=0)]
_Encoded = Annotated[str, Meta(description="base64 of MessagePack: one item's fields")]


class ErrorDetail(Struct, frozen=True, forbid_unknown_fields=True):
    """What is wrong, what to change, and where."""

    message: str
    type: str
    code: int
    param: str | None


class Error(Struct, frozen=True, forbid_unknown_fields=True):
    """Every answer with a status from 400 on."""

    error: ErrorDetail


class PlaceholderRange(Struct, frozen=True, forbid_unknown_fields=True):
    """Where one medium's ids are in the prompt; without ``is_embed`` all of them take an embedding."""

    offset: _Natural
    length: _Natural
    is_embed: list[bool] | None = None


class Features(Struct, frozen=True, forbid_unknown_fields=True):
    """The media of a prompt: by modality, in the prompt's order, all lists of one length."""

    mm_hashes: dict[str, list[_Hash]]
    mm_placeholders: dict[str, list[PlaceholderRange]]
    kwargs_data: dict[str, list[_Encoded | None]] | None
    mm_metadata: dict[str, list[_Encoded | None]] | None
    mm_addresses: dict[str, list[Address | None]] | None


class GenerateRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """A rendered prompt, as an engine's token-in, token-out endpoint takes it."""

    request_id: str
    token_ids: list[_Natural]
    token_offsets: list[Any] | None
    features: Features | None
    content_parts: list[Any] | None
    sampling_params: dict[str, Any]
    model: str
    reasoning_ended: bool | None
    reasoning_parser_kwargs: dict[str, Any] | None
    return_token_ids: bool | None
    output_mode: Literal["tokens", "text"]
    parse_context: dict[str, Any] | None
    stream: bool
    stream_options: dict[str, Any] | None
    cache_salt: str | None
    priority: int
    kv_transfer_params: dict[str, Any] | None
    ec_transfer_params: dict[str, Any] | None
    prompt_text: str | None = None


class Queued(Struct, frozen=True, forbid_unknown_fields=True):
    """The request is accepted: what it renders to is a job of that id in the queue."""

    request_id: str
    queue: str


class Tokens(Struct, frozen=True, forbid_unknown_fields=True):
    """A text or a chat as token ids, media expanded."""

    count: _Natural
    max_model_len: int
    tokens: list[_Natural]
    token_strs: list[str] | None


class DetokenizedText(Struct, frozen=True, forbid_unknown_fields=True):
    """Token ids as text."""

    prompt: str


class Renewed(Struct, frozen=True, forbid_unknown_fields=True):
    """The leases that are over, and how long the others hold from when the request was sent."""

    lost: list[str]
    lease_seconds: _Natural


class Released(Struct, frozen=True, forbid_unknown_fields=True):
    """The leases have ended."""

    released: bool


class ServedModels(Struct, frozen=True):
    """What is served, in the form of OpenAI's API."""

    object: Literal["list"]
    data: list[dict[str, Any]]


class Status(Struct, frozen=True, forbid_unknown_fields=True):
    """``ok`` or ``ready``."""

    status: Literal["ok", "ready"]


class Version(Struct, frozen=True, forbid_unknown_fields=True):
    """The service's version."""

    version: str
