"""What each process that another one starts is told: data, sent as one line of JSON on its standard input.

The input then stays open; its end tells the process that its parent is gone.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import msgspec

from mmprep.api_keys import ApiKey
from mmprep.logs import LogSettings

#: Exit status of a process that tells the supervisor not to try again: its message was for who starts the service.
CANNOT_START = 78

_INPUT = 0
_MOST = 1 << 20


class WriterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The writer's part. Sizes in bytes, times in seconds."""

    runtime_dir: str
    model: str
    lanes: int
    cache_size: int
    max_object_size: int
    spill_size: int
    inline_size: int
    max_media_size: int
    max_image_pixels: int
    max_video_frames: int
    max_video_duration: float
    max_audio_duration: float
    modalities: tuple[str, ...]
    image_background: tuple[int, int, int] | None
    queue_limit: int
    queue_bytes: int
    queues: tuple[str, ...]
    queue_jobs: int
    queue_size: int
    job_seconds: float
    job_expiry: float
    job_attempts: int
    lease_seconds: float
    upload_seconds: float
    task_seconds: float
    lane_memory: int
    logs: LogSettings


class FrontendSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frontend's part. Sizes in bytes, times in seconds.

    ``joins``: others take requests on its port already, so that it need not listen before it can answer them.
    """

    index: int
    joins: bool
    runtime_dir: str
    model: str
    served_model_name: str
    host: str
    port: int
    hash: str
    tensor_dtype: str
    max_model_len: int | None
    limit_mm_per_prompt: dict[str, int]
    max_media_size: int
    max_request_media_size: int
    max_image_pixels: int
    max_request_image_pixels: int
    max_body_size: int
    inline_size: int
    queue_size: int
    job_expiry: float
    request_timeout: float
    fetch_timeout: float
    drain_timeout: float
    allowed_media_domains: tuple[str, ...]
    allow_private_networks: bool
    allowed_local_media_path: str | None
    media_cache_dir: str | None
    media_cache_max_size: int
    media_cache_ttl: float
    chat_template: str | None
    trust_request_mm_kwargs: bool
    trust_request_chat_template: bool
    enable_injection: bool
    api_keys: tuple[ApiKey, ...]
    admin_keys: tuple[ApiKey, ...]
    share_cache_across_keys: bool
    otlp_traces_endpoint: str | None
    logs: LogSettings


class RemoteSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The part of the door for backends on other hosts. Keys stay in their files."""

    runtime_dir: str
    endpoint: str
    curve_key_file: str | None
    curve_clients_dir: str | None
    logs: LogSettings


class CacheOrders(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator asks of the disk cache, and the settings by which it is judged. Sizes in bytes, times in seconds."""

    action: Literal["stats", "inspect", "clear"]
    directory: str
    max_bytes: int
    ttl: float
    max_media_size: int
    allowed_media_domains: tuple[str, ...]
    allow_private_networks: bool


def read_settings(kind: Any) -> Any:
    """Return the settings from standard input; leaves the process where the parent is gone already."""
    line = b""
    while not line.endswith(b"\n"):
        chunk = os.read(_INPUT, 65536)
        if not chunk or len(line) > _MOST:
            raise SystemExit(1)
        line += chunk
    return msgspec.json.decode(line, type=kind)
