"""One frontend process: puts the parts together, warms them, opens the doors, and drains."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
import zmq

import mmprep
from mmprep.allocator import keep_memory
from mmprep.card import ModelCard
from mmprep.digest import Hasher
from mmprep.errors import MmprepError, ServiceUnavailable, StartupError
from mmprep.metrics import Metrics, ProcessReport
from mmprep.runtime import RuntimeDir
from mmprep.settings import CANNOT_START, FrontendSettings, read_settings
from mmprep.wire import messages
from mmprep.without_torch import leave_torch_out
from mmprep_frontend.dispatch import WriterLink
from mmprep_frontend.http.app import make_app
from mmprep_frontend.http.door import HttpDoor
from mmprep_frontend.http.keyring import Keyring
from mmprep_frontend.http.server import HttpServer, serve_http
from mmprep_frontend.injection.service import Injecting
from mmprep_frontend.media.allowance import MediaLimits
from mmprep_frontend.media.cache import MediaCache
from mmprep_frontend.media.cache_disk import CacheDisk
from mmprep_frontend.media.fetch import Fetcher
from mmprep_frontend.media.files import LocalFiles
from mmprep_frontend.media.intake import Intake
from mmprep_frontend.media.memory import MediaMemory
from mmprep_frontend.media.policy import UrlPolicy
from mmprep_frontend.model import ServedModel, load_model
from mmprep_frontend.native import NativeDoor
from mmprep_frontend.render.loaded_tokenizer import LoadedTokenizer, load_tokenizer
from mmprep_frontend.render.tokenizer_cache import TokenizerCache
from mmprep_frontend.resets import Resets
from mmprep_frontend.room import Room
from mmprep_frontend.service import Service
from mmprep_frontend.supervision import SupervisorLink
from mmprep_frontend.texts import Texts
from mmprep_frontend.warmup import warm_up

if TYPE_CHECKING:
    from mmprep_frontend.tracing.export import OtlpExporter

_log = logging.getLogger("mmprep.frontend")

_INPUT = 0
_THREADS = 2
#: Seconds for which a download that is in use is given to others, too: without a disk cache, and with one.
_RECENT, _RECENT_KEPT = 1.0, 60.0
#: Of the heap, for the next answers.
_KEPT_BYTES = 64 << 20
#: Seconds at the end for traces that were not sent yet.
_LAST_TRACES = 1.0
#: Bytes of all bodies under way, at least.
_BODIES = 512 << 20
#: Bytes of all media that were fetched or read from a disk, at least.
_MEDIA = 512 << 20
#: The interpreter's switch interval: with the default of 5 ms a busy thread starves the loop.
_SWITCH_SECONDS = 0.0005


class Frontend:
    """Everything of one frontend, on the running loop."""

    def __init__(self, settings: FrontendSettings) -> None:
        self._settings = settings
        self._runtime = RuntimeDir(settings.runtime_dir)
        self._context: zmq.Context[Any] = zmq.Context()
        self._render_thread = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="media")
        self._metrics = Metrics()
        self._draining = False
        self._ends_at = 0.0
        self._reason: str | None = "the model is being loaded"
        self._stop = asyncio.Event()
        #: Requests can be answered.
        self._warm = asyncio.Event()
        self._loading: asyncio.Task[None] | None = None
        self._native: NativeDoor | None = None
        hasher = self._hasher = Hasher(settings.hash)  # type: ignore[arg-type]
        policy = UrlPolicy(settings.allowed_media_domains, settings.allow_private_networks)
        largest = settings.max_media_size
        self._memory = MediaMemory(max(_MEDIA, largest))
        kept = settings.media_cache_ttl if settings.media_cache_dir is not None else 0.0
        self._fetcher = Fetcher(
            policy,
            max_bytes=largest,
            memory=self._memory,
            metrics=self._metrics,
            timeout=settings.fetch_timeout,
            # What the disk cache may keep for longer is also given to those who come before it lies there.
            recent=max(_RECENT, min(kept, _RECENT_KEPT)),
        )
        root = settings.allowed_local_media_path
        self._files = None if root is None else LocalFiles(root, largest, self._memory)
        self._cache = self._open_cache(policy)
        self._exporter = _open_exporter(settings.otlp_traces_endpoint)
        self._supervisor = SupervisorLink(
            self._context, self._runtime.supervisor, settings.index, self._report, self._forget
        )
        self._tokenizer = asyncio.get_running_loop().run_in_executor(
            self._render_thread, _load_tokenizer, Path(settings.model)
        )
        # An error is told where the model is loaded; a process that ends before is not asked for it.
        self._tokenizer.add_done_callback(lambda loaded: loaded.cancelled() or loaded.exception())
        self._writer = WriterLink(
            self._context,
            self._runtime,
            settings.index,
            hasher=settings.hash,
            inline_size=settings.inline_size,
            queue_size=settings.queue_size,
            on_card=self._on_card,
        )
        self._intake = Intake(
            self._fetcher,
            hasher,
            MediaLimits(
                settings.max_media_size,
                settings.max_request_media_size,
                settings.max_image_pixels,
                settings.max_request_image_pixels,
            ),
            self._threads,
            lambda seconds: self._metrics.observe("mmprep_stage_seconds", seconds, stage="fetch"),
            files=self._files,
            cache=self._cache,
        )
        self._service = Service(
            writer=self._writer,
            intake=self._intake,
            hasher=hasher,
            metrics=self._metrics,
            render_thread=self._render_thread,
            threads=self._threads,
            tensor_dtype=settings.tensor_dtype,
            limits=settings.limit_mm_per_prompt,
            request_timeout=settings.request_timeout,
            trusts_kwargs=settings.trust_request_mm_kwargs,
            trusts_templates=settings.trust_request_chat_template,
            injection=settings.enable_injection,
        )
        self._injecting = Injecting(
            self._service, self._writer, hasher, enabled=settings.enable_injection, max_bytes=settings.max_media_size
        )

    async def _forget(self, cache: messages.Cache) -> None:
        """Forget what this process keeps of a cache."""
        if cache == "mm":
            if self._service.model is not None:
                self._service.model.prompts.clear()
        elif self._cache is None:
            self._fetcher.forget()
        else:
            await self._cache.forget()

    def _open_cache(self, policy: UrlPolicy) -> MediaCache | None:
        settings = self._settings
        if settings.media_cache_dir is None:
            return None
        disk = CacheDisk(
            Path(settings.media_cache_dir), max_bytes=settings.media_cache_max_size, ttl=settings.media_cache_ttl
        )
        return MediaCache(
            disk,
            self._fetcher,
            policy,
            max_bytes=settings.max_media_size,
            memory=self._memory,
            metrics=self._metrics,
        )

    async def run(self) -> None:
        """Serve until the second SIGTERM, or until the supervisor is gone, then stop; drain from the first one on."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._told_to_stop)
        loop.add_reader(_INPUT, self._input_ready)
        texts = Texts(self._service)
        resets = Resets(self._supervisor.let_all_forget, self._writer, self._cache, self._metrics)
        door = HttpDoor(
            self._service,
            texts,
            resets=resets,
            injecting=self._injecting,
            not_ready=self._not_ready,
            refusal=self._refusal,
            collect=self._supervisor.metrics,
            status=self._supervisor.status,
            job_expiry=self._settings.job_expiry,
        )
        max_body = self._settings.max_body_size
        keyring = Keyring(
            self._settings.api_keys, self._settings.admin_keys, shared=self._settings.share_cache_across_keys
        )
        room = Room(max_body_bytes=max(_BODIES, max_body))
        app = make_app(
            door, version=mmprep.__version__, max_body=max_body, room=room, keyring=keyring, exporter=self._exporter
        )
        serve = partial(serve_http, app, self._settings.host, self._settings.port)
        http = None if self._settings.joins else await serve()
        native = self._native = NativeDoor(
            self._context,
            self._runtime.frontend(self._settings.index),
            self._service,
            texts,
            resets=resets,
            injecting=self._injecting,
            max_body_size=max_body,
            room=room,
            refusal=self._refusal,
            exporter=self._exporter,
            job_expiry=self._settings.job_expiry,
        )
        if self._reason is None:
            native.open()
        try:
            if http is None:
                await self._until_warm()
                http = await serve()
            await self._stop.wait()
        finally:
            await self._end(http, native)

    async def _until_warm(self) -> None:
        """Wait until requests can be answered, or this process is to stop.

        Of those who come to the shared port, the ones that the kernel gave to this process would be refused before.
        """
        waits = [asyncio.create_task(event.wait()) for event in (self._warm, self._stop)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    # --- readiness ------------------------------------------------------------------------------------------------

    def _not_ready(self) -> str | None:
        refusal = self._refusal()
        if refusal is None and not self._writer.warm:
            return self._writer.cold or "the preprocessing worker is being replaced"
        if refusal is None and not self._supervisor.begun:  # whoever asks next may come to another frontend
            return "another process of the service is being started"
        return refusal

    def _refusal(self) -> str | None:
        """Return why requests are refused. While the worker is being replaced they wait, within their deadlines."""
        if self._draining:
            return "the service is stopping"
        return None if self._reason is None else self._writer.cold or self._reason

    def _on_card(self, card: ModelCard) -> None:
        if self._service.model is not None and self._service.model.card == card:
            return
        self._loading = asyncio.create_task(self._load(card))

    async def _load(self, card: ModelCard) -> None:
        settings = self._settings
        try:
            _check_dtype(settings.tensor_dtype, card)
            loaded = await self._tokenizer
            model = await asyncio.get_running_loop().run_in_executor(
                self._render_thread,
                lambda: load_model(
                    Path(settings.model),
                    card,
                    loaded,
                    name=settings.served_model_name,
                    max_model_len=settings.max_model_len,
                    template=settings.chat_template,
                ),
            )
            await self._warm_up(model)
        except MmprepError as error:
            self._reason = str(error)
            self._supervisor.say(messages.StateChange(False, self._reason[:2000], isinstance(error, StartupError)))
            return
        except Exception as error:  # noqa: BLE001 -- whatever it is, readiness must say so
            _log.exception("the model could not be loaded")
            self._reason = f"the model could not be loaded: {type(error).__name__}"
            self._supervisor.say(messages.StateChange(False, self._reason, True))
            return
        self._serve(model)
        self._reason = None
        if self._native is not None:
            self._native.open()
        self._warm.set()
        self._supervisor.say(messages.StateChange(True, ""))

    def _serve(self, model: ServedModel) -> None:
        """Take requests for ``model`` from now on, and let collections of garbage pass over all that is there by now.

        To look through it takes 30 ms and more of the loop's time, again and again.
        """
        if self._service.model is not None:
            gc.unfreeze()  # nothing is to stay of the model that was there
        self._service.model = model
        for placeholder in model.card.placeholders:  # boards divide the one by the other: both are there from the start
            for name in ("mmprep_mm_cache_queries_total", "mmprep_mm_cache_hits_total"):
                self._metrics.count(name, 0, modality=placeholder.modality)
        gc.collect()
        gc.freeze()

    async def _warm_up(self, model: ServedModel) -> None:
        """Warm up on the render thread; raises ServiceUnavailable with what ``/ready`` is to say."""
        limits, threads = self._settings.limit_mm_per_prompt, [self._threads] * _THREADS
        work = partial(warm_up, model, self._intake, self._hasher, limits, threads)
        try:
            await asyncio.get_running_loop().run_in_executor(self._render_thread, work)
        except Exception as error:  # noqa: BLE001 -- whatever it is, readiness must say so
            _log.exception("the frontend does not get warm")
            why = f"a frontend cannot be warmed up ({type(error).__name__}); its log says more"
            raise ServiceUnavailable(why) from None

    def _report(self) -> ProcessReport:
        self._metrics.gauge("mmprep_inflight", self._service.inflight)
        self._metrics.gauge("mmprep_media_bytes", self._memory.nbytes)
        if self._exporter is not None:
            self._metrics.total("mmprep_trace_spans_total", self._exporter.exported, outcome="exported")
            self._metrics.total("mmprep_trace_spans_total", self._exporter.dropped, outcome="dropped")
        return ProcessReport(
            os.getpid(), self._metrics.snapshot(), {"pid": os.getpid(), "inflight": self._service.inflight}
        )

    # --- the end --------------------------------------------------------------------------------------------------

    def _input_ready(self) -> None:
        if not os.read(_INPUT, 4096):
            asyncio.get_running_loop().remove_reader(_INPUT)
            self._stop.set()

    def _told_to_stop(self) -> None:
        if self._draining:
            self._stop.set()
            return
        self._drain()
        asyncio.get_running_loop().call_later(self._settings.drain_timeout, self._stop.set)

    def _drain(self) -> None:
        """Refuse new work. Doors stay open: ``/ready`` says no, and leases are still renewed and released."""
        self._draining = True
        self._ends_at = asyncio.get_running_loop().time() + self._settings.drain_timeout
        self._supervisor.say(messages.StateChange(False, "the service is stopping"))

    async def _end(self, http: HttpServer | None, native: NativeDoor) -> None:
        if not self._draining:
            self._drain()
        grace = max(0.0, self._ends_at - asyncio.get_running_loop().time())
        await asyncio.gather(native.close(grace), *([] if http is None else [http.close(grace)]))
        if self._exporter is not None:
            left = min(_LAST_TRACES, max(0.1, self._ends_at - asyncio.get_running_loop().time()))
            await asyncio.get_running_loop().run_in_executor(self._threads, self._exporter.close, left)
        await self._fetcher.close()
        if self._files is not None:
            self._files.close()
        if self._cache is not None:
            await self._cache.close()
        self._writer.close()
        self._supervisor.close()
        self._render_thread.shutdown(wait=False, cancel_futures=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._context.destroy(linger=100)


def _open_exporter(endpoint: str | None) -> OtlpExporter | None:
    if endpoint is None:
        return None
    from mmprep_frontend.tracing.export import OtlpExporter  # noqa: PLC0415, an extra of its own

    return OtlpExporter(endpoint)


def _load_tokenizer(directory: Path) -> LoadedTokenizer:
    """Load the tokenizer on the thread that will use it, beside the rest of the start: it may take a second."""
    return load_tokenizer(directory, TokenizerCache())


def _check_dtype(name: str, card: ModelCard) -> None:
    """Refuse a ``--tensor-dtype`` with which every request would be refused; raises StartupError."""
    if all(card.dtype(modality, name) is None for modality in card.dtypes):
        known = ", ".join(dict.fromkeys(dtype for dtypes in card.dtypes.values() for dtype in dtypes))
        raise StartupError(f"--tensor-dtype {name}: this model's tensors come as {known}; give one of these, or auto")


async def _run(settings: FrontendSettings) -> None:
    frontend = Frontend(settings)
    await frontend.run()


def main() -> None:
    """Run one frontend; the orders come on standard input."""
    leave_torch_out()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings: FrontendSettings = read_settings(FrontendSettings)
    settings.logs.apply()
    # Texts are tokenized one by one: the library's own threads would only be woken, which costs as much as a short text.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_memory(_KEPT_BYTES, arenas=1)
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        uvloop.run(_run(settings))
    except MmprepError as error:
        print(f"mmprep: {error}", file=sys.stderr, flush=True)  # noqa: T201 -- before there is a log
        sys.exit(CANNOT_START)
