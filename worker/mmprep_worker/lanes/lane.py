"""One lane: takes a task, decodes and processes its medium, writes the tensors into the extent granted to it.

A lane does one task at a time and speaks when it is spoken to: task in, extent asked for, granted, filled, answer out. It
never frees, publishes or chooses memory. Between the grant and its answer it may write into the granted extent and
nowhere else.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq

from mmprep import failpoints
from mmprep.digest import Hasher
from mmprep.errors import DecodeError, InternalError, MmprepError, ProtocolError, StartupError, TooLarge
from mmprep.items import DTYPE_SIZES, ItemMeta, align, field_array, region_size
from mmprep.process_lock import ProcessLock
from mmprep.segment import Segment
from mmprep.settings import read_settings
from mmprep.wire import messages
from mmprep.wire.codec import pack, unpack
from mmprep.wire.sockets import configure
from mmprep_worker.lanes.config import LaneConfig
from mmprep_worker.lanes.garbage import garbage
from mmprep_worker.lanes.warmup import warm_up
from mmprep_worker.models.family import Family, ItemOptions, Prepared
from mmprep_worker.models.registry import load_family

_log = logging.getLogger("mmprep.lane")

_INPUT = 0
_PR_SET_PDEATHSIG = 1
#: mallopt(3): buffers up to this many bytes come from the heap, and this much of it is kept for the next picture. By
#: default each picture's buffers are mapped, faulted in page by page and given back: a fifth of a small picture's time.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 << 20


class WriterGoneError(Exception):
    """The writer has closed our standard input."""


class Lane:
    """The process's one object: sockets, segment and family."""

    def __init__(self, config: LaneConfig) -> None:
        self._config = config
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        configure(self._socket, frame_limit=config.max_media_size + (1 << 20))
        self._socket.routing_id = f"lane:{config.lane}:{config.token[:16]}".encode()
        self._socket.connect(config.endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(_INPUT, zmq.POLLIN)
        self._segment = Segment.attach(config.segment, writable=True)

    def run(self) -> None:
        """Warm up, announce, then work until the writer is gone."""
        token = bytes.fromhex(self._config.token)
        try:
            family = load_family(Path(self._config.model), max_image_pixels=self._config.max_image_pixels)
            warm_up(family)
        except MmprepError as error:
            self._broken(token, error)
            return
        except (WriterGoneError, zmq.ZMQError):
            raise
        except Exception as error:  # noqa: BLE001 -- whatever it is, the next start would meet it too
            _log.exception("lane %d cannot start", self._config.lane)
            why = f"a lane cannot start ({type(error).__name__}); what it said stands above"
            self._broken(token, StartupError(why))
            return
        _log.info("lane %d is warm", self._config.lane)
        card = msgspec.msgpack.encode(family.card)
        self._send(messages.LaneReady(self._config.lane, token, card))
        while True:
            frames = self._receive()
            task: messages.Task = unpack(frames[0].buffer, messages.Task)
            failpoints.reach("lane.task.received")
            self._work(family, task, frames[1])

    def _broken(self, token: bytes, error: MmprepError) -> None:
        """Tell why this lane will not work, and wait for the end."""
        self._send(messages.LaneBroken(self._config.lane, token, messages.Fault.of(error)))
        self._receive()

    # --- one task -------------------------------------------------------------------------------------------------

    def _work(self, family: Family, task: messages.Task, medium: zmq.Frame) -> None:
        try:
            self._process(family, task, medium.buffer)
        except MmprepError as error:
            self._send(messages.TaskFailed(task.task, messages.Fault.of(error)))
        except MemoryError:
            too_large = TooLarge("the medium needs more memory than one lane may use")
            self._send(messages.TaskFailed(task.task, messages.Fault.of(too_large)))
        except (WriterGoneError, zmq.ZMQError):
            raise
        except Exception:  # noqa: BLE001 -- a decoder's fault must not end the lane silently
            _log.exception("lane %d: a medium broke the code", self._config.lane)
            self._send(
                messages.TaskFailed(task.task, messages.Fault.of(InternalError("the medium broke a lane's code")))
            )

    def _process(self, family: Family, task: messages.Task, medium: memoryview) -> None:
        _check_digest(task, medium)
        failpoints.reach("lane.digest.checked")
        options = unpack(task.options, ItemOptions)
        started = time.monotonic_ns()
        if task.need == "plan":
            meta = ItemMeta(task.modality, family.plan(task.modality, medium, options), (), {})
            self._send(messages.Planned(task.task), meta.pack())
            return
        prepared = family.open(task.modality, medium, options)
        opened = time.monotonic_ns()
        for spec in prepared.meta.fields:
            if spec.dtype not in DTYPE_SIZES:
                raise DecodeError(f"the model's processor returned dtype {spec.dtype}, which cannot be handed over")
        blob = prepared.meta.pack()
        granted = self._ask_extent(task.task, blob, region_size(prepared.meta.fields))
        if granted is None:
            return
        failpoints.reach("lane.granted")
        filling = time.monotonic_ns()
        self._fill(prepared, blob, granted)
        worked = opened - started + time.monotonic_ns() - filling  # waiting for the extent is neither
        decode = prepared.decode_ns
        failpoints.reach("lane.filled.before")
        self._send(messages.Filled(task.task, decode // 1000, max(0, worked - decode) // 1000))
        failpoints.reach("lane.filled.after")

    def _ask_extent(self, task: int, blob: bytes, tensor_length: int) -> messages.Granted | None:
        self._send(messages.AskExtent(task, tensor_length), blob)
        answer = unpack(self._receive()[0].buffer, messages.ToLane)
        if answer.task != task:
            raise ProtocolError("the writer answered for another task")
        return answer if isinstance(answer, messages.Granted) else None

    def _fill(self, prepared: Prepared, blob: bytes, granted: messages.Granted) -> None:
        extent = self._segment.buffer[granted.offset : granted.offset + granted.length]
        extent[: len(blob)] = blob
        failpoints.reach("lane.fill.middle")
        region = extent[align(len(blob)) :]
        prepared.fill({spec.name: field_array(region, spec) for spec in prepared.meta.fields})

    # --- messages -------------------------------------------------------------------------------------------------

    def _send(self, message: msgspec.Struct, *frames: bytes) -> None:
        kind = failpoints.reach("lane.send", message)
        for sent in [[pack(message), *frames]] if kind is None else garbage(kind, message, frames):
            self._wait(zmq.POLLOUT)  # a blocking send would wait for ever for a writer that is gone
            self._socket.send_multipart(sent, zmq.NOBLOCK)

    def _receive(self) -> list[zmq.Frame]:
        self._wait(zmq.POLLIN)
        return self._socket.recv_multipart(zmq.NOBLOCK, copy=False)

    def _wait(self, event: int) -> None:
        """Wait until the socket can do ``event``; raises WriterGoneError where the writer ends before."""
        self._poller.modify(self._socket, event)
        while True:
            ready = dict(self._poller.poll())
            if self._socket in ready:
                return
            if _INPUT in ready and not os.read(_INPUT, 4096):
                raise WriterGoneError


def _check_digest(task: messages.Task, medium: memoryview) -> None:
    """Refuse bytes that are not those whose digest is part of the key: they would be served to others under it."""
    if Hasher(task.hasher).content_digest(medium) != task.digest:
        raise ProtocolError("the medium's bytes do not match their digest")


def _keep_memory() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, other C libraries do not
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _writer_is_gone() -> bool:
    poller = select.poll()
    poller.register(_INPUT, 0)
    return bool(poller.poll(0))


def main() -> None:
    """Run one lane; the orders come on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The end of standard input is only seen between tasks; a lane that hangs in a decoder must not outlive its writer.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _keep_memory()
    config: LaneConfig = read_settings(LaneConfig)
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if _writer_is_gone():  # before the signal was asked for: its successor waits for this lane's lock
        return
    lock = ProcessLock(Path(config.lock))
    if not lock.acquire():
        sys.exit(f"lane {config.lane}: its lock is held by another process")
    resource.setrlimit(resource.RLIMIT_DATA, (config.data_limit, config.data_limit))
    os.nice(config.nice)
    try:
        Lane(config).run()
    except WriterGoneError:
        return
