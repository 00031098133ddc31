"""The writer's process: sockets, segment, clock and child processes around :class:`~.core.WriterCore`.

One thread, one poll loop. After each event the directory records are written first, then the actions are carried out: a
reader never sees a record that is younger than the message that speaks of it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket as unix
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zmq

import mmprep
from mmprep import failpoints, layout
from mmprep.errors import Busy, MmprepError, ProtocolError, ServiceUnavailable, StaleAddress, StartupError
from mmprep.metrics import Metrics
from mmprep.process_lock import ProcessLock, holder, noted
from mmprep.runtime import RuntimeDir
from mmprep.segment import sibling_name, unlink
from mmprep.settings import WriterSettings
from mmprep.wire import messages
from mmprep.wire.codec import CONTROL_LIMIT, MAX_FRAMES, PROTOCOL, pack, unpack, unpacker
from mmprep.wire.configured import configure, router
from mmprep.wire.frames import readable, recv_frames, send_frames
from mmprep.wire.outbox import Outbox
from mmprep_worker.lanes.config import LaneConfig
from mmprep_worker.lanes.pool import LanePool
from mmprep_worker.models.family import MediaLimits
from mmprep_worker.writer.core import READERS
from mmprep_worker.writer.making import make_core
from mmprep_worker.writer.opening import new_ring, open_ring
from mmprep_worker.writer.pauses import Pauses
from mmprep_worker.writer.report import report
from mmprep_worker.writer.state import KillLane, ReadersSilent, RemoveSegment, Send, ToLane
from mmprep_worker.writer.waiting import Waiting

_log = logging.getLogger("mmprep.writer")

_INPUT = 0
_BATCH = 128
#: Milliseconds after which a supervisor that takes no message is gone.
_SUPERVISOR_MS = 5000
_CHECK_LOCKS_EVERY = 0.25
#: Seconds for which what was found out about the next deadlines is good enough: to ask all parts costs as much as a small
#: message does, and so a deadline may be met so much too late.
_LOOK_EVERY = 0.01
#: Starts of a lane that end before it was ever warm, after which the service gives up; later ones wait longer each time.
_START_TRIES = 4


_unpack_control = unpacker(messages.ToWriter)


class WriterShell:
    """Everything of the writer that touches the world."""

    def __init__(self, settings: WriterSettings) -> None:
        self._settings = settings
        self._runtime = RuntimeDir(settings.runtime_dir)
        self._lock = ProcessLock(self._runtime.lock_path("writer", "0"))
        if not self._lock.acquire():
            raise ServiceUnavailable("another writer holds this runtime directory")
        self._context: zmq.Context[Any] = zmq.Context()
        self._supervisor: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        configure(self._supervisor)
        self._supervisor.sndtimeo = _SUPERVISOR_MS
        self._supervisor.connect(self._runtime.supervisor)
        self._waiting = Waiting()
        self._supervisor_fd = self._read_from(self._supervisor, self._supervisor_message)
        self._tell(messages.Hello(PROTOCOL, mmprep.__version__, "writer", "0", os.getpid()))
        self._tell(messages.StateChange(False, "the ring is being made"))
        self._geometry = layout.Geometry.for_ring(settings.cache_size)
        self._largest = min(settings.max_object_size, self._geometry.arena_capacity // 4)
        opened = open_ring(self._runtime, self._geometry, self._largest, settings.spill_size)
        self._segment = opened.segment
        self._core = make_core(self._settings, opened, self._geometry, time.monotonic(), Metrics(), self._read)
        self._control = router(self._context, self._runtime.writer)
        self._lanes = router(self._context, self._runtime.lanes)
        self._bulk: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        configure(self._bulk, frame_limit=settings.max_media_size + (1 << 16))
        self._bulk.rcvhwm = 64
        self._bulk.bind(self._runtime.writer_bulk)
        self._tensors = router(self._context, self._runtime.tensors)
        self._lane_tensors = router(
            self._context, self._runtime.lanes_bulk, frame_limit=max(CONTROL_LIMIT, settings.inline_size)
        )
        self._lanes_fd = self._read_from(self._lanes, self._lane_message)
        self._control_fd = self._read_from(self._control, self._control_message)
        self._read_from(self._bulk, self._bulk_message, copy=False)
        self._read_from(self._lane_tensors, self._inlined, copy=False)
        self._tensors_fd = self._read_from(self._tensors, self._fetch)
        self._outbox = Outbox(max_messages=4096, max_bytes=16 << 20)
        self._pool = LanePool(settings.lanes, self._lane_config, time.monotonic())
        self._lane_peers: dict[bytes, int] = {}
        self._lane_identities: dict[int, bytes] = {}
        self._said: tuple[bool, str] | None = None
        #: Lanes that have told why they do not get warm, and are about to end.
        self._explained: set[int] = set()
        self._stopped = False
        self._locks_checked = 0.0
        #: As it was when it was looked at.
        self._core_wakes_at = self._pool_wakes_at = 0.0
        self._looked_at = -math.inf
        self._pauses = Pauses(time.monotonic(), turn_seconds=_CHECK_LOCKS_EVERY)

    # --- setting up -----------------------------------------------------------------------------------------------

    def _read(self, offset: int, length: int) -> bytes:
        return bytes(self._segment.buffer[offset : offset + length])

    def _lane_config(self, number: int, token: bytes) -> LaneConfig:
        settings = self._settings
        return LaneConfig(
            lane=number,
            token=token.hex(),
            endpoint=self._runtime.lanes,
            tensors=self._runtime.lanes_bulk,
            lock=str(self._runtime.lock_path("lane", str(number))),
            segment=self._segment.name,
            model=settings.model,
            limits=MediaLimits(
                settings.max_image_pixels,
                settings.max_video_frames,
                settings.max_video_duration,
                settings.max_audio_duration,
            ),
            modalities=settings.modalities,
            image_background=settings.image_background,
            max_media_size=settings.max_media_size,
            data_limit=settings.lane_memory,
            nice=5,
            logs=settings.logs,
        )

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until told to stop."""
        wake_r, wake_w = unix.socketpair()
        wake_r.setblocking(False)
        wake_w.setblocking(False)
        signal.set_wakeup_fd(wake_w.fileno())
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._waiting.add(wake_r.fileno(), self._stop)
        self._waiting.add(_INPUT, self._stop)
        while True:
            now = time.monotonic()
            if self._pool_wakes_at <= now:
                self._start_lanes(now)
                self._looked_at = -math.inf
            ready = self._waiting.wait(self._timeout(now))
            now = time.monotonic()
            self._pauses.turned(now, input_ready=bool(ready))
            for handle in ready:
                handle()
            if self._stopped:
                return
            self._end_turn(now)

    def _stop(self) -> None:
        self._stopped = True

    def _sockets(self) -> tuple[zmq.Socket[bytes], ...]:
        return self._control, self._bulk, self._tensors, self._lanes, self._lane_tensors, self._supervisor

    def _read_from(self, socket: zmq.Socket[bytes], handle: Callable[[list[Any]], None], *, copy: bool = True) -> int:
        """Let ``handle`` take the messages of a socket from now on; return what the socket is called in ``_waiting``."""
        fd = self._waiting.add_socket(socket, lambda: self._drain(fd, socket, handle, copy=copy))
        return fd

    def _timeout(self, now: float) -> float:
        look_at = self._looked_at + _LOOK_EVERY
        if look_at <= now:
            self._looked_at, look_at = now, math.inf
            self._core_wakes_at, self._pool_wakes_at = self._core.wake_at, self._pool.wake_at
        if self._pauses.behind:
            return 0.0
        wake = min(self._core_wakes_at, self._pool_wakes_at, self._locks_checked + _CHECK_LOCKS_EVERY, look_at)
        if self._outbox:
            wake = min(wake, now + 0.005)
        return max(0.0, wake - now)

    def _end_turn(self, now: float) -> None:
        if self._core_wakes_at <= now and not self._pauses.behind:
            self._looked_at = -math.inf
            self._core.tick(now)
            self._carry_out()
        if self._locks_checked + _CHECK_LOCKS_EVERY <= now:
            self._check_locks(now)
        if self._outbox:
            self._flush_outbox()
        self._say_state()

    def _start_lanes(self, now: float) -> None:
        for number in self._pool.start_due(now):
            self._waiting.add(self._pool.pidfd(number), partial(self._lane_exited, number))

    def _drain(
        self, fd: int, socket: zmq.Socket[bytes], handle: Callable[[list[Any]], None], *, copy: bool = True
    ) -> None:
        for _ in range(_BATCH):
            try:
                frames = recv_frames(socket, copy=copy)
            except zmq.Again:  # something else has happened to it
                break
            handle(frames)
            self._carry_out()
            if not readable(socket):
                break
        else:
            self._waiting.used(fd)
            return
        self._waiting.emptied(fd)

    # --- what comes in --------------------------------------------------------------------------------------------

    def _control_message(self, frames: list[bytes]) -> None:
        identity = frames[0]
        try:
            if len(frames) < 2:
                raise ProtocolError("a control message has a header")
            message, content = _unpack_control(frames[1]), frames[2:]
            _check_frames(message, content)
            if isinstance(message, messages.Hello):
                self._check_hello(message)
        except MmprepError as error:
            self._core.count_refused("writer", error)
            self._core.unreachable(identity, time.monotonic())
            self._send_frames([identity, pack(messages.Refused(messages.Fault.of(error)))])
            return
        failpoints.reach("writer.message.before", message)
        self._core.message(identity, message, time.monotonic(), content)
        failpoints.reach("writer.message.after", message)

    def _check_hello(self, hello: messages.Hello) -> None:
        """Refuse another protocol, and a reader that has not the process lock of its id: leases hang on that lock."""
        if hello.protocol != PROTOCOL:
            raise ProtocolError(f"this service speaks protocol {PROTOCOL}, the peer {hello.protocol}; use one version")
        if hello.role in READERS:
            path = self._runtime.lock_path(hello.role, hello.id)
            try:
                holds = holder(path) is not None and noted(path, len(hello.instance) + 1) == hello.instance
            except OSError:
                holds = False
            if not holds:
                raise ProtocolError(f"the peer does not hold the process lock of {hello.role} {hello.id}")

    def _bulk_message(self, frames: list[zmq.Frame]) -> None:
        try:
            put = unpack(frames[0].buffer, messages.Put)
            if len(frames) != 2:
                raise ProtocolError("a bulk message is a header and a medium")
        except MmprepError as error:
            _log.warning("a bulk message was refused: %s", error)
            self._core.count_refused("bulk", error)
            return
        failpoints.reach("writer.put.received")
        self._core.put(put, frames[1], len(frames[1]), time.monotonic())

    def _lane_message(self, frames: list[bytes]) -> None:
        identity, now = frames[0], time.monotonic()
        number = self._lane_peers.get(identity)
        try:
            message = unpack(frames[1], messages.FromLane)
            has_blob = isinstance(message, messages.AskExtent | messages.Planned)
            if len(frames) != 2 + has_blob:
                raise ProtocolError("a lane's message has a wrong number of frames")
        except (MmprepError, IndexError) as error:
            self._core.count_refused("lanes", error)
            if number is None:
                _log.warning("a message of a process that is no lane was refused: %s", error)
            else:
                _log.error("lane %d broke the protocol and is replaced: %s", number, error)
                self._core.lane_broke_protocol(number)
            return
        if isinstance(message, messages.LaneReady | messages.LaneBroken):
            if self._pool.is_child(message.lane, message.token):
                self._lane_announced(identity, message, now)
            return
        if number is not None:
            self._core.from_lane(number, message, frames[2:], now)

    def _inlined(self, frames: list[zmq.Frame]) -> None:
        """A lane sends tensors that found no shared memory."""
        number = self._lane_peers.get(frames[0].bytes)
        if number is None:
            return
        try:
            message = unpack(frames[1].buffer if len(frames) == 3 else b"", messages.Inlined)
        except MmprepError as error:
            _log.error("lane %d broke the protocol and is replaced: %s", number, error)
            self._core.count_refused("lanes", error)
            self._core.lane_broke_protocol(number)
            return
        failpoints.reach("writer.inlined.received")
        self._core.from_lane(number, message, frames[2:], time.monotonic())

    def _fetch(self, frames: list[bytes]) -> None:
        """A frontend fetches tensors that an answer named. What does not go out at once is not sent."""
        try:
            fetch = unpack(frames[1] if len(frames) == 2 else b"", messages.Fetch)
        except MmprepError as error:
            _log.warning("a message of a frontend was refused: %s", error)
            self._core.count_refused("tensors", error)
            return
        failpoints.reach("writer.fetch.received")
        tensors = self._core.tensors(fetch.inline)
        gone = messages.Failed(
            fetch.call, messages.Fault.of(StaleAddress("the tensors are gone; ask for the item again"))
        )
        answer = [pack(gone)] if tensors is None else [pack(messages.Tensors(fetch.call)), tensors]
        self._waiting.used(self._tensors_fd)
        with contextlib.suppress(zmq.ZMQError):
            send_frames(self._tensors, [frames[0], *answer])

    def _lane_announced(self, identity: bytes, message: messages.LaneReady | messages.LaneBroken, now: float) -> None:
        if isinstance(message, messages.LaneBroken):
            if message.lasting:
                self._lane_cannot_start(message.lane, message.fault.message)
            else:
                self._lane_not_warm(message.lane, message.fault.message)
            return
        self._lane_peers[identity] = message.lane
        self._lane_identities[message.lane] = identity
        self._pool.settled(message.lane)
        self._core.lane_ready(message.lane, self._pool.pid(message.lane), message.card, now)

    def _lane_cannot_start(self, number: int, why: str) -> None:
        """A service whose lanes were never warm ends; in one that works, the lane is tried again, ever more rarely."""
        if not self._core.card:
            self._tell(messages.StateChange(False, why, True))
        else:
            _log.error("lane %d cannot start, and is tried again: %s", number, why)
            self._pool.kill(number)

    def _lane_not_warm(self, number: int, why: str) -> None:
        """The service says so until the lane, which is tried again ever more rarely, gets warm."""
        _log.error("lane %d does not get warm, and is tried again: %s", number, why)
        self._explained.add(number)
        self._core.not_warm(why)
        self._carry_out()
        self._pool.kill(number)

    def _lane_exited(self, number: int) -> None:
        now = time.monotonic()
        self._waiting.remove(self._pool.pidfd(number))
        status = self._pool.exited(number, now)
        explained = number in self._explained
        self._explained.discard(number)
        _log.warning("lane %d ended with status %d and is replaced", number, status)
        if not self._core.card and not explained and self._pool.failures(number) >= _START_TRIES:
            why = f"the lanes end with status {status} before they are warm; raise --lane-memory if they need more"
            self._lane_cannot_start(number, why)
        identity = self._lane_identities.pop(number, None)
        if identity is not None:
            self._lane_peers.pop(identity, None)
        self._core.lane_exited(number, now)
        self._carry_out()

    def _check_locks(self, now: float) -> None:
        """Death is proved by a process lock that has fallen, and by nothing else."""
        self._locks_checked = now
        readers = {(peer.role, peer.id) for peer in self._core.peers.values() if peer.role in READERS}
        for role, reader in readers | self._core.awaited:
            if holder(self._runtime.lock_path(role, reader)) is None:
                self._core.peer_gone(role, reader, now)
        self._carry_out()

    def _supervisor_message(self, frames: list[bytes]) -> None:
        message = unpack(frames[0], messages.FromSupervisor)
        if isinstance(message, messages.Collect):
            encoded = msgspec.json.encode(report(self._core, self._segment.name, time.monotonic()))
            self._waiting.used(self._supervisor_fd)
            with contextlib.suppress(zmq.Again):
                self._supervisor.send_multipart([pack(messages.Report(message.call)), encoded], zmq.NOBLOCK)

    # --- what goes out --------------------------------------------------------------------------------------------

    def _carry_out(self) -> None:
        core = self._core
        for slot, record in core.ring.take_writes():
            start = self._geometry.record_offset(slot)
            failpoints.reach("writer.record.before")
            self._segment.buffer[start : start + layout.RECORD_SIZE] = record
            failpoints.reach("writer.record.after")
        for action in core.take_actions():
            match action:
                case Send():
                    failpoints.reach("writer.send.before", action.message)
                    self._send_frames([action.peer, pack(action.message), *action.frames])
                    failpoints.reach("writer.send.after", action.message)
                case ToLane():
                    failpoints.reach("writer.lane.before", action.message)
                    self._to_lane(action)
                    failpoints.reach("writer.lane.after", action.message)
                case KillLane():
                    _log.warning("lane %d is beyond its time and is killed", action.lane)
                    self._pool.kill(action.lane)
                case RemoveSegment():
                    unlink(action.name)
                case ReadersSilent():
                    if self._start_cold(action):
                        return  # what else there was to do concerned another ring

    def _start_cold(self, silent: ReadersSilent) -> bool:
        """Go on in a new segment, if there is memory: somebody holds what cannot be known, and says nothing.

        The old segment stays as it is for those who have mapped it. Where there is no memory for two, this one is kept:
        its hits are served, and what is computed goes into spills or inline, until the silent ones speak or end.
        """
        names = ", ".join(f"{role} {reader}" for role, reader in silent.readers)
        incarnation = self._core.ring.incarnation + 1
        try:
            opened = new_ring(self._runtime, self._geometry, self._largest, incarnation, self._settings.spill_size)
        except StartupError:
            _log.warning(
                "nothing goes into the ring until these processes go on or end, and memory is short: %s", names
            )
            self._core.go_on_beside(time.monotonic())
            self._carry_out()
            return False
        _log.warning("the cache starts anew, because these processes do not say what they hold: %s", names)
        for number in self._pool.running:
            self._waiting.remove(self._pool.pidfd(number))
        self._pool.stop()
        self._lane_peers.clear()
        self._lane_identities.clear()
        failpoints.reach("writer.anew.lanes")
        self._remove_spills()
        failpoints.reach("writer.anew.spills")
        previous, core = self._segment, self._core
        self._segment = opened.segment
        self._core = make_core(self._settings, opened, self._geometry, time.monotonic(), core.metrics, self._read)
        self._core.succeed(core, time.monotonic())
        previous.unlink()
        previous.close()
        failpoints.reach("writer.anew.ring")
        self._pool = LanePool(self._settings.lanes, self._lane_config, time.monotonic())
        self._carry_out()
        return True

    def _remove_spills(self) -> None:
        """Remove the names of all spills; no lane may be at work. Who has mapped one reads on."""
        for spill in self._core.ring.spills:
            unlink(sibling_name(self._segment.name, spill.epoch))

    def _send_frames(self, frames: list[bytes]) -> None:
        """Send to the peer that the first frame names, behind what waits for it."""
        if self._outbox.holds(frames[0]) or not self._try_send(frames):
            self._put_off(frames)

    def _try_send(self, frames: Sequence[bytes]) -> bool:
        """Send if the socket takes it; a peer that is gone takes everything."""
        self._waiting.used(self._control_fd)
        try:
            send_frames(self._control, frames)
        except zmq.Again:
            return False
        except zmq.ZMQError:
            self._outbox.drop(frames[0])
            self._core.unreachable(frames[0], time.monotonic())
        return True

    def _flush_outbox(self) -> None:
        for peer, frames in list(self._outbox.first()):
            if self._try_send(frames) and self._outbox.holds(peer):
                self._outbox.sent(peer)

    def _put_off(self, frames: list[bytes]) -> None:
        peer = frames[0]
        try:
            self._outbox.add(peer, frames)
        except Busy:
            self._outbox.drop(peer)
            self._core.unreachable(peer, time.monotonic())

    def _to_lane(self, action: ToLane) -> None:
        identity = self._lane_identities.get(action.lane)
        if identity is None:
            return
        frames: list[Any] = [identity, pack(action.message)]
        if action.medium is not None:
            frames.append(action.medium)
        self._waiting.used(self._lanes_fd)
        try:
            send_frames(self._lanes, frames)
        except zmq.ZMQError:
            self._pool.kill(action.lane)

    def _tell(self, message: msgspec.Struct) -> None:
        self._waiting.used(self._supervisor_fd)
        try:
            self._supervisor.send(pack(message))
        except zmq.Again:
            raise SystemExit("mmprep: the writer's supervisor is gone") from None

    def _say_state(self) -> None:
        state = (True, "") if self._core.card else (False, self._core.cold or self._warmth())
        if state != self._said:
            self._said = state
            self._tell(messages.StateChange(*state))

    def _warmth(self) -> str:
        return f"{sum(lane.ready for lane in self._core.lanes)} of {len(self._core.lanes)} lanes are warm"

    def close(self) -> None:
        """Stop the lanes, then unlink the segment."""
        self._pool.stop()
        self._waiting.close()
        for socket in self._sockets():
            socket.close(0)
        self._context.destroy(linger=0)
        self._remove_spills()
        self._segment.unlink()
        self._segment.close()
        for number in range(self._settings.lanes):
            with contextlib.suppress(FileNotFoundError):
                Path(self._runtime.lock_path("lane", str(number))).unlink()
        self._lock.remove()


def _check_frames(message: Any, content: Sequence[bytes]) -> None:
    """Refuse frames behind a message that has none, and more of a job than there may be; raises ProtocolError."""
    if not isinstance(message, messages.Post):
        if content:
            raise ProtocolError("a control message is one frame")
    elif not 0 < len(content) <= MAX_FRAMES or sum(map(len, content)) > messages.JOB_LIMIT:
        raise ProtocolError(f"a job has some content, and at most {messages.JOB_LIMIT} bytes of it")
