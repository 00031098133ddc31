"""What ``mmprep serve`` can be told: resolved options, ready for the processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from mmprep.api_keys import ApiKey
from mmprep.logs import LogSettings
from mmprep.remote.endpoint import TcpEndpoint
from mmprep.settings import FrontendSettings, RemoteSettings, WriterSettings


class ServeOptions(msgspec.Struct, frozen=True):
    """Everything that was decided about a service before it starts. Sizes in bytes, times in seconds."""

    model: Path
    served_model_name: str
    runtime_dir: Path | None
    host: str
    port: int
    frontends: int
    lanes: int
    lane_memory: int
    task_timeout: float
    cache_size: int
    max_object_size: int
    spill_size: int
    inline_size: int
    max_media_size: int
    max_request_media_size: int
    max_body_size: int
    max_image_pixels: int
    max_request_image_pixels: int
    max_video_frames: int
    max_video_duration: float
    max_audio_duration: float
    image_background: tuple[int, int, int] | None
    max_model_len: int | None
    limit_mm_per_prompt: dict[str, int]
    tensor_dtype: str
    hash: str
    lease_seconds: float
    queue_limit: int
    queues: tuple[str, ...]
    queue_jobs: int
    queue_size: int
    job_timeout: float
    job_expiry: float
    job_attempts: int
    request_timeout: float
    drain_timeout: float
    allowed_media_domains: tuple[str, ...]
    allow_private_networks: bool
    allowed_local_media_path: str | None
    media_cache_dir: Path | None
    media_cache_max_size: int
    media_cache_ttl: float
    chat_template: str | None
    trust_request_mm_kwargs: bool
    api_key_file: tuple[ApiKey, ...]
    admin_key_file: tuple[ApiKey, ...]
    share_cache_across_keys: bool
    trust_request_chat_template: bool
    otlp_traces_endpoint: str | None
    enable_injection: bool
    remote_endpoint: TcpEndpoint | None
    curve_key_file: Path | None
    curve_clients_dir: Path | None
    allow_plain_remote: bool
    log_level: str
    log_format: str

    @property
    def logs(self) -> LogSettings:
        """How every process logs."""
        return msgspec.convert({"level": self.log_level, "format": self.log_format}, LogSettings)

    @property
    def grace(self) -> float:
        """Seconds for what is under way and for leases when the service stops; the rest is for the processes to end."""
        return self.drain_timeout - min(1.0, self.drain_timeout / 10)

    def writer(self, runtime_dir: Path) -> WriterSettings:
        """Return the writer's part."""
        return WriterSettings(
            runtime_dir=str(runtime_dir),
            model=str(self.model),
            lanes=self.lanes,
            cache_size=self.cache_size,
            max_object_size=self.max_object_size,
            spill_size=self.spill_size,
            inline_size=self.inline_size,
            max_media_size=self.max_media_size,
            max_image_pixels=self.max_image_pixels,
            max_video_frames=self.max_video_frames,
            max_video_duration=self.max_video_duration,
            max_audio_duration=self.max_audio_duration,
            modalities=tuple(name for name, limit in self.limit_mm_per_prompt.items() if limit > 0),
            image_background=self.image_background,
            queue_limit=self.queue_limit,
            queue_bytes=max(self.max_media_size, 1 << 30),
            queues=self.queues,
            queue_jobs=self.queue_jobs,
            queue_size=self.queue_size,
            job_seconds=self.job_timeout,
            job_expiry=self.job_expiry,
            job_attempts=self.job_attempts,
            lease_seconds=self.lease_seconds,
            upload_seconds=5.0,
            task_seconds=self.task_timeout,
            lane_memory=self.lane_memory,
            logs=self.logs,
        )

    def remote(self, runtime_dir: Path) -> RemoteSettings:
        """Return the part of the door for backends on other hosts."""
        return RemoteSettings(
            runtime_dir=str(runtime_dir),
            endpoint=str(self.remote_endpoint),
            curve_key_file=None if self.curve_key_file is None else str(self.curve_key_file),
            curve_clients_dir=None if self.curve_clients_dir is None else str(self.curve_clients_dir),
            logs=self.logs,
        )

    def media_cache(self) -> dict[str, Any] | None:
        """Return what the status says about the disk cache; ``None`` where there is none."""
        if self.media_cache_dir is None:
            return None
        return {
            "directory": str(self.media_cache_dir),
            "max_bytes": self.media_cache_max_size,
            "ttl": self.media_cache_ttl,
            "max_media_size": self.max_media_size,
            "allowed_media_domains": self.allowed_media_domains,
            "allow_private_networks": self.allow_private_networks,
        }

    def frontend(self, index: int, runtime_dir: Path, port: int, *, joins: bool) -> FrontendSettings:
        """Return the part of frontend ``index``; ``joins``: others take requests already."""
        return FrontendSettings(
            index=index,
            joins=joins,
            runtime_dir=str(runtime_dir),
            model=str(self.model),
            served_model_name=self.served_model_name,
            host=self.host,
            port=port,
            hash=self.hash,
            tensor_dtype=self.tensor_dtype,
            max_model_len=self.max_model_len,
            limit_mm_per_prompt=self.limit_mm_per_prompt,
            max_media_size=self.max_media_size,
            max_request_media_size=self.max_request_media_size,
            max_image_pixels=self.max_image_pixels,
            max_request_image_pixels=self.max_request_image_pixels,
            max_body_size=self.max_body_size,
            inline_size=self.inline_size,
            queue_size=self.queue_size,
            job_expiry=self.job_expiry,
            request_timeout=self.request_timeout,
            fetch_timeout=min(30.0, self.request_timeout),
            drain_timeout=self.grace,
            allowed_media_domains=self.allowed_media_domains,
            allow_private_networks=self.allow_private_networks,
            allowed_local_media_path=self.allowed_local_media_path,
            media_cache_dir=None if self.media_cache_dir is None else str(self.media_cache_dir),
            media_cache_max_size=self.media_cache_max_size,
            media_cache_ttl=self.media_cache_ttl,
            chat_template=self.chat_template,
            trust_request_mm_kwargs=self.trust_request_mm_kwargs,
            api_keys=self.api_key_file,
            admin_keys=self.admin_key_file,
            share_cache_across_keys=self.share_cache_across_keys,
            logs=self.logs,
            trust_request_chat_template=self.trust_request_chat_template,
            otlp_traces_endpoint=self.otlp_traces_endpoint,
            enable_injection=self.enable_injection,
        )
