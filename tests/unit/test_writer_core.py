"""The writer's core, one rule a test: offers in, answers, leases and lane tasks out."""

from __future__ import annotations

from itertools import count

import msgspec
import pytest

from mmprep.layout import RECORD_SIZE, Geometry
from mmprep.lease_id import mark_of, was_granted_to
from mmprep.metrics import Metrics
from mmprep.wire import messages
from mmprep.wire.codec import CONTROL_LIMIT, PROTOCOL, pack, unpack
from mmprep.wire.messages import HEAVY_COST
from mmprep_worker.ring.policy import Clock
from mmprep_worker.ring.ring import Ring
from mmprep_worker.scheduling.admission import Admission, Quarantine
from mmprep_worker.scheduling.flights import Flights
from mmprep_worker.scheduling.job import Limits
from mmprep_worker.scheduling.queue import FairQueue
from mmprep_worker.writer.core import WriterCore
from mmprep_worker.writer.plans import PlanStore
from mmprep_worker.writer.state import KillLane, ReadersSilent, RemoveSegment, Send, ToLane
from mmprep_worker.writer.tasks import MAX_METADATA

GEOMETRY = Geometry.plan(16 * 4096, 64)
QUARTER = GEOMETRY.arena_capacity // 4
LEASE_SECONDS, TASK_SECONDS, UPLOAD_SECONDS, QUARANTINE_SECONDS = 30.0, 60.0, 5.0, 180.0
QUEUE_LIMITS = Limits(jobs=8, nbytes=4000, pinned=GEOMETRY.arena_capacity // 2, idle_seconds=100.0)
A, B, C = (bytes([n]) * 32 for n in range(3))
META = b"metadata"


class World:
    """A core with lanes, frontends ``f0`` and ``f1`` and backend ``engine``; it keeps what was sent to each."""

    def __init__(
        self,
        *,
        lanes: int = 2,
        max_items: int = 8,
        warm: bool = True,
        spill: int = 0,
        inline: int = 0,
        **taken_over,
    ) -> None:
        self.memory = bytearray(GEOMETRY.total_size)
        self.now = 0.0
        self.ids = count(1)
        quarantine = Quarantine(max_keys=8, seconds=QUARANTINE_SECONDS)
        self.core = WriterCore(
            ring=taken_over.pop("ring", None) or Ring(GEOMETRY, 1, Clock(GEOMETRY.slots), QUARTER, spill_bytes=spill),
            flights=Flights(max_waiting=64, upload_seconds=UPLOAD_SECONDS, quarantine=quarantine),
            queue=FairQueue(max_items=max_items, max_bytes=10_000),
            admission=Admission(max_items=max_items, max_bytes=10_000, max_items_per_client=max_items),
            quarantine=quarantine,
            plans=PlanStore(1 << 16),
            metrics=Metrics(),
            segment=messages.SegmentInfo("/mmprep-0-cafecafe-00000000", bytes(16), GEOMETRY.total_size),
            lanes=lanes,
            lease_seconds=LEASE_SECONDS,
            task_seconds=TASK_SECONDS,
            read=lambda offset, length: bytes(self.memory[offset : offset + length]),
            new_id=lambda: next(self.ids).to_bytes(12, "little"),
            inline_bytes=inline,
            queue_limits=QUEUE_LIMITS,
            **taken_over,
        )
        self.segments: set[str] = set()
        self.granted_spills: dict[int, messages.GrantedSpill] = {}
        self.granted_inline: set[int] = set()
        self.inbox: dict[str, list[Send]] = {}
        self.tasks: dict[int, messages.Task] = {}
        self.granted: dict[int, messages.Granted] = {}
        self.killed: list[int] = []
        self.denied: set[int] = set()
        self.silent: list[tuple[tuple[str, str], ...]] = []
        for name in ("f0", "f1"):
            self.hello(name, "frontend")
        self.hello("engine", "backend")
        if warm:
            for number in range(lanes):
                self.ready(number)

    def hello(self, name, role, *, identity=None, pid=1):
        self.say(identity or name, messages.Hello(PROTOCOL, "1", role, name, pid, pid.to_bytes(4, "big")))

    def say(self, name, message):
        self.core.message(name.encode(), message, self.now)
        self.carry_out()

    def offer(
        self, name, call, *keys, need="tensors", lease=None, kind="view", seconds=100, nbytes=10, cost=1, priority=0
    ):
        items = tuple(messages.Offered(key, "image", cost, nbytes) for key in keys)
        to = None if lease is None else messages.LeaseTo(lease, kind)
        self.say(name, messages.Offer(call, need, seconds * 1000, priority, items, to))

    def put(self, name, flight, nbytes=10):
        put = messages.Put(name, flight, "blake3", bytes(32), b"")
        self.core.put(put, f"medium of {flight}", nbytes, self.now)
        self.carry_out()

    def ready(self, number):
        self.core.lane_ready(number, 1000 + number, b"card", self.now)
        self.carry_out()

    def lane(self, number, message, *frames):
        self.core.from_lane(number, message, list(frames), self.now)
        self.carry_out()

    def lane_of(self, flight):
        return next(number for number, task in self.tasks.items() if task.task == flight)

    def fill(self, flight, length=100, meta=META):
        number = self.lane_of(flight)
        self.lane(number, messages.AskExtent(flight, length), meta)
        if number not in self.granted:
            return
        granted = self.granted.pop(number)
        self.memory[granted.offset : granted.offset + len(meta)] = meta
        self.tasks.pop(number)
        self.lane(number, messages.Filled(flight, 1, 1))

    def place(self, flight, length, meta=META):
        """Let a lane ask for room and use what it gets; return what that was."""
        number = self.lane_of(flight)
        self.fill(flight, length, meta)
        if number in self.granted_spills:
            del self.granted_spills[number], self.tasks[number]
            self.lane(number, messages.Filled(flight, 1, 1))
            return "spill"
        if number in self.granted_inline:
            self.granted_inline.remove(number)
            del self.tasks[number]
            self.lane(number, messages.Inlined(flight, 1, 1), bytes([flight]) * length)
            return "inline"
        return "nowhere" if number in self.denied else "ring"

    def cached(self, key, length=QUARTER - 64):
        """Put an item into the cache; return where it went."""
        call = 1000 + next(self.ids)
        self.offer("f1", call, key)
        (want,) = self.wants("f1", call)
        self.put("f1", want.flight)
        where = self.place(want.flight, length)
        self.say("f1", messages.Unpin(call))
        return where

    def fail(self, flight, error):
        number = self.lane_of(flight)
        self.tasks.pop(number)
        self.lane(number, messages.TaskFailed(flight, messages.Fault.of(error)))

    def die(self, number):
        self.tasks.pop(number, None)
        self.core.lane_exited(number, self.now)
        self.carry_out()
        self.ready(number)

    def compute(self, name, call, *keys, **options):
        """Offer, upload and fill."""
        self.offer(name, call, *keys, **options)
        for want in self.wants(name, call):
            self.put(name, want.flight)
            self.fill(want.flight)
        return self.answer(name, call)

    def tick(self, seconds):
        self.now += seconds
        self.core.tick(self.now)
        self.carry_out()

    def carry_out(self):
        for slot, record in self.core.ring.take_writes():
            start = GEOMETRY.record_offset(slot)
            self.memory[start : start + RECORD_SIZE] = record
        for action in self.core.take_actions():
            match action:
                case Send():
                    self.inbox.setdefault(action.peer.decode("latin-1"), []).append(action)
                case ToLane():
                    self.lane_hears(*action)
                case RemoveSegment(name):
                    self.segments.remove(name)
                case KillLane(number):
                    self.killed.append(number)
                case ReadersSilent(readers):
                    self.silent.append(readers)
        self.core.validate()

    def lane_hears(self, number, message, medium):
        match message:
            case messages.Task():
                self.denied.discard(number)
                assert medium == f"medium of {message.task}"
                self.tasks[number] = message
            case messages.Granted():
                self.granted[number] = message
            case messages.GrantedSpill():
                self.granted_spills[number] = message
                self.segments.add(message.name)
            case messages.GrantedInline():
                self.granted_inline.add(number)
            case messages.Denied():
                self.tasks.pop(number)
                self.denied.add(number)

    def got(self, name, kind, call=None):
        sent = [send for send in self.inbox.get(name, []) if isinstance(send.message, kind)]
        return [send for send in sent if call is None or send.message.call == call]

    def wants(self, name, call):
        return [want for send in self.got(name, messages.Wants, call) for want in send.message.wants]

    def answer(self, name, call):
        """Return the items of the one answer, or ``None`` where there is none yet."""
        sent = self.got(name, messages.Answer, call)
        assert len(sent) <= 1
        return [unpack(frame, messages.ItemAnswer) for frame in sent[0].frames] if sent else None

    def fault(self, name, call):
        """Return the fault with which the call as a whole has failed."""
        (send,) = self.got(name, messages.Failed, call)
        return send.message.fault

    def outcomes(self, name, call):
        return [item.outcome for item in self.answer(name, call)]

    def counted(self, metric):
        return sum(value for name, _, value in self.core.metrics.snapshot().counters if name == metric)

    def idle(self):
        core = self.core
        nothing = not (len(core.flights) or len(core.queue) or len(core.admission) or core.ring.holders)
        return nothing and core.ring.stats().filling == core.ring.stats().spills.filling == len(core.transfers) == 0


@pytest.fixture
def world():
    return World()


def error(kind):
    import mmprep.errors

    return getattr(mmprep.errors, kind)("broken")


# --- single flight ------------------------------------------------------------------------------------------------------


def test_two_frontends_that_miss_the_same_item_cause_one_upload_and_one_task(world):
    world.offer("f0", 1, A)
    world.offer("f1", 1, A)
    (want,) = world.wants("f0", 1)
    assert not world.wants("f1", 1)
    world.put("f0", want.flight)
    assert len(world.tasks) == 1
    world.fill(want.flight)
    assert world.outcomes("f0", 1) == ["computed"]
    assert world.outcomes("f1", 1) == ["joined"]
    assert world.answer("f0", 1)[0].generation == world.answer("f1", 1)[0].generation


def test_joined_calls_are_counted_as_joins_and_as_hits(world):
    world.offer("f0", 1, A)
    world.offer("f1", 1, A)
    world.offer("f1", 2, A, B)
    assert world.counted("mmprep_singleflight_joins_total") == 2
    assert world.counted("mmprep_mm_cache_queries_total") == 4
    assert world.counted("mmprep_mm_cache_hits_total") == 2


def test_those_who_join_a_plan_are_told_so(world):
    for name in ("f0", "f1"):
        world.offer(name, 1, A, need="plan")
    world.put("f0", 1)
    world.tasks.pop(0)
    world.lane(0, messages.Planned(1), META)
    assert world.outcomes("f0", 1) == ["computed"]
    assert world.outcomes("f1", 1) == ["joined"]


def test_when_the_uploader_is_gone_another_joiner_is_asked_and_the_item_is_computed(world):
    world.offer("f0", 1, A)
    world.offer("f1", 1, A)
    world.core.peer_gone("frontend", "f0", world.now)
    world.carry_out()
    (want,) = world.wants("f1", 1)
    world.put("f1", want.flight)
    world.fill(want.flight)
    assert world.outcomes("f1", 1) == ["joined"]


def test_a_flight_goes_on_for_those_who_wait_when_its_uploader_left_after_the_upload(world):
    world.offer("f0", 1, A)
    world.offer("f1", 1, A)
    world.put("f0", 1)
    world.core.peer_gone("frontend", "f0", world.now)
    world.carry_out()
    world.die(world.lane_of(1))
    world.fill(1)
    assert world.outcomes("f1", 1) == ["joined"]


# --- answers and pins ---------------------------------------------------------------------------------------------------


def test_the_hits_of_an_offer_are_pinned_at_once_and_let_go_by_unpin(world):
    world.compute("f0", 1, A)
    world.compute("f0", 2, B)
    for call in (1, 2):
        world.say("f0", messages.Unpin(call))
    assert not world.core.ring.holders
    world.offer("f1", 1, A, B, C)
    (holder,) = world.core.ring.holders
    assert len(world.core.ring.pinned_by(holder)) == 2
    assert world.answer("f1", 1) is None
    world.put("f1", 3)
    world.fill(3)
    assert world.outcomes("f1", 1) == ["hit", "hit", "computed"]
    assert len(world.core.ring.pinned_by(holder)) == 3
    world.say("f1", messages.Unpin(1))
    assert world.idle()


def test_an_unpin_before_the_answer_changes_nothing_and_a_cancel_after_it_lets_go(world):
    world.offer("f0", 1, A)
    world.say("f0", messages.Unpin(1))
    world.put("f0", 1)
    world.fill(1)
    assert world.outcomes("f0", 1) == ["computed"]
    assert world.core.ring.holders
    world.say("f0", messages.Cancel(1))
    assert world.idle()


def test_a_key_that_is_offered_twice_in_one_call_is_computed_once_and_pinned_once(world):
    answers = world.compute("f0", 1, A, B, A)
    assert [want.index for want in world.wants("f0", 1)] == [0, 1]
    assert [answer.outcome for answer in answers] == ["computed"] * 3
    assert answers[0] == answers[2] != answers[1]
    assert world.counted("mmprep_singleflight_joins_total") == 0
    (holder,) = world.core.ring.holders
    assert len(world.core.ring.pinned_by(holder)) == 2
    world.offer("f1", 1, A, A)
    assert world.outcomes("f1", 1) == ["hit", "hit"]


def test_hits_above_half_of_the_ring_are_no_hits_and_without_other_room_too_large(world):
    keys = [bytes([n]) * 32 for n in range(3)]
    for call, key in enumerate(keys, 1):
        world.offer("f0", call, key)
        world.put("f0", call)
        world.fill(call, length=QUARTER - 64)
        world.say("f0", messages.Unpin(call))
    world.offer("f0", 9, *keys[:2])
    world.say("f0", messages.Unpin(9))
    world.offer("f0", 10, *keys)
    (want,) = world.wants("f0", 10)
    assert want.index == 2
    world.put("f0", want.flight)
    assert world.place(want.flight, QUARTER - 64) == "nowhere"
    assert world.answer("f0", 10)[2].fault.kind == "TooLarge"
    assert world.idle()
    world.offer("f0", 11, *keys, need="plan")
    assert world.outcomes("f0", 11) == ["hit"] * 3


def test_a_call_whose_computed_items_are_above_half_of_the_ring_fails_and_leaves_nothing_pinned(world):
    world.offer("f0", 1, A, B, C)
    for flight in (1, 2, 3):
        world.put("f0", flight)
        world.fill(flight, length=QUARTER - 64)
    assert sorted(world.outcomes("f0", 1)) == ["computed", "computed", "failed"]
    assert world.answer("f0", 1)[2].fault.kind == "TooLarge"
    assert world.idle()


def test_a_call_with_a_failed_item_is_answered_whole_and_keeps_nothing_pinned(world):
    world.offer("f0", 1, A, B)
    world.put("f0", 1)
    world.put("f0", 2)
    world.fill(1)
    assert world.answer("f0", 1) is None
    world.fail(2, error("DecodeError"))
    first, second = world.answer("f0", 1)
    assert first.outcome == "computed"
    assert (second.outcome, second.fault.kind) == ("failed", "DecodeError")
    assert world.idle()


def test_a_call_whose_time_is_over_is_told_so_once_and_leaves_nothing(world):
    world.compute("f0", 1, C)
    world.say("f0", messages.Unpin(1))
    world.offer("f0", 2, A, B, C, seconds=3)
    world.put("f0", 2)
    world.tick(3.0)
    assert world.fault("f0", 2).kind == "DeadlineExceeded"
    assert not world.core.ring.holders
    world.fail(2, error("DecodeError"))
    assert world.answer("f0", 2) is None
    assert world.idle()


def test_a_call_refused_as_busy_leaves_nothing_behind():
    world = World(max_items=1)
    world.compute("f0", 1, A)
    world.say("f0", messages.Unpin(1))
    world.offer("f0", 2, B)
    queries = world.counted("mmprep_mm_cache_queries_total")
    world.offer("f1", 1, A, C)
    assert world.fault("f1", 1).kind == "Busy"
    assert not world.core.ring.holders
    assert len(world.core.flights) == 1
    assert world.counted("mmprep_mm_cache_queries_total") == queries
    world.offer("f1", 1, A)
    assert world.outcomes("f1", 1) == ["hit"]


def test_a_call_number_that_is_in_use_ends_the_connection_and_its_calls(world):
    world.offer("f0", 1, A)
    world.offer("f0", 1, B)
    assert world.got("f0", messages.Refused)
    assert not world.got("f0", messages.Failed)
    assert world.idle()


# --- plans --------------------------------------------------------------------------------------------------------------


def test_an_offer_for_plans_computes_no_tensors_and_evicts_nothing(world):
    world.offer("f0", 1, A, need="plan")
    world.put("f0", 1)
    number = world.lane_of(1)
    assert world.tasks.pop(number).need == "plan"
    world.lane(number, messages.Planned(1), META)
    (answer,) = world.answer("f0", 1)
    assert (answer.outcome, answer.meta, answer.length) == ("computed", META, 0)
    stats = world.core.ring.stats()
    assert (stats.entries, stats.evictions) == (0, 0)
    assert world.idle()


def test_plans_outlive_the_eviction_of_their_tensors(world):
    world.compute("f0", 1, A)
    world.say("f0", messages.Unpin(1))
    assert world.core.ring.remove(A)
    world.offer("f0", 2, A, need="plan")
    (answer,) = world.answer("f0", 2)
    assert (answer.outcome, answer.meta) == ("hit", META)
    world.offer("f0", 3, A)
    assert world.wants("f0", 3)


def test_a_plan_that_was_dropped_is_read_from_its_entry(world):
    world.compute("f0", 1, A)
    world.core.plans.clear()
    world.offer("f0", 2, A, need="plan")
    assert world.answer("f0", 2)[0].meta == META
    assert world.core.plans.get(A) == META


def test_who_waits_for_a_plan_gets_it_where_there_is_no_room_for_the_tensors(world):
    world.offer("f0", 1, A)
    world.offer("f1", 1, A, need="plan")
    world.put("f0", 1)
    world.lane(world.lane_of(1), messages.AskExtent(1, QUARTER), META)
    assert world.answer("f0", 1)[0].fault.kind == "TooLarge"
    assert world.answer("f1", 1)[0].meta == META


def test_metadata_that_no_frame_holds_fails_the_item_and_not_the_writer(world):
    world.offer("f0", 1, A)
    world.put("f0", 1)
    world.lane(world.lane_of(1), messages.AskExtent(1, 10), bytes(MAX_METADATA + 1))
    assert world.answer("f0", 1)[0].fault.kind == "TooLarge"
    world.offer("f0", 2, B)
    world.put("f0", 2)
    world.fill(2, meta=bytes(MAX_METADATA) if MAX_METADATA < QUARTER // 2 else bytes(QUARTER // 2))
    assert MAX_METADATA < CONTROL_LIMIT
    assert world.outcomes("f0", 2) == ["computed"]


# --- leases -------------------------------------------------------------------------------------------------------------


def test_leases_are_delivered_when_every_item_of_the_request_is_there(world):
    world.compute("f0", 1, A)
    world.offer("f0", 2, A, B, lease="engine")
    assert not len(world.core.ring.leases)
    world.put("f0", 2)
    world.fill(2)
    answers = world.answer("f0", 2)
    assert {world.core.ring.leases.get(answer.lease).owner for answer in answers} == {"engine"}
    assert len(world.core.ring.leases) == 2
    world.say("f0", messages.Unpin(1))
    assert not world.core.ring.holders


def test_no_lease_is_delivered_when_an_item_of_the_request_has_failed(world):
    world.compute("f0", 1, A)
    world.offer("f0", 2, A, B, lease="engine")
    world.put("f0", 2)
    world.fail(2, error("DecodeError"))
    assert world.outcomes("f0", 2) == ["hit", "failed"]
    assert not len(world.core.ring.leases)


def test_a_lease_to_a_backend_that_nobody_registered_is_refused_before_anything_is_computed(world):
    world.offer("f0", 1, A, lease="nobody")
    assert (world.fault("f0", 1).kind, world.fault("f0", 1).param) == ("NotFound", "backend_id")
    assert world.idle()


def test_a_backend_that_died_while_its_items_were_computed_gets_no_lease(world):
    world.offer("f0", 1, A, lease="engine")
    world.put("f0", 1)
    world.core.peer_gone("backend", "engine", world.now)
    world.fill(1)
    assert world.fault("f0", 1).kind == "NotFound"
    assert not len(world.core.ring.leases)
    assert world.idle()


def test_a_backend_that_cannot_be_reached_keeps_its_leases_until_its_process_lock_falls(world):
    world.compute("f0", 1, A, lease="engine")
    world.core.unreachable(b"engine", world.now)
    world.tick(1000.0)
    assert len(world.core.ring.leases) == 1
    assert ("backend", "engine") in {(peer.role, peer.id) for peer in world.core.peers.values()}
    world.core.peer_gone("backend", "engine", world.now)
    assert not len(world.core.ring.leases)


@pytest.mark.parametrize(("pid", "left"), [(1, 1), (2, 0)], ids=["the same process", "another process"])
def test_leases_outlive_a_new_connection_of_their_process_and_not_another_process(world, pid, left):
    world.compute("f0", 1, A, lease="engine")
    world.hello("engine", "backend", identity="engine again", pid=pid)
    assert len(world.core.ring.leases) == left


def test_a_backend_is_asked_about_its_overdue_views_at_once_or_when_it_is_back(world):
    (answer,) = world.compute("f0", 1, A, lease="engine")
    world.say("engine", messages.Acquire(1, answer.slot, answer.generation, "copy"))
    world.tick(LEASE_SECONDS / 2)
    assert not world.got("engine", messages.StillHeld)
    world.tick(LEASE_SECONDS)
    assert [send.message.leases for send in world.got("engine", messages.StillHeld)] == [(answer.lease,)]
    assert not world.got("f0", messages.StillHeld)
    world.say("engine", messages.Renew(2, (answer.lease,)))
    world.core.unreachable(b"engine", world.now)
    world.tick(2 * LEASE_SECONDS)
    world.hello("engine", "backend", identity="engine again")
    world.say("engine again", messages.Reassert(1, (), True))
    assert [send.message.leases for send in world.got("engine again", messages.StillHeld)] == [(answer.lease,)]
    world.say("engine again", messages.Release(2, (answer.lease,)))
    world.tick(2 * LEASE_SECONDS)
    assert len(world.got("engine again", messages.StillHeld)) == 1


@pytest.mark.parametrize(("role", "name"), [("frontend", "f0"), ("backend", "engine")])
def test_a_hello_that_was_on_its_way_when_its_connection_broke_takes_nothing_from_the_next_one(world, role, name):
    def hello(identity, connection):
        world.say(identity, messages.Hello(PROTOCOL, "1", role, name, 1, b"one process", connection))

    hello("third", 3)
    hello("second", 2)
    assert len(world.got("third", messages.WriterWelcome)) == 1
    assert not world.got("second", messages.WriterWelcome)
    world.say("third", messages.Reassert(1, (), True))
    assert not world.got("third", messages.Refused)
    hello("fourth", 4)
    assert len(world.got("fourth", messages.WriterWelcome)) == 1


def test_a_frontend_speaks_for_the_backend_it_names_and_a_backend_only_for_itself(world):
    (answer,) = world.compute("f0", 1, A, lease="engine")
    world.hello("f0", "backend", identity="a backend of that name")
    world.say("a backend of that name", messages.Release(7, (answer.lease,), "engine"))
    world.say("f0", messages.Release(7, (answer.lease,)))
    assert world.fault("f0", 7).kind == "InvalidRequest"
    assert len(world.core.ring.leases) == 1
    world.say("f0", messages.Renew(8, (answer.lease, bytes(16)), "engine"))
    assert world.got("f0", messages.Renewed, 8)[0].message.lost == (bytes(16),)


@pytest.mark.parametrize("kind", ["copy", "view"])
def test_what_a_frontend_gives_back_ends_when_its_backend_says_that_it_does_not_hold_it(world, kind):
    (answer,) = world.compute("f0", 1, A, lease="engine", kind=kind)
    world.say("f0", messages.Release(2, (answer.lease, bytes(16)), "engine"))
    assert len(world.got("f0", messages.Done, 2)) == 1
    assert [send.message.leases for send in world.got("engine", messages.StillHeld)] == [(answer.lease,)]
    assert len(world.core.ring.leases) == 1
    world.say("engine", messages.Release(3, (answer.lease,)))
    assert not len(world.core.ring.leases)
    world.say("f0", messages.Release(0, (answer.lease,), "engine"))
    assert len(world.got("f0", messages.Done)) == 1
    assert len(world.got("engine", messages.StillHeld)) == 1


def test_a_backend_is_not_asked_about_what_is_another_ones(world):
    world.hello("another", "backend")
    (answer,) = world.compute("f0", 1, A, lease="engine")
    world.say("f0", messages.Release(2, (answer.lease,), "another"))
    assert not world.got("another", messages.StillHeld)
    assert not world.got("engine", messages.StillHeld)


def test_what_is_given_back_while_its_backend_is_away_ends_by_time_or_when_it_is_asked_later(world):
    copy, view = (world.compute("f0", n, A, lease="engine", kind=kind)[0] for n, kind in ((1, "copy"), (2, "view")))
    world.core.unreachable(b"engine", world.now)
    world.say("f0", messages.Release(3, (copy.lease, view.lease), "engine"))
    assert len(world.core.ring.leases) == 2
    world.tick(LEASE_SECONDS)
    world.hello("engine", "backend", identity="engine again")
    world.say("engine again", messages.Reassert(1, (), True))
    assert [send.message.leases for send in world.got("engine again", messages.StillHeld)] == [(view.lease,)]


def granted_to(answer, instance, turn=0, kind="view"):
    mark = mark_of(instance, turn)
    return was_granted_to(mark, answer.lease, slot=answer.slot, generation=answer.generation, kind=kind)


def test_a_lease_says_to_which_process_it_was_granted_on_what_and_as_what(world):
    (answer,) = world.compute("f0", 1, A, lease="engine")
    assert granted_to(answer, (1).to_bytes(4, "big"))
    world.say("engine", messages.Acquire(2, answer.slot, answer.generation, "copy"))
    acquired = world.got("engine", messages.Acquired)[0].message.lease
    assert granted_to(msgspec.structs.replace(answer, lease=acquired), (1).to_bytes(4, "big"), kind="copy")
    assert acquired != answer.lease


def test_what_is_leased_before_the_next_process_under_an_id_says_hello_is_the_former_ones(world):
    world.offer("f0", 1, A, lease="engine")
    (before,) = world.compute("f1", 1, B, lease="engine")
    world.hello("engine", "backend", identity="engine again", pid=2)
    (want,) = world.wants("f0", 1)
    world.put("f0", want.flight)
    world.fill(want.flight)
    (after,) = world.answer("f0", 1)
    former, present = (pid.to_bytes(4, "big") for pid in (1, 2))
    assert granted_to(before, former)
    assert not granted_to(before, present)
    assert granted_to(after, present)
    assert {lease.lease_id for lease in world.core.ring.leases} == {after.lease}


def test_a_backend_has_its_leases_tagged_for_the_latest_turn_that_it_told_of(world):
    me = (1).to_bytes(4, "big")
    world.say("engine", messages.Retag(5, 2))
    world.say("engine", messages.Retag(6, 1))
    assert len(world.got("engine", messages.Done)) == 2
    (answer,) = world.compute("f0", 1, A, lease="engine")
    assert granted_to(answer, me, 2)
    world.say("engine again", messages.Hello(PROTOCOL, "1", "backend", "engine", 1, me, 1, 3))
    (answer,) = world.compute("f0", 2, A, lease="engine")
    assert granted_to(answer, me, 3)
    world.say("f0", messages.Retag(7, 9))
    assert world.fault("f0", 7).kind == "InvalidRequest"


def test_a_backend_acquires_upgrades_and_releases(world):
    (answer,) = world.compute("f0", 1, A)
    world.say("engine", messages.Acquire(1, answer.slot, answer.generation, "copy"))
    lease = world.got("engine", messages.Acquired, 1)[0].message.lease
    world.say("engine", messages.Upgrade(2, lease, "view"))
    assert world.core.ring.leases.get(lease).kind == "view"
    world.say("engine", messages.Acquire(3, answer.slot, answer.generation + 1, "copy"))
    assert world.fault("engine", 3).kind == "StaleAddress"
    world.say("engine", messages.Release(4, (lease,)))
    world.say("engine", messages.Upgrade(5, lease, "copy"))
    assert world.fault("engine", 5).kind == "LeaseLost"


# --- uploads ------------------------------------------------------------------------------------------------------------


def test_an_upload_of_another_size_than_was_offered_fails_its_sender_and_another_is_asked(world):
    world.offer("f0", 1, A)
    world.offer("f1", 1, A)
    world.put("f0", 1, nbytes=9000)
    assert world.answer("f0", 1)[0].fault.kind == "ProtocolError"
    assert not world.tasks
    (want,) = world.wants("f1", 1)
    world.put("f1", want.flight)
    world.fill(want.flight)
    assert world.outcomes("f1", 1) == ["joined"]


def test_bytes_with_another_digest_fail_their_sender_and_another_is_asked(world):
    world.offer("f0", 1, A)
    world.offer("f1", 1, A)
    world.put("f0", 1)
    world.fail(1, error("ProtocolError"))
    assert world.answer("f0", 1)[0].fault.kind == "ProtocolError"
    assert world.wants("f1", 1)
    world.say("f1", messages.Cancel(1))
    assert world.idle()


def test_uploads_that_are_late_repeated_unknown_or_of_another_frontend_are_dropped(world):
    world.offer("f0", 1, A)
    world.put("f1", 1)
    world.put("f0", 99)
    assert not world.tasks
    world.put("f0", 1)
    world.put("f0", 1)
    world.fill(1)
    world.put("f0", 1)
    assert not world.tasks
    assert world.outcomes("f0", 1) == ["computed"]


def test_an_upload_that_never_comes_fails_the_item_after_a_while(world):
    world.offer("f0", 1, A)
    world.tick(UPLOAD_SECONDS)
    assert world.answer("f0", 1)[0].fault.kind == "DeadlineExceeded"
    assert world.idle()


# --- lanes --------------------------------------------------------------------------------------------------------------


def test_an_item_whose_lane_died_is_tried_once_more_and_then_quarantined(world):
    world.offer("f0", 1, A, B)
    world.put("f0", 1)
    number = world.lane_of(1)
    world.lane(number, messages.AskExtent(1, 100), META)
    assert world.core.ring.stats().filling
    world.die(number)
    assert not world.core.ring.stats().filling
    world.die(world.lane_of(1))
    world.put("f0", 2)
    world.fill(2)
    first, second = world.answer("f0", 1)
    assert (first.outcome, first.fault.kind, second.outcome) == ("failed", "MediaError", "computed")
    world.offer("f1", 1, A, B)
    assert not world.wants("f1", 1)
    assert world.outcomes("f1", 1) == ["failed", "hit"]
    world.tick(QUARANTINE_SECONDS)
    world.offer("f1", 2, A)
    assert world.wants("f1", 2)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("crash", "the process that decoded it crashed"),
        ("hang", "it took longer than 60 seconds"),
        ("garbage", "the process that decoded it gave a wrong answer"),
        ("nonsense", "the process that decoded it gave a wrong answer"),
    ],
)
def test_the_error_of_an_item_in_quarantine_says_what_happened_to_its_lane(world, end, words):
    world.offer("f0", 1, A, seconds=1000)
    world.put("f0", 1)
    for _ in range(2):
        number = world.lane_of(1)
        if end == "hang":
            world.tick(TASK_SECONDS)
        elif end == "garbage":
            world.lane(number, messages.Filled(1, 1, 1))
        elif end == "nonsense":
            world.core.lane_broke_protocol(number)
            world.carry_out()
        assert world.killed.count(number) == (end != "crash")
        world.killed.clear()
        world.die(number)
    (answer,) = world.answer("f0", 1)
    assert answer.fault.error().code == 422
    assert "2 times" in answer.fault.message
    assert words in answer.fault.message
    world.offer("f1", 1, A)
    assert words in world.answer("f1", 1)[0].fault.message


def test_clearing_the_cache_ends_quarantine(world):
    world.offer("f0", 1, A)
    world.put("f0", 1)
    world.die(world.lane_of(1))
    world.die(world.lane_of(1))
    world.offer("f0", 2, A)
    assert world.outcomes("f0", 2) == ["failed"]
    world.say("f0", messages.Clear(3))
    assert world.compute("f0", 4, A)[0].outcome == "computed"


@pytest.mark.parametrize("why", ["its time is over", "it broke the protocol"])
@pytest.mark.parametrize("last_words", ["filled", "failed"])
def test_what_a_lane_was_granted_stays_its_until_its_exit_whatever_it_says_after_it_was_given_up(
    world, why, last_words
):
    world.offer("f0", 1, A, seconds=1000)
    world.put("f0", 1)
    number = world.lane_of(1)
    world.lane(number, messages.AskExtent(1, 100), META)
    held = world.granted[number]
    if why == "its time is over":
        world.tick(TASK_SECONDS)
    else:
        world.lane(number, messages.AskExtent(1, 100), META)
    assert world.killed == [number]
    if last_words == "filled":
        world.lane(number, messages.Filled(1, 1, 1))
    else:
        world.lane(number, messages.TaskFailed(1, messages.Fault.of(error("DecodeError"))))
    filling = world.core.ring.stats().filling
    assert filling > 0
    assert world.answer("f0", 1) is None
    for call in range(2, 40):  # the whole ring goes by
        world.offer("f1", call, bytes([call]) * 32)
        (want,) = world.wants("f1", call)
        world.put("f1", want.flight)
        world.fill(want.flight, length=4000)
        (answer,) = world.answer("f1", call)
        assert answer.offset + answer.length <= held.offset or held.offset + held.length <= answer.offset
        world.say("f1", messages.Unpin(call))
    assert world.core.ring.stats().evictions
    assert world.core.ring.stats().filling == filling
    world.die(number)
    assert not world.core.ring.stats().filling
    world.fill(1)
    assert world.outcomes("f0", 1) == ["computed"]


def test_items_in_quarantine_do_not_count_against_the_room_for_the_others():
    world = World(max_items=1)
    world.offer("f0", 1, A)
    world.put("f0", 1)
    world.die(world.lane_of(1))
    world.die(world.lane_of(1))
    world.offer("f0", 2, A, B)
    assert [want.index for want in world.wants("f0", 2)] == [1]


def test_a_lane_beyond_its_time_is_killed_once_and_gets_no_more_work(world):
    world.offer("f0", 1, A)
    world.put("f0", 1)
    number = world.lane_of(1)
    world.tick(TASK_SECONDS)
    world.tick(TASK_SECONDS / 2)
    assert world.killed == [number]
    world.fail(1, error("DecodeError"))
    world.offer("f0", 2, B, C)
    for flight in (2, 3):
        world.put("f0", flight)
    assert list(world.tasks) == [1 - number]


@pytest.mark.parametrize("misdeed", ["asks twice", "fills nothing", "plans", "sends no metadata"])
def test_a_lane_that_breaks_the_protocol_is_killed_and_its_item_is_tried_again(world, misdeed):
    world.offer("f0", 1, A)
    world.put("f0", 1)
    number = world.lane_of(1)
    if misdeed == "asks twice":
        world.lane(number, messages.AskExtent(1, 100), META)
        world.lane(number, messages.AskExtent(1, 100), META)
    elif misdeed == "fills nothing":
        world.lane(number, messages.Filled(1, 1, 1))
    elif misdeed == "plans":
        world.lane(number, messages.Planned(1), META)
    else:
        world.lane(number, messages.AskExtent(1, 100))
    assert world.killed == [number]
    assert world.answer("f0", 1) is None
    world.die(number)
    world.fill(1)
    assert world.outcomes("f0", 1) == ["computed"]


def test_a_lane_that_fails_with_an_extent_gives_it_back(world):
    world.offer("f0", 1, A)
    world.put("f0", 1)
    world.lane(world.lane_of(1), messages.AskExtent(1, 100), META)
    world.fail(1, error("DecodeError"))
    assert world.idle()


def test_what_a_lane_says_about_another_task_is_passed_over(world):
    world.offer("f0", 1, A)
    world.put("f0", 1)
    world.lane(world.lane_of(1), messages.TaskFailed(2, messages.Fault.of(error("DecodeError"))))
    world.lane(1 - world.lane_of(1), messages.Filled(1, 1, 1))
    assert world.answer("f0", 1) is None
    assert not world.killed


def test_the_first_lane_takes_no_slow_work_unless_it_is_the_only_one(world):
    world.offer("f0", 1, A, B, cost=HEAVY_COST)
    for flight in (1, 2):
        world.put("f0", flight)
    assert list(world.tasks) == [1]
    alone = World(lanes=1)
    alone.offer("f0", 1, A, cost=HEAVY_COST)
    alone.put("f0", 1)
    assert list(alone.tasks) == [0]


def test_a_later_joiner_makes_a_queued_item_more_urgent(world):
    world.offer("f0", 1, A, B)
    for flight in (1, 2):
        world.put("f0", flight)
    keys = [bytes([n]) * 32 for n in (10, 11)]
    world.offer("f0", 2, *keys)
    for flight in (3, 4):
        world.put("f0", flight)
    world.offer("f1", 1, keys[1], priority=-1)
    world.fill(1)
    assert {task.task for task in world.tasks.values()} == {2, 4}


def test_a_full_ring_is_busy_and_not_an_endless_wait(world):
    keys = [bytes([n]) * 32 for n in range(10, 15)]
    for call, key in enumerate(keys, 1):
        world.offer("f0", call, key)
        world.put("f0", call)
        if call < 5:
            world.fill(call, length=QUARTER - 64)
    world.lane(world.lane_of(5), messages.AskExtent(5, QUARTER - 64), META)
    assert world.answer("f0", 5)[0].fault.kind == "Busy"
    assert world.answer("f0", 5)[0].fault.retry_after_ms == 1000


def test_an_exit_of_a_lane_counts_as_a_restart_whatever_it_was_doing():
    world = World(warm=False)
    world.core.lane_exited(0, world.now)
    world.ready(0)
    world.die(0)
    assert world.counted("mmprep_lane_restarts_total") == 2


# --- full, large, many --------------------------------------------------------------------------------------------------

SPILL = 10 * QUARTER
#: What the segment of an item of a quarter of the ring takes.
ONE_SPILL = Geometry.plan(QUARTER, 1).total_size
FULL = [bytes([n]) * 32 for n in range(100, 104)]


def full(**options):
    """Give a world whose ring is full of what a backend has leased."""
    world = World(**options)
    for call, key in enumerate(FULL, 1):
        world.offer("f0", call, key, lease="engine")
        world.put("f0", call)
        world.fill(call, length=QUARTER - 64)
    assert world.core.ring.stats().free == 0
    return world


def ask(world, call, key, length, name="f0", **options):
    """Offer one item and compute it; return where it went."""
    world.offer(name, call, key, **options)
    (want,) = world.wants(name, call)
    world.put(name, want.flight)
    return world.place(want.flight, length)


def test_the_order_is_ring_then_spill_then_inline_then_busy_and_nothing_is_evicted_for_what_finds_no_room():
    world = full(spill=Geometry.plan(2000, 1).total_size, inline=1000)
    assert ask(world, 10, A, 1000) == "spill"
    assert ask(world, 11, B, 1000) == "inline"
    assert ask(world, 12, C, 1000) == "nowhere"
    fault = world.answer("f0", 12)[0].fault
    assert (fault.kind, fault.retry_after_ms) == ("Busy", 1000)
    world.say("f0", messages.Unpin(11))
    assert ask(world, 13, C, 1000) == "inline"
    assert ask(World(spill=SPILL, inline=1000), 1, A, 1000) == "ring"
    assert (world.core.ring.stats().evictions, world.core.ring.stats().entries) == (0, 4)


def test_a_spill_is_a_hit_and_shared_by_all_until_room_is_needed():
    world = full(spill=ONE_SPILL)
    assert ask(world, 10, A, 100) == "spill"
    (first,) = world.answer("f0", 10)
    world.offer("f1", 1, A)
    (hit,) = world.answer("f1", 1)
    assert hit == msgspec.structs.replace(first, outcome="hit")
    assert (hit.slot, hit.meta, len(hit.spill)) == (0, META, 16)
    world.say("f0", messages.Unpin(10))
    assert ask(world, 11, B, QUARTER - 64) == "nowhere", "the other one is pinned"
    world.say("f1", messages.Unpin(1))
    (name,) = world.segments
    assert ask(world, 12, B, QUARTER - 64) == "spill"
    assert name not in world.segments
    assert len(world.segments) == 1


def test_an_object_above_the_largest_goes_to_a_spill_and_evicts_nothing():
    world = World(spill=SPILL, inline=10 * QUARTER)
    for key in FULL:
        assert world.cached(key) == "ring"
    assert ask(world, 1, A, 3 * QUARTER) == "spill"
    assert world.core.ring.stats().evictions == 0


def test_an_object_that_no_budget_would_ever_take_is_too_large():
    world = World(spill=ONE_SPILL, inline=3 * QUARTER)
    assert ask(world, 1, A, 2 * QUARTER) == "inline"
    assert ask(world, 2, B, 2 * QUARTER) == "nowhere"
    assert ask(world, 3, C, 4 * QUARTER) == "nowhere"
    assert [world.answer("f0", call)[0].fault.kind for call in (2, 3)] == ["Busy", "TooLarge"]


def test_a_spill_is_leased_acquired_and_outlives_its_removal_until_the_last_hold_ends():
    world = full(spill=SPILL)
    assert ask(world, 10, A, 100, lease="engine") == "spill"
    (answer,) = world.answer("f0", 10)
    assert world.core.ring.leases.get(answer.lease).owner == "engine"
    assert not world.core.ring.holders
    world.say("engine", messages.Acquire(1, answer.slot, answer.generation, "copy"))
    second = world.got("engine", messages.Acquired, 1)[0].message.lease
    world.say("f0", messages.Clear(11))
    assert len(world.segments) == 1
    world.say("engine", messages.Release(2, (answer.lease,)))
    assert len(world.segments) == 1
    world.tick(LEASE_SECONDS)
    assert second not in {lease.lease_id for lease in world.core.ring.leases}
    assert not world.segments


def test_clearing_tells_what_became_free_beside_the_ring_too():
    world = full(spill=SPILL)
    ask(world, 10, A, 100)
    world.say("f0", messages.Clear(11))
    assert world.got("f0", messages.Cleared, 11)[0].message == messages.Cleared(11, 5, 0)
    world.say("f0", messages.Unpin(10))
    ask(world, 12, A, 100)
    world.say("f0", messages.Unpin(12))
    world.say("f0", messages.Clear(13))
    cleared = world.got("f0", messages.Cleared, 13)[0].message
    assert (cleared.entries, cleared.nbytes > 100) == (1, True)
    assert not world.segments


def test_a_control_process_is_told_what_is_in_the_ring_and_who_holds_it():
    world = World(spill=SPILL)
    world.compute("f0", 1, A)
    world.compute("f0", 2, B, lease="engine")
    world.offer("f0", 3, C)
    (want,) = world.wants("f0", 3)
    world.put("f0", want.flight)
    world.lane(world.lane_of(want.flight), messages.AskExtent(want.flight, 100), META)
    world.say("f0", messages.Unpin(1))
    assert ask(world, 4, FULL[0], 3 * QUARTER) == "spill"
    world.hello("cli", "control")
    world.say("cli", messages.Inspect(1, 0))
    told = world.got("cli", messages.Inspected, 1)[0].message
    assert told.start == 0
    assert {entry.key: (entry.state, entry.pins, entry.leases, entry.spill) for entry in told.entries} == {
        A: ("ready", 0, 0, False),
        B: ("ready", 0, 1, False),
        C: ("filling", 0, 0, False),
        FULL[0]: ("ready", 1, 0, True),
    }
    in_ring = sum(entry.nbytes for entry in told.entries if not entry.spill)
    assert in_ring == GEOMETRY.arena_capacity - world.core.ring.stats().free
    world.say("cli", messages.Clear(2))
    world.say("cli", messages.Inspect(3, 0))
    left = world.got("cli", messages.Inspected, 3)[0].message.entries
    assert {entry.key: entry.state for entry in left} == {B: "removed", C: "filling", FULL[0]: "removed"}


def test_only_a_control_process_may_look_into_the_ring(world):
    for name in ("f0", "engine"):
        world.say(name, messages.Inspect(9, 0))
        assert world.fault(name, 9).kind == "InvalidRequest"


def test_a_full_page_of_entries_fits_into_a_control_frame():
    entry = messages.InspectedEntry(2**40, 2**48, bytes([255]) * 32, 2**48, "removed", 2**30, 2**30, True)
    page = messages.Inspected(2**40, (entry,) * messages.MAX_INSPECTED, 2**40)
    assert unpack(pack(page), messages.FromWriter) == page


def test_a_backends_death_frees_its_spills():
    world = full(spill=SPILL)
    ask(world, 10, A, 100, lease="engine")
    world.say("f0", messages.Clear(11))
    world.core.peer_gone("backend", "engine", world.now)
    world.carry_out()
    assert not world.segments
    assert world.core.ring.stats().free == GEOMETRY.arena_capacity


def test_a_backend_that_asserts_the_lease_of_a_spill_again_keeps_it():
    world = full(spill=SPILL)
    ask(world, 10, A, 100, lease="engine")
    (answer,) = world.answer("f0", 10)
    held = messages.Held(answer.lease, answer.slot, answer.generation, "copy")
    other = messages.Held(bytes(16), answer.slot, answer.generation + 1, "copy")
    world.say("engine", messages.Reassert(1, (held, other), True))
    assert world.got("engine", messages.Renewed, 1)[0].message.lost == (bytes(16),)
    assert world.core.ring.leases.get(answer.lease).kind == "copy"


def test_an_absurd_length_is_too_large_and_nothing_worse():
    world = World(spill=SPILL, inline=1000)
    assert ask(world, 1, A, 1 << 48) == "nowhere"
    assert world.answer("f0", 1)[0].fault.kind == "TooLarge"


@pytest.mark.parametrize("end", ["dies", "fails", "has no memory"])
def test_the_segment_of_a_spill_that_is_not_finished_goes(end):
    world = full(spill=SPILL, inline=1000)
    world.offer("f0", 10, A)
    world.put("f0", 5)
    number = world.lane_of(5)
    world.lane(number, messages.AskExtent(5, 100), META)
    assert len(world.segments) == 1
    if end == "dies":
        world.die(number)
        assert not world.segments
        assert world.place(5, 100) == "spill"
    elif end == "fails":
        world.fail(5, error("DecodeError"))
        assert not world.segments
    else:
        world.lane(number, messages.NoSpill(5))
        assert not world.segments
        world.tasks.pop(number)
        world.lane(number, messages.Inlined(5, 1, 1), bytes(100))
        assert world.answer("f0", 10)[0].inline == 5


def test_where_there_is_no_memory_for_a_spill_nor_a_budget_inline_the_item_is_busy():
    world = full(spill=SPILL)
    world.offer("f0", 10, A)
    world.put("f0", 5)
    world.lane(world.lane_of(5), messages.AskExtent(5, 100), META)
    world.lane(world.lane_of(5), messages.NoSpill(5))
    assert world.answer("f0", 10)[0].fault.kind == "Busy"
    assert world.idle()


def test_what_travels_inline_reaches_all_who_wait_is_cached_for_none_and_kept_until_the_last_has_it():
    world = full(inline=100)
    for name in ("f0", "f1"):
        world.offer(name, 10, A)
    world.offer("f1", 11, A, need="plan")
    world.put("f0", 5)
    assert world.place(5, 100) == "inline"
    for name in ("f0", "f1"):
        (answer,) = world.answer(name, 10)
        assert (answer.inline, answer.length, answer.meta) == (5, 0, META)
        assert world.core.tensors(answer.inline) == bytes([5]) * 100
    assert (world.answer("f1", 11)[0].inline, world.answer("f1", 11)[0].meta) == (0, META)
    world.say("f0", messages.Unpin(10))
    assert world.core.tensors(5) is not None
    world.core.peer_gone("frontend", "f1", world.now)
    world.carry_out()
    assert world.core.tensors(5) is None
    world.offer("f0", 12, A)
    assert world.wants("f0", 12), "nothing of it is cached"
    assert world.core.transfers.nbytes == 0


def test_a_call_that_fails_for_another_item_keeps_no_tensors_and_leaves_them_to_the_others():
    world = full(inline=100)
    world.offer("f0", 10, A, B)
    world.offer("f1", 10, A)
    world.put("f0", 6)
    world.fail(6, error("DecodeError"))
    world.put("f0", 5)
    world.place(5, 100)
    assert world.outcomes("f0", 10) == ["computed", "failed"]
    assert world.core.tensors(world.answer("f1", 10)[0].inline) is not None
    world.say("f1", messages.Unpin(10))
    assert world.idle()


def test_where_addresses_were_asked_for_what_is_in_memory_is_leased_and_the_rest_kept_until_it_was_fetched():
    world = full(inline=100)
    world.offer("f0", 10, FULL[0], A, lease="engine")
    world.put("f0", 5)
    world.place(5, 100)
    leased, inline = world.answer("f0", 10)
    assert (leased.lease is not None, leased.inline) == (True, 0)
    assert (inline.lease, inline.inline) == (None, 5)
    assert not world.core.ring.holders, "the lease is what holds it now"
    assert world.core.tensors(5) is not None
    world.say("f0", messages.Unpin(10))
    assert world.idle()


def test_nobody_waits_for_tensors_that_nobody_needs_any_more():
    world = full(inline=100)
    world.offer("f0", 10, A)
    world.put("f0", 5)
    world.lane(world.lane_of(5), messages.AskExtent(5, 100), META)
    world.say("f0", messages.Cancel(10))
    world.tasks.pop(0)
    world.lane(0, messages.Inlined(5, 1, 1), bytes(100))
    assert world.idle()


def test_tensors_of_another_size_than_was_reserved_are_a_breach_of_the_protocol():
    world = full(inline=1000)
    world.offer("f0", 10, A)
    world.put("f0", 5)
    number = world.lane_of(5)
    world.lane(number, messages.AskExtent(5, 100), META)
    world.lane(number, messages.Inlined(5, 1, 1), bytes(101))
    assert world.killed == [number]
    world.die(number)
    assert world.place(5, 100) == "inline"


@pytest.mark.parametrize("lease", [None, "engine"])
def test_a_request_larger_than_half_of_the_ring_keeps_to_its_half_and_finds_the_rest_beside(lease):
    world = World(spill=SPILL)
    world.offer("f0", 1, *FULL, A, lease=lease)
    where = []
    for flight in range(1, 6):
        world.put("f0", flight)
        where.append(world.place(flight, QUARTER - 64))
    assert where == ["ring", "ring", "spill", "spill", "spill"]
    assert world.outcomes("f0", 1) == ["computed"] * 5
    assert world.core.ring.stats().ready + world.core.ring.stats().leased == 2 * QUARTER
    world.say("f0", messages.Unpin(1))
    world.offer("f1", 1, *FULL, A)
    assert world.outcomes("f1", 1) == ["hit"] * 5, "and the next time all of it is there"


def test_hits_that_a_call_cannot_pin_are_had_from_spills_and_the_entries_stay_for_others():
    world = World(spill=SPILL)
    for key in FULL:
        assert world.cached(key) == "ring"
    world.offer("f0", 1, *FULL)
    wants = world.wants("f0", 1)
    assert [want.index for want in wants] == [2, 3]
    for want in wants:
        world.put("f0", want.flight)
        assert world.place(want.flight, QUARTER - 64) == "spill"
    answers = world.answer("f0", 1)
    assert [answer.outcome for answer in answers] == ["hit", "hit", "computed", "computed"]
    assert [answer.spill is None for answer in answers] == [True, True, False, False]
    world.offer("f1", 1, FULL[2])
    assert world.answer("f1", 1)[0].spill is None
    world.offer("f1", 2, *FULL)
    assert world.outcomes("f1", 2) == ["hit"] * 4
    assert world.core.ring.stats().evictions == 0


def test_two_requests_that_each_need_half_of_the_ring_get_it_side_by_side():
    world = World()
    for name, keys in (("f0", FULL[:2]), ("f1", FULL[2:])):
        world.offer(name, 1, *keys)
    for flight, name in ((1, "f0"), (3, "f1"), (2, "f0"), (4, "f1")):
        world.put(name, flight)
        assert world.place(flight, QUARTER - 64) == "ring"
    for name in ("f0", "f1"):
        assert world.outcomes(name, 1) == ["computed"] * 2
    assert world.core.ring.stats().free == 0


def test_a_call_that_joins_what_is_filled_in_the_ring_and_cannot_pin_it_has_it_beside():
    world = World(spill=SPILL)
    for key in FULL[:2]:
        world.cached(key)
    world.offer("f1", 1, A)
    world.put("f1", 3)
    number = world.lane_of(3)
    world.lane(number, messages.AskExtent(3, QUARTER - 64), META)
    world.offer("f0", 1, *FULL[:2], A)
    (want,) = world.wants("f0", 1)
    del world.tasks[number], world.granted[number]
    world.lane(number, messages.Filled(3, 1, 1))
    assert world.answer("f1", 1)[0].spill is None
    world.put("f0", want.flight)
    assert world.place(want.flight, QUARTER - 64) == "spill"
    assert world.outcomes("f0", 1) == ["hit", "hit", "computed"]


def test_one_who_cannot_pin_an_item_does_not_take_the_ring_from_those_who_can():
    world = World()
    for key in FULL[:2]:
        world.cached(key)
    world.offer("f1", 1, A)
    world.offer("f0", 1, *FULL[:2], A)
    world.put("f1", 3)
    assert world.place(3, QUARTER - 64) == "ring"
    assert world.outcomes("f1", 1) == ["computed"]
    assert world.answer("f0", 1)[2].fault.kind == "Busy"
    assert not world.core.ring.pinned_by("f0#1")


def test_a_request_that_alone_uses_up_every_budget_is_told_that_trying_again_is_no_use():
    world = World(spill=ONE_SPILL, inline=QUARTER)
    keys = [bytes([n]) * 32 for n in range(5)]
    world.offer("f0", 1, *keys)
    where = []
    for flight in range(1, 6):
        world.put("f0", flight)
        where.append(world.place(flight, QUARTER - 64))
    assert where == ["ring", "ring", "spill", "inline", "nowhere"]
    fault = world.answer("f0", 1)[4].fault
    assert fault.kind == "TooLarge"
    assert "--spill-size" in fault.message
    assert world.idle()


def test_one_who_joins_what_must_be_apart_is_busy_where_the_ring_could_have_it_later():
    world = World()
    for key in FULL[:3]:
        world.cached(key)
    world.offer("f0", 1, *FULL[:3])
    (want,) = world.wants("f0", 1)
    world.say("f1", messages.Clear(1))
    world.offer("f1", 2, FULL[2])
    assert not world.wants("f1", 2), "it waits for the same flight"
    world.put("f0", want.flight)
    assert world.place(want.flight, QUARTER - 64) == "nowhere"
    (alone,) = world.answer("f1", 2)
    assert (alone.fault.kind, alone.fault.retry_after_ms) == ("Busy", 1000)
    assert ask(world, 3, FULL[2], QUARTER - 64, name="f1") == "ring"


def test_tiny_items_beyond_the_slots_of_the_directory_evict_each_other_and_need_nothing_else():
    world = World(spill=SPILL, inline=SPILL)
    for number in range(3 * GEOMETRY.slots):
        assert world.cached(number.to_bytes(32, "big"), 10) == "ring"
    stats = world.core.ring.stats()
    assert stats.slots_used == GEOMETRY.slots
    assert stats.free > 0


def test_when_every_slot_of_the_directory_is_leased_the_next_item_goes_to_a_spill():
    world = World(spill=SPILL)
    for number in range(GEOMETRY.slots):
        world.offer("f0", 1 + number, number.to_bytes(32, "big"), lease="engine")
        world.put("f0", 1 + number)
        world.fill(1 + number, length=10)
    assert world.core.ring.stats().free > QUARTER
    assert ask(world, 500, b"x" * 32, 10) == "spill"
    world.say("engine", messages.Release(1, (world.answer("f0", 1)[0].lease,)))
    assert ask(world, 501, b"y" * 32, 10) == "ring"


def test_a_segment_that_would_have_the_rings_name_is_not_made():
    world = full(spill=SPILL, inline=1000)
    world.core._tasks._new_id = lambda: bytes(4) + b"another!"
    assert ask(world, 10, A, 100) == "inline"


def test_segments_that_have_gone_go_before_what_is_granted_in_their_place():
    world = full(spill=ONE_SPILL)
    ask(world, 10, A, 100)
    world.say("f0", messages.Unpin(10))
    world.offer("f0", 11, B)
    world.put("f0", 6)
    world.core.from_lane(world.lane_of(6), messages.AskExtent(6, QUARTER - 64), [META], world.now)
    removed, granted = world.core.take_actions()
    assert isinstance(removed, RemoveSegment)
    assert isinstance(granted.message, messages.GrantedSpill)
    assert removed.name != granted.message.name


# --- peers --------------------------------------------------------------------------------------------------------------


def test_every_frontend_gets_the_card_once_whether_it_connects_before_or_after_the_lanes_are_warm():
    world = World(warm=False)
    for number in (0, 1):
        assert not world.core.card
        world.ready(number)
    world.die(0)
    world.hello("f2", "frontend")
    assert [len(world.got(name, messages.Card)) for name in ("f0", "f1", "f2", "engine")] == [1, 1, 0, 0]
    assert world.got("f2", messages.WriterWelcome)[0].message.card == b"card"


def test_answers_say_when_an_item_was_computed_where_the_offer_is_traced(world):
    item = (messages.Offered(A, "image", 1, 10),)
    world.say("f0", messages.Offer(1, "tensors", 99_000, 0, item, None, True))
    world.offer("f1", 1, A)
    (want,) = world.wants("f0", 1)
    world.now = 100.0
    world.put("f0", want.flight)
    world.now = 100.5
    world.fill(want.flight)
    (computed,), (joined,) = world.answer("f0", 1), world.answer("f1", 1)
    assert computed.times == messages.StageTimes(100_000_000, 100_000_000, 100_500_000, 1, 1)
    assert (joined.outcome, joined.times) == ("joined", None)
    world.say("f0", messages.Offer(2, "tensors", 99_000, 0, item, None, True))
    (hit,) = world.answer("f0", 2)
    assert (hit.outcome, hit.times) == ("hit", None)


def test_frontends_hear_why_a_lane_does_not_get_warm_until_all_are():
    world = World(warm=False)
    world.core.not_warm("a small image: KeyError")
    world.carry_out()
    world.hello("f2", "frontend")
    world.hello("another", "backend")
    told = [[sent.message.why for sent in world.got(name, messages.NotWarm)] for name in ("f0", "f1", "f2", "another")]
    assert told == [["a small image: KeyError"]] * 3 + [[]]
    for number in (0, 1):
        world.ready(number)
    world.core.not_warm("too late")
    world.carry_out()
    assert world.core.cold == ""
    assert [len(world.got(name, messages.NotWarm)) for name in ("f0", "f1", "f2")] == [1, 1, 1]


def test_who_does_not_say_hello_first_is_refused_and_so_is_who_says_it_twice(world):
    world.say("stranger", messages.Clear(1))
    assert world.got("stranger", messages.Refused)
    world.offer("f0", 1, A)
    world.hello("f0", "frontend")
    assert world.got("f0", messages.Refused)
    assert world.idle()
    world.hello("f0", "frontend")
    assert len(world.got("f0", messages.WriterWelcome)) == 2


def test_a_role_that_has_nothing_to_say_to_the_writer_is_refused(world):
    world.hello("x", "lane")
    assert world.got("x", messages.Refused)


def test_messages_of_another_role_fail_and_change_nothing(world):
    world.offer("engine", 1, A)
    assert world.fault("engine", 1).kind == "InvalidRequest"
    world.say("f0", messages.Acquire(2, 0, 0, "view"))
    assert world.fault("f0", 2).kind == "InvalidRequest"


def test_identities_that_differ_in_one_byte_above_ascii_are_two_peers(world):
    for number, identity in enumerate((b"\x00\xfe", b"\x00\xff")):
        world.core.message(identity, messages.Hello(PROTOCOL, "1", "frontend", f"g{number}", 1), world.now)
        offer = messages.Offer(1, "tensors", 1000, 0, (messages.Offered(bytes([number]) * 32, "image", 1, 10),))
        world.core.message(identity, offer, world.now)
    world.carry_out()
    assert len(world.core.flights) == 2
    world.core.unreachable(b"\x00\xfe", world.now)
    world.core.validate()
    assert [flight.uploader[0] for flight in world.core.flights] == ["\x00\xff"]


def test_a_frontend_that_connects_again_has_lost_its_calls_and_its_pins(world):
    world.compute("f0", 1, A)
    world.offer("f0", 2, B)
    world.hello("f0", "frontend", identity="f0 again")
    assert world.idle()


def test_processes_without_a_lock_are_remembered_up_to_a_bound(world):
    for number in range(100):
        world.hello(f"cli-{number}", "control")
    assert len(world.core.peers) < 30
    world.say("cli-99", messages.Clear(1))
    assert world.got("cli-99", messages.Cleared, 1)


def test_clearing_drops_what_nobody_holds_and_what_is_pinned_stays_readable(world):
    (kept,) = world.compute("f0", 1, A)
    world.compute("f0", 2, B)
    world.say("f0", messages.Unpin(2))
    free = world.core.ring.stats().free
    world.say("f0", messages.Clear(3))
    cleared = world.got("f0", messages.Cleared, 3)[0].message
    # The pinned one is found no more, and not free yet.
    assert (cleared.entries, cleared.nbytes) == (2, world.core.ring.stats().free - free)
    assert cleared.nbytes > 0
    assert bytes(world.memory[kept.offset : kept.offset + len(META)]) == META
    assert world.core.ring.stats().entries == 1
    world.offer("f1", 1, A, need="plan")
    assert world.wants("f1", 1)
