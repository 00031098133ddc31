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


class InjectedField(Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: dtype, shape and raw little-endian bytes as extension type 3; and, to have it checked, its kind with arguments."""

    data: Annotated[list[Any], Meta(min_length=3, max_length=3)]
    field: Annotated[list[Any], Meta(min_length=2, max_length=2)] | None = None


class Expansion(Struct, frozen=True, forbid_unknown_fields=True):
    """The ids that a placeholder becomes, and which of them take an embedding: all where nothing is said."""

    token_ids: list[int]
    is_embed: list[bool] | None = None


class InjectRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """An item that was processed elsewhere, in MessagePack."""

    key: Annotated[str, Meta(min_length=1, max_length=1024)]
    modality: str
    fields: dict[str, InjectedField]
    expansion: Expansion
    model: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    deadline_ms: int | None = None


class InjectedItem(Struct, frozen=True, forbid_unknown_fields=True):
    """An item that is in the cache now: its hash in later answers, how long its range is, whether it was there before."""

    hash: _Hash
    length: _Natural
    cached: bool


class Reset(Struct, frozen=True, forbid_unknown_fields=True):
    """What a cache has lost: entries that are found no more, and bytes that are free now."""

    entries: _Natural
    bytes: _Natural


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
