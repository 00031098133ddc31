"""The simulated writer: :class:`~mmprep_worker.writer.core.WriterCore` in the duties of :mod:`mmprep_worker.writer.shell`.

It may die between any two of its effects. After every event the core validates itself.
"""

from __future__ import annotations

from collections import deque

from tests.simulation.lane import Lane
from tests.simulation.world import Process, Violation

from mmprep import layout
from mmprep.errors import Busy, MmprepError, ProtocolError, StaleAddress, StartupError
from mmprep.metrics import Metrics
from mmprep.segment import sibling_name
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.outbox import Outbox
from mmprep_worker.scheduling.admission import Admission, Quarantine
from mmprep_worker.scheduling.flights import Flights
from mmprep_worker.scheduling.job import Limits
from mmprep_worker.scheduling.queue import FairQueue
from mmprep_worker.writer import making, shell
from mmprep_worker.writer.core import READERS
from mmprep_worker.writer.pauses import Pauses
from mmprep_worker.writer.plans import PlanStore
from mmprep_worker.writer.state import KillLane, ReadersSilent, RemoveSegment, Send, ToLane

BATCH = 16
#: Seconds for which two lost lanes over one medium refuse it; short, so that a run sees the end of it.
QUARANTINE_SECONDS = 6.0


class Writer(Process):
    """One writer process.

    Attributes
    ----------
    routes: the connections by identity that its socket knows.
    """

    def __init__(self, service):
        super().__init__(service.world, "writer", "0")
        self.service, self.network = service, service.network
        self.settings, self.segments, self.oracle = service.settings, service.segments, service.oracle
        self.routes = {}
        self.core = None
        self.lanes = {}
        self._inboxes = {box: deque() for box in ("lanes", "control", "bulk", "lane tensors", "tensors")}
        self._exits = deque()
        self._warm = {}
        self._start_at = {}
        self._failures = {}
        self._turn_at = None
        self.after(0.0, self._open)

    def die(self, why="is killed"):
        if self.alive:
            super().die(why)
            if self.network.bound is self:
                self.network.bound = None
            for lane in self.lanes.values():
                lane.parent_died()

    # --- opening --------------------------------------------------------------------------------------------------

    def _open(self):
        assert self.take_lock(("writer", "0")), "two writers"
        self._end_lanes()

    def _end_lanes(self):
        lanes = [process for (role, _), process in self.world.locks.items() if role == "lane"]
        for lane in lanes:
            lane.kill()
        if lanes:
            self.after(0.01, self._end_lanes)
        else:
            self._open_ring()

    def _open_ring(self):
        found = self.segments.take_over(self.settings.max_object_size)
        awaited = ()
        if found is None:
            found = self.segments.new(1, self.settings.max_object_size)
        else:
            self.point()
            awaited = tuple(path for path in self.world.locks if path[0] in READERS)
        now = self.clock()
        self._take_segment(found)
        self.core = self._make_core(found, now, awaited)
        self._outbox = Outbox(max_messages=self.settings.outbox, max_bytes=16 << 20)
        self._pauses = Pauses(now, turn_seconds=shell._CHECK_LOCKS_EVERY)
        self._locks_checked = 0.0
        self._start_at = dict.fromkeys(range(self.settings.lanes), now)
        self._failures = dict.fromkeys(range(self.settings.lanes), 0)
        self.after(self.world.random.choice([0.0, self.world.random.uniform(0.0, 0.3)]), self._bind)

    def _bind(self):
        self.network.bound = self
        self._wake(0.0)

    def _take_segment(self, found):
        self.segment, self.epoch, _ = found
        self.service.ledger.lives += 1

    def _make_core(self, found, now, awaited):
        settings, random = self.settings, self.world.random
        segment, epoch, ring = found
        quarantine = Quarantine(max_keys=8, seconds=QUARANTINE_SECONDS)
        return settings.core(
            ring=ring,
            flights=Flights(
                max_waiting=settings.queue_limit * 4,
                upload_seconds=settings.upload_seconds,
                quarantine=quarantine,
                after=random.getrandbits(40),
            ),
            quarantine=quarantine,
            queue=FairQueue(max_items=settings.queue_limit, max_bytes=1 << 16),
            admission=Admission(
                max_items=settings.queue_limit, max_bytes=1 << 16, max_items_per_client=settings.queue_limit
            ),
            plans=PlanStore(2000),
            metrics=Metrics(),
            segment=messages.SegmentInfo(segment.name, epoch, segment.size),
            lanes=settings.lanes,
            lease_seconds=settings.lease_seconds,
            task_seconds=settings.task_seconds,
            read=lambda offset, length: bytes(segment.buffer[offset : offset + length]),
            new_id=lambda: random.randbytes(12),
            inline_bytes=settings.inline,
            queue_limits=Limits(
                jobs=settings.queue_limit,
                nbytes=1 << 20,
                pinned=self.segments.geometry.arena_capacity // 2,
                seconds=settings.queue_seconds,
            ),
            awaited=awaited,
            silent_at=now + making._SILENT_SECONDS,
        )

    # --- the loop -------------------------------------------------------------------------------------------------

    def receive(self, box, frames):
        self._inboxes[box].append(frames)
        self._wake(0.0)

    def _wake(self, delay):
        when = self.world.now + max(delay, 0.0)
        if self._turn_at is None or when < self._turn_at - 1e-9:
            self._turn_at = when
            self.after(delay, self._turn, when)

    def _turn(self, when):
        if self.core is None or self._turn_at != when:
            return
        self._turn_at = None
        now = self.clock()
        self._start_due(now)
        self._pauses.turned(now, input_ready=any(self._inboxes.values()) or bool(self._exits))
        handlers = {
            "lanes": self._lane,
            "control": self._control,
            "bulk": self._bulk,
            "lane tensors": self._inlined,
            "tensors": self._fetch,
        }
        for box, handle in handlers.items():
            inbox = self._inboxes[box]
            for _ in range(min(BATCH, len(inbox))):
                self.point()
                handle(inbox.popleft())
                self._carry_out()
        while self._exits:
            self._lane_exited(self._exits.popleft(), now)
        if self.core.wake_at <= now and not self._pauses.behind:
            self.core.tick(now)
            self._carry_out()
        if self._locks_checked + shell._CHECK_LOCKS_EVERY <= now:
            self._check_locks(now)
        if self._outbox:
            self._flush_outbox()
        self._arm(self.clock())

    def _arm(self, now):
        if any(self._inboxes.values()):
            self._wake(0.0)
        elif self._pauses.behind:
            self._wake(0.001)
        else:
            wake = min(self.core.wake_at, *self._start_at.values(), self._locks_checked + shell._CHECK_LOCKS_EVERY)
            if self._outbox:
                wake = min(wake, now + 0.005)
            self._wake(max(wake - now, 0.0005))

    # --- what comes in --------------------------------------------------------------------------------------------

    def _control(self, frames):
        identity = frames[0]
        try:
            message, content = unpack(frames[1], messages.ToWriter), frames[2:]
            shell._check_frames(message, content)
            if isinstance(message, messages.Hello):
                self._check_hello(message)
        except MmprepError as error:
            self.core.unreachable(identity, self.clock())
            self._send_frames(identity, [pack(messages.Refused(messages.Fault.of(error)))])
            return
        self.core.message(identity, message, self.clock(), content)

    def _check_hello(self, hello):
        path = hello.role, hello.id
        if hello.protocol != PROTOCOL:
            raise ProtocolError("another protocol")
        if path not in self.world.locks or self.world.notes[path] != hello.instance:
            raise ProtocolError("of a process that is gone")

    def _bulk(self, frames):
        put = unpack(frames[0], messages.Put)
        if len(frames) == 2:
            self.core.put(put, frames[1], len(frames[1]), self.clock())

    def _lane(self, frames):
        lane = frames[0]
        number = self._warm.get(lane)
        try:
            message = unpack(frames[1], messages.FromLane)
            has_blob = isinstance(message, messages.AskExtent | messages.Planned)
            if len(frames) != 2 + has_blob:
                raise ProtocolError("a lane's message has a wrong number of frames")
        except MmprepError:
            self.world.say(f"{lane} → writer garbage")
            if number is not None:
                self.core.lane_broke_protocol(number)
            return
        if self.world.lines is not None:
            lane.log(frames[1:])
        if isinstance(message, messages.LaneReady):
            if message.lane in self.lanes and self.lanes[message.lane].token == message.token:
                self._warm[lane] = message.lane
                self._failures[message.lane] = 0
                self.core.lane_ready(message.lane, lane.pid, message.card, self.clock())
        elif number is not None:
            self.core.from_lane(number, message, frames[2:], self.clock())

    def _inlined(self, frames):
        lane = frames[0]
        number = self._warm.get(lane)
        if number is None:
            return
        try:
            message = unpack(frames[1] if len(frames) == 3 else b"", messages.Inlined)
        except MmprepError:
            self.world.say(f"{lane} → writer garbage")
            self.core.lane_broke_protocol(number)
            return
        if self.world.lines is not None:
            lane.log(frames[1:])
        self.service.beside["inline"] += 1
        self.core.from_lane(number, message, frames[2:], self.clock())

    def _fetch(self, frames):
        fetch = unpack(frames[1], messages.Fetch)
        tensors = self.core.tensors(fetch.inline)
        if tensors is None:
            self.service.beside["gone"] += 1
            answer = [pack(messages.Failed(fetch.call, messages.Fault.of(StaleAddress("the tensors are gone"))))]
        else:
            self.service.beside["fetched"] += 1
            answer = [pack(messages.Tensors(fetch.call)), tensors]
        connection = self.routes.get(frames[0])
        if connection is not None and connection.up:
            self.point()
            connection.to_client.send(answer)

    def _start_due(self, now):
        for number in [number for number, when in self._start_at.items() if when <= now]:
            self._start_at[number] = float("inf")
            lane = Lane(
                self.world,
                self,
                number,
                segment=self.segment,
                segments=self.segments,
                oracle=self.oracle,
                media=self.service.by_digest,
            )
            self.lanes[number] = lane
            lane.deaths.append(lambda lane=lane: self.after(self.network.delay(), self._exit_seen, lane, kind="io"))
            self.service.started(lane)

    def _exit_seen(self, lane):
        if self.lanes.get(lane.number) is lane:
            self._exits.append(lane)
            self._wake(0.0)

    def _lane_exited(self, lane, now):
        if self.lanes.get(lane.number) is not lane:
            return
        number = lane.number
        self.world.say(f"   the exit of {lane} is confirmed")
        del self.lanes[number]
        self._warm.pop(lane, None)
        self._start_at[number] = now + (0.1 * 2 ** self._failures[number] if self._failures[number] else 0.0)
        self._failures[number] += 1
        self.core.lane_exited(number, now)
        self._carry_out()

    def _check_locks(self, now):
        self._locks_checked = now
        readers = {(peer.role, peer.id) for peer in self.core.peers.values() if peer.role in READERS}
        for role, reader in sorted(readers | self.core.awaited):
            if (role, reader) not in self.world.locks:
                self.world.say(f"   the lock of {role} {reader} has fallen")
                self.core.peer_gone(role, reader, now)
        self._carry_out()

    # --- what goes out --------------------------------------------------------------------------------------------

    def _carry_out(self):
        core = self.core
        geometry = self.segments.geometry
        for slot, record in core.ring.take_writes():
            self.point()
            start = geometry.record_offset(slot)
            self.segment.buffer[start : start + layout.RECORD_SIZE] = record
        try:
            core.validate()
        except AssertionError as error:
            raise Violation(f"the writer's core is broken: {error}") from error
        self.service.ledger.look(core.queues)
        for action in core.take_actions():
            self.point()
            match action:
                case Send():
                    self._send_frames(action.peer, [pack(action.message), *action.frames])
                case ToLane():
                    self._to_lane(action)
                case KillLane():
                    self.world.say(f"   lane {action.lane} is to be killed")
                    self.service.settings.on_kill(self, action.lane)
                case RemoveSegment():
                    self.oracle.removed(action.name)
                    self.segments.unlink(action.name)
                case ReadersSilent():
                    if self._start_cold(action):
                        return

    def _start_cold(self, silent):
        self.world.say(f"   silent: {silent.readers}")
        try:
            found = self.segments.new(self.core.ring.incarnation + 1, self.settings.max_object_size)
        except StartupError:
            self.core.go_on_beside(self.clock())
            self._carry_out()
            return False
        for lane in list(self.lanes.values()):  # the real one waits for them, and does nothing else meanwhile
            lane.die("is gone, because the cache starts anew")
        self.lanes.clear()
        self._warm.clear()
        self._exits.clear()
        for spill in self.core.ring.spills:
            self.point()
            self.segments.unlink(sibling_name(self.segment.name, spill.epoch))
        former, core = self.segment, self.core
        self._take_segment(found)
        self.core = self._make_core(found, self.clock(), ())
        self.core.succeed(core, self.clock())
        self.point()
        self.segments.unlink(former.name)
        self._start_at = dict.fromkeys(range(self.settings.lanes), self.clock())
        self._carry_out()
        return True

    def _send_frames(self, peer, frames):
        if self._outbox.holds(peer) or not self._try_send(peer, frames):
            self._put_off(peer, frames)

    def _try_send(self, peer, frames):
        connection = self.routes.get(peer)
        if connection is None:
            self._outbox.drop(peer)
            self.core.unreachable(peer, self.clock())
        elif connection.up:
            if connection.to_client.full:
                return False
            connection.to_client.send(frames)
        return True

    def _flush_outbox(self):
        for peer, frames in list(self._outbox.first()):
            if self._try_send(peer, frames) and self._outbox.holds(peer):
                self._outbox.sent(peer)

    def _put_off(self, peer, frames):
        try:
            self._outbox.add(peer, frames)
        except Busy:
            self.world.say(f"   {peer.decode()} does not read its messages")
            self._outbox.drop(peer)
            self.core.unreachable(peer, self.clock())

    def _to_lane(self, action):
        lane = self.lanes.get(action.lane)
        if lane is None or lane not in self._warm:
            return
        if isinstance(action.message, messages.Granted):
            offset, length = action.message.offset, action.message.length
            entry = next(e for e in self.core.ring._directory if e.offset == offset)
            self.oracle.granted(self.segment.name, self.epoch, offset, length, entry.generation)
            lane.granted(action.message)
        frames = [pack(action.message)]
        if action.medium is not None:
            frames.append(action.medium)
        if self.world.lines is not None:
            self.world.say(f"{lane} ← writer {type(action.message).__name__} {action.message.task}")
        lane.next_arrival = max(lane.next_arrival, self.world.now + self.network.delay())
        self.world.at(lane.next_arrival - self.world.now, lane, lane.receive, frames, kind="message")
