"""One lane: takes a task, decodes and processes its medium, writes the tensors into the extent granted to it.

A lane does one task at a time and speaks when it is spoken to: task in, extent asked for, granted, filled, answer out. It
never frees, publishes or chooses memory. Between the grant and its answer it may write into the granted extent and
nowhere else. Where the ring has no room, it is told to make a segment for the item (a spill), or to send the tensors.
"""

from __future__ import annotations

import gc
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
from mmprep.allocator import keep_memory
from mmprep.card import ItemOptions
from mmprep.digest import Hasher
from mmprep.errors import (
    DecodeError,
    InternalError,
    MmprepError,
    ProtocolError,
    ServiceUnavailable,
    StartupError,
    TooLarge,
)
from mmprep.items import DTYPE_SIZES, ItemMeta, align, field_array, region_size
from mmprep.layout import PAGE, RECORD_SIZE, Geometry, Header, Record, State, pack_header, pack_record
from mmprep.parent import end_with_parent
from mmprep.process_lock import ProcessLock
from mmprep.segment import Segment
from mmprep.settings import read_settings
from mmprep.wire import messages
from mmprep.wire.codec import pack, unpack
from mmprep.wire.configured import configure
from mmprep.wire.frames import send_frames
from mmprep.without_torch import leave_torch_out
from mmprep_worker.lanes.config import LaneConfig
from mmprep_worker.lanes.garbage import garbage
from mmprep_worker.lanes.warmup import ColdError, warm_up
from mmprep_worker.models.embedded import open_embedded
from mmprep_worker.models.family import Family, Prepared
from mmprep_worker.models.injected import open_injected
from mmprep_worker.models.registry import load_family

_log = logging.getLogger("mmprep.lane")

_INPUT = 0
#: Of the heap, for the next picture.
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
        self._tensors: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        configure(self._tensors)
        self._tensors.routing_id = self._socket.routing_id
        self._tensors.connect(config.tensors)
        self._segment = Segment.attach(config.segment, writable=True)
        #: What the present task has waited for the writer.
        self._waited_ns = 0

    def run(self) -> None:
        """Warm up, announce, then work until the writer is gone."""
        token = bytes.fromhex(self._config.token)
        try:
            family = load_family(Path(self._config.model), self._config.limits, self._config.image_background)
        except MmprepError as error:
            self._broken(token, error)
            return
        except Exception as error:  # noqa: BLE001 -- whatever it is, the next start would meet it too
            _log.exception("lane %d cannot start", self._config.lane)
            why = f"a lane cannot start ({type(error).__name__}); what it said stands above"
            self._broken(token, StartupError(why))
            return
        try:
            warm_up(family, self._config.modalities)
        except ColdError as error:
            _log.error("lane %d does not get warm", self._config.lane, exc_info=error.__cause__)
            self._broken(token, ServiceUnavailable(str(error)), lasting=False)
            return
        gc.freeze()
        gc.enable()
        _log.info("lane %d is warm", self._config.lane)
        card = msgspec.msgpack.encode(family.card)
        self._send(messages.LaneReady(self._config.lane, token, card))
        while True:
            frames = self._receive()
            task: messages.Task = unpack(frames[0].buffer, messages.Task)
            failpoints.reach("lane.task.received")
            self._work(family, task, frames[1])

    def _broken(self, token: bytes, error: MmprepError, *, lasting: bool = True) -> None:
        """Tell why this lane will not work, and wait for the end."""
        self._send(messages.LaneBroken(self._config.lane, token, messages.Fault.of(error), lasting))
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
        started, self._waited_ns = time.monotonic_ns(), 0
        if task.need == "injected":
            self._hand_over(task, open_injected(family, task.modality, medium, task.digest), started)
            return
        options = unpack(task.options, ItemOptions)
        if task.need == "plan":
            meta = ItemMeta(task.modality, family.plan(task.modality, medium, options), (), {})
            self._send(messages.Planned(task.task), meta.pack())
            return
        if options.grid is not None:
            self._hand_over(task, open_embedded(family.card, task.modality, medium, options.grid), started)
            return
        self._hand_over(task, family.open(task.modality, medium, options), started)

    def _hand_over(self, task: messages.Task, prepared: Prepared, started: int) -> None:
        """Write an item to where there is room for it; its task was started at ``started``, in nanoseconds."""
        for spec in prepared.meta.fields:
            if spec.dtype not in DTYPE_SIZES:
                raise DecodeError(f"the model's processor returned dtype {spec.dtype}, which cannot be handed over")
        blob = prepared.meta.pack()
        region: memoryview | None = None
        match self._ask_room(task.task, prepared, blob):
            case messages.Granted() as granted:
                failpoints.reach("lane.granted")
                _fill(self._segment.buffer[granted.offset : granted.offset + granted.length], prepared, blob)
            case messages.GrantedInline():
                region = memoryview(bytearray(region_size(prepared.meta.fields)))
                _fill_region(region, prepared)
            case messages.Denied():
                return
        worked = time.monotonic_ns() - started - self._waited_ns
        times = prepared.decode_ns // 1000, max(0, worked - prepared.decode_ns) // 1000
        failpoints.reach("lane.filled.before")
        if region is None:
            self._send(messages.Filled(task.task, *times))
        else:
            self._send(messages.Inlined(task.task, *times), region, socket=self._tensors)
        failpoints.reach("lane.filled.after")

    def _ask_room(self, task: int, prepared: Prepared, blob: bytes) -> messages.ToLane:
        """Ask where the item goes; a spill that is granted is made and filled here, if it can be."""
        self._send(messages.AskExtent(task, region_size(prepared.meta.fields)), blob)
        granted = self._granted(task)
        if not isinstance(granted, messages.GrantedSpill):
            return granted
        spill = _make_spill(granted)
        if spill is None:
            self._send(messages.NoSpill(task))
            return self._granted(task)
        with spill:
            failpoints.reach("lane.spill.made")
            _fill_spill(spill, prepared, blob, granted)
        return granted

    def _granted(self, task: int) -> messages.ToLane:
        waiting = time.monotonic_ns()
        answer: messages.ToLane = unpack(self._receive()[0].buffer, messages.ToLane)
        self._waited_ns += time.monotonic_ns() - waiting
        if answer.task != task:
            raise ProtocolError("the writer answered for another task")
        return answer

    # --- messages -------------------------------------------------------------------------------------------------

    def _send(
        self, message: msgspec.Struct, *frames: bytes | memoryview, socket: zmq.Socket[bytes] | None = None
    ) -> None:
        socket = socket or self._socket
        kind = failpoints.reach("lane.send", message)
        for sent in [[pack(message), *frames]] if kind is None else garbage(kind, message, frames):
            _wait(socket, zmq.POLLOUT)  # a blocking send would wait for ever for a writer that is gone
            send_frames(socket, sent)

    def _receive(self) -> list[zmq.Frame]:
        _wait(self._socket, zmq.POLLIN)
        return self._socket.recv_multipart(zmq.NOBLOCK, copy=False)


def _wait(socket: zmq.Socket[bytes], event: int) -> None:
    """Wait until the socket can do ``event``; raises WriterGoneError where the writer ends before."""
    poller = zmq.Poller()
    poller.register(socket, event)
    poller.register(_INPUT, zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if socket in ready:
            return
        if _INPUT in ready and not os.read(_INPUT, 4096):
            raise WriterGoneError


def _fill(extent: memoryview, prepared: Prepared, blob: bytes) -> None:
    """Write an item: metadata, then tensors."""
    extent[: len(blob)] = blob
    failpoints.reach("lane.fill.middle")
    _fill_region(extent[align(len(blob)) :], prepared)


def _fill_region(region: memoryview, prepared: Prepared) -> None:
    prepared.fill({spec.name: field_array(region, spec) for spec in prepared.meta.fields})


def _make_spill(granted: messages.GrantedSpill) -> Segment | None:
    """Make the segment for one item; ``None`` where there is no memory for it."""
    try:
        return Segment.create(granted.name, Geometry.plan(granted.length, 1).total_size)
    except StartupError:
        _log.warning("there is no shared memory for an item of %d bytes beside the ring", granted.length)
        return None


def _fill_spill(spill: Segment, prepared: Prepared, blob: bytes, granted: messages.GrantedSpill) -> None:
    """Write header and item, and last the record, without which nobody reads the item."""
    geometry = Geometry.plan(granted.length, 1)
    start = geometry.arena_offset
    spill.buffer[:PAGE] = pack_header(Header(granted.epoch, granted.incarnation, geometry))
    _fill(spill.buffer[start : start + granted.length], prepared, blob)
    failpoints.reach("lane.spill.filled")
    record = Record(State.READY, 0, granted.generation, start, len(blob), granted.length, granted.key)
    place = geometry.record_offset(0)
    spill.buffer[place : place + RECORD_SIZE] = pack_record(record)


def _check_digest(task: messages.Task, medium: memoryview) -> None:
    """Refuse bytes that are not those whose digest is part of the key: they would be served to others under it."""
    if Hasher(task.hasher).content_digest(medium) != task.digest:
        raise ProtocolError("the medium's bytes do not match their digest")


def _writer_is_gone() -> bool:
    poller = select.poll()
    poller.register(_INPUT, 0)
    return bool(poller.poll(0))


def main() -> None:
    """Run one lane; the orders come on standard input."""
    leave_torch_out()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The end of standard input is only seen between tasks; a lane that hangs in a decoder must not outlive its writer.
    end_with_parent(signal.SIGKILL)
    keep_memory(_KEPT_BYTES)
    config: LaneConfig = read_settings(LaneConfig)
    config.logs.apply()
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
