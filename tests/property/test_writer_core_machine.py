"""The writer's core among peers and lanes that do everything they can do, over a ring of one page.

The machine plays frontends, backends, lanes and the shell. Memory is a byte array, and one a spill, into which lanes write
what they were granted, garbage first; whoever may read an extent must find his key's content there after every step, and
whoever was promised tensors inline must be able to fetch them. What may be spilled and sent inline is drawn. A peer that is
sent something on a dead connection is reported as unreachable, as the shell does. Media come with aliases, of which the
core remembers fewer than there are, and are recalled by them: what comes must be what was last sent, or nothing. Items are
injected under the same names, with this content or that, and whoever gets one by its name must get the metadata of the
tensors that he can read, and none after other content was sent with the name. At the
end all faults stop, and everyone who waits must get his answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmprep import errors
from mmprep.items import align
from mmprep.keys import item_key
from mmprep.layout import Geometry, State
from mmprep.lease_id import mark_of, was_granted_to
from mmprep.metrics import Metrics
from mmprep.segment import sibling_name
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.messages import HEAVY_COST
from mmprep_worker.ring.policy import Clock
from mmprep_worker.ring.ring import Ring
from mmprep_worker.ring.spills import Spill
from mmprep_worker.scheduling.admission import Admission, Quarantine
from mmprep_worker.scheduling.flights import Flights
from mmprep_worker.scheduling.job import Limits
from mmprep_worker.scheduling.queue import FairQueue
from mmprep_worker.writer.core import WriterCore
from mmprep_worker.writer.plans import PlanStore
from mmprep_worker.writer.state import KillLane, RemoveSegment, Send, ToLane

GEOMETRY = Geometry.plan(4096, 6)
UPLOAD_SECONDS, LEASE_SECONDS, TASK_SECONDS = 6, 10, 8
LANES = 2
RING = "/mmprep-0-cafecafe-00000000"
#: One small segment; two or three.
SPILL_BYTES = [13_000, 40_000]
#: One item or another; many.
INLINE_BYTES = [900, 5000]
CARD = b"card"
VARIANT = b"v" * 32
#: One is forgotten when all were used.
ALIASES = [bytes([200 + number]) * 32 for number in range(3)]
MOST_ALIASES = 2
FRONTENDS, BACKENDS = ["0", "1", "2"], ["engine-0", "engine-1"]
PROCESSES = [("frontend", peer_id) for peer_id in FRONTENDS] + [("backend", peer_id) for peer_id in BACKENDS]
PICK = st.integers(0, 23)
#: With luck, what would go wrong does not.
LUCK = st.sampled_from([False, True, True])


@dataclass(frozen=True)
class Medium:
    """A medium and what becomes of it."""

    number: int
    tensor_length: int
    cost: int

    @property
    def digest(self):
        return bytes([self.number]) * 32

    @property
    def key(self):
        return KEYS[self.number]

    @property
    def encoded(self):
        return bytes([self.number]) * (40 + self.number % 7)

    @property
    def meta(self):
        return b"meta of %d " % self.number + b"." * (40 * self.number % 250)

    @property
    def extent(self):
        return self.meta.ljust(align(len(self.meta)), b"\0") + self.tensors

    @property
    def tensors(self):
        return bytes([self.number]) * self.tensor_length


LENGTHS = [64, 300, 700, 832, 2000, 500]  # the fifth is above what one item of the ring may have
KEYS = [item_key(VARIANT, bytes([number]) * 32) for number in range(len(LENGTHS))]
MEDIA = [Medium(n, length, HEAVY_COST if n == 3 else 10) for n, length in enumerate(LENGTHS)]


@dataclass(frozen=True)
class Elsewhere(Medium):
    """What somebody injects under a name: of one key there are several contents."""

    name: int

    @property
    def key(self):
        return NAMED[self.name]


#: Keys of what is injected, by the places of their aliases.
NAMED = [bytes([150 + number]) * 32 for number in range(len(ALIASES))]
ELSEWHERE = [
    Elsewhere(20 + 3 * name + number, length, 10, name)
    for name in range(len(ALIASES))
    for number, length in enumerate([100, 600, 1500])
]
BY_META = {medium.meta: medium for medium in (*MEDIA, *ELSEWHERE)}


@dataclass(frozen=True)
class Terms:
    """What an offer says beside its items; ``lie`` is added to their sizes."""

    need: str
    lease: messages.LeaseTo | None
    seconds: int
    priority: int
    lie: int


LEASES = st.builds(messages.LeaseTo, st.sampled_from([BACKENDS[0], *BACKENDS]), st.sampled_from(["copy", "view"]))
TERMS = st.builds(
    Terms,
    need=st.sampled_from(["tensors", "tensors", "plan"]),
    lease=st.none() | LEASES,
    seconds=st.sampled_from([20, 40, 10, 5, 0]),
    priority=st.integers(-1, 1),
    lie=st.sampled_from([0] * 9 + [1]),
)


@dataclass
class Call:
    """An offer that was made; ``media`` are what it may be answered with, ``None`` for what nobody has sent.

    Under the ``superseded`` names nothing is there that was injected.
    """

    offer: messages.Offer
    deadline: float
    media: list[Medium | None]
    superseded: frozenset[bytes] = frozenset()
    state: str = "waiting"  # then "pinned" or "over"
    answers: list = field(default_factory=list)


@dataclass
class Connection:
    identity: bytes
    role: str
    id: str
    pid: int
    turn: int = 0
    open: bool = True
    cards: int = 0
    calls: dict[int, Call] = field(default_factory=dict)
    wants: dict[int, Medium] = field(default_factory=dict)
    asked: dict[int, messages.Wire] = field(default_factory=dict)

    def waiting(self):
        return [call for call in self.calls.values() if call.state == "waiting"]


@dataclass
class Lane:
    ready: bool = False
    killed: bool = False
    task: messages.Task | None = None
    medium: Medium | None = None
    honest: bool = True
    granted: messages.Granted | messages.GrantedSpill | messages.GrantedInline | None = None


class WriterCoreMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.memory = bytearray(GEOMETRY.total_size)
        self.segments: dict[str, bytes] = {}
        self.now = 100.0
        self.numbers = count(1)
        self.core = self.new_core(0, 0)
        self.connections: dict[bytes, Connection] = {}
        self.lanes = [Lane() for _ in range(LANES)]
        self.leases: dict[bytes, tuple[str, messages.ItemAnswer, Medium]] = {}
        self.carded = False
        self.given_back = b""
        self.offered: list[list[Medium]] = []
        #: What was last sent with each alias.
        self.aliases: dict[bytes, Medium] = {}
        #: Those with which content was sent after the last item was injected under their names.
        self.superseded: set[bytes] = set()

    def new_core(self, spill, inline):
        quarantine = Quarantine(max_keys=4, seconds=30)
        ring = Ring(GEOMETRY, 1, Clock(GEOMETRY.slots), GEOMETRY.arena_capacity // 4, spill_bytes=spill)
        return WriterCore(
            ring=ring,
            flights=Flights(max_waiting=9, upload_seconds=UPLOAD_SECONDS, quarantine=quarantine),
            queue=FairQueue(max_items=5, max_bytes=180),
            admission=Admission(max_items=5, max_bytes=180, max_items_per_client=4),
            quarantine=quarantine,
            plans=PlanStore(1000),
            metrics=Metrics(),
            segment=messages.SegmentInfo(RING, bytes(16), GEOMETRY.total_size),
            lanes=LANES,
            lease_seconds=LEASE_SECONDS,
            task_seconds=TASK_SECONDS,
            read=lambda offset, length: bytes(self.memory[offset : offset + length]),
            new_id=lambda: next(self.numbers).to_bytes(12, "little"),
            inline_bytes=inline,
            most_aliases=MOST_ALIASES,
            queue_limits=Limits(jobs=4, nbytes=400, pinned=GEOMETRY.arena_capacity // 2),
        )

    @initialize(
        warm=st.sampled_from([True, True, True, False]),
        spill=st.sampled_from([0, *SPILL_BYTES]),
        inline=st.sampled_from([0, *INLINE_BYTES]),
    )
    def set_up(self, warm, spill, inline):
        self.core = self.new_core(spill, inline)
        for frontend_id in FRONTENDS[:2]:
            self.connect("frontend", frontend_id, 1)
        self.connect("backend", BACKENDS[0], 1)
        if warm:
            for number in range(LANES):
                self.lane_becomes_ready(number)

    # -- Peers -------------------------------------------------------------------------------------------------------

    @rule(who=st.sampled_from(PROCESSES), new=st.booleans())
    def a_process_connects(self, who, new):
        before = self.current(*who)
        if before is None or not before.open:
            self.connect_again(who, new)
        else:
            self.all_work()

    def connect_again(self, who, new):
        """After its connection was lost, or as a new process under the same id."""
        before = self.current(*who)
        pid = before.pid + new if before else 1
        turn = before.turn if before and not new else 0
        if before:
            before.open = False
            if pid != before.pid:
                self.end_leases(who[1])
            self.over(before)
        self.connect(*who, pid, turn)

    def connect(self, role, peer_id, pid, turn=0):
        identity = b"%s:%s:\xff%d" % (role.encode(), peer_id.encode(), next(self.numbers))
        connection = self.connections[identity] = Connection(identity, role, peer_id, pid, turn)
        self.say(connection, messages.Hello(PROTOCOL, "1", role, peer_id, pid, pid.to_bytes(4, "big"), 0, turn))

    @precondition(lambda self: self.living())
    @rule(
        pick=PICK,
        what=st.sampled_from(["dies", "breaks off", "connects twice", "is replaced", "breaks the protocol"]),
        how=st.sampled_from(["hello", "number", "role"]),
        luck=LUCK,
    )
    def a_peer_fails(self, pick, what, how, luck):
        connection = self.choose(self.living(), pick)
        if luck:
            self.all_work()
        elif what == "dies":
            connection.open = False
        elif what == "breaks off":
            self.lose(connection)
            self.carry_out()
        elif what == "breaks the protocol":
            self.break_the_protocol(connection, how)
        else:
            self.connect_again((connection.role, connection.id), what == "is replaced")

    @rule()
    def process_locks_have_fallen(self):
        for connection in list(self.connections.values()):
            if self.current(connection.role, connection.id) is connection and not connection.open:
                self.bury(connection)

    def bury(self, connection):
        self.over(connection)
        del self.connections[connection.identity]
        if connection.role == "backend":
            self.end_leases(connection.id)
        self.core.peer_gone(connection.role, connection.id, self.now)
        self.carry_out()

    def lose(self, connection):
        connection.open = False
        self.over(connection)
        self.core.unreachable(connection.identity, self.now)

    def break_the_protocol(self, connection, what):
        if what == "role":
            number = next(self.numbers)
            upgrade, cancel = messages.Upgrade(number, bytes(16), "view"), messages.Cancel(number)
            connection.asked[number] = message = upgrade if connection.role == "frontend" else cancel
        elif what == "number" and any(call.state != "over" for call in connection.calls.values()):
            message = next(call.offer for call in connection.calls.values() if call.state != "over")
        else:
            message = messages.Hello(
                PROTOCOL, "1", connection.role, connection.id, connection.pid, connection.pid.to_bytes(4, "big")
            )
        self.say(connection, message)
        assert connection.open == (what == "role")

    # -- Calls -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.living("frontend"))
    @rule(
        pick=PICK,
        media=st.lists(st.sampled_from(MEDIA), min_size=1, max_size=4),
        terms=TERMS,
        aliases=st.lists(st.none() | st.sampled_from(ALIASES), min_size=4, max_size=4),
    )
    def offer(self, pick, media, terms, aliases):
        self.make_offer(self.choose(self.living("frontend"), pick), media, terms, aliases)

    @precondition(lambda self: self.living("frontend"))
    @rule(
        pick=PICK,
        aliases=st.lists(st.sampled_from(ALIASES), min_size=1, max_size=3),
        media=st.lists(st.sampled_from(MEDIA), max_size=1),
        terms=TERMS,
        first=st.booleans(),
    )
    def recall(self, pick, aliases, media, terms, first):
        """Offer what the frontend only knows aliases of, alone or with a medium that it has, first or last."""
        connection = self.choose(self.living("frontend"), pick)
        sent = self.items(media, terms, [])
        recalled = [messages.Recalled(alias, VARIANT, "image", NAMED[ALIASES.index(alias)]) for alias in aliases]
        expected = [self.aliases.get(alias) for alias in aliases]
        items, found = (recalled + sent, expected + media) if first else (sent + recalled, media + expected)
        flights = {flight.id for flight in self.core.flights}
        number = self.say_offer(connection, items, found, terms)
        opened = {flight.id for flight in self.core.flights} - flights
        assert len(opened) <= len(media), "what was recalled opened a flight"
        if number in connection.calls and connection.calls[number].state == "waiting" and not media:
            assert not opened

    @precondition(lambda self: self.living("frontend"))
    @rule(pick=PICK, medium=st.sampled_from(ELSEWHERE), replace=st.booleans(), terms=TERMS, rounds=st.integers(0, 3))
    def inject(self, pick, medium, replace, terms, rounds):
        connection = self.choose(self.living("frontend"), pick)
        alias = ALIASES[medium.name]
        item = messages.Injected(medium.key, "image", medium.cost, len(medium.encoded), alias, replace)
        self.superseded.discard(alias)
        self.say_offer(connection, [item], [medium], Terms("tensors", None, terms.seconds, terms.priority, 0))
        self.work_goes_on(rounds)

    @precondition(lambda self: self.offered and self.living("frontend"))
    @rule(pick=PICK, which=PICK, lease=st.booleans(), rounds=st.integers(0, 3))
    def the_same_media_are_offered_again(self, pick, which, lease, rounds):
        media = self.choose(self.offered, which)
        to = messages.LeaseTo(BACKENDS[0], "view") if lease else None
        self.make_offer(self.choose(self.living("frontend"), pick), media, Terms("tensors", to, 20, 0, 0))
        self.work_goes_on(rounds)

    @precondition(lambda self: self.living("frontend"))
    @rule(pick=PICK, rounds=st.integers(0, 4), lease=st.booleans(), again=st.booleans())
    def more_than_half_of_the_ring_is_cached_and_then_offered_at_once(self, pick, rounds, lease, again):
        connection = self.choose(self.living("frontend"), pick)
        media = [MEDIA[2], MEDIA[3], MEDIA[5]]
        for medium in media:
            self.make_offer(connection, [medium], Terms("tensors", None, 20, 0, 0))
            self.work_goes_on(2)
            self.let_go(connection)
        self.work_goes_on(1)
        to = messages.LeaseTo(BACKENDS[0], "copy") if lease else None
        for _ in range(1 + again):
            if connection.open:
                self.make_offer(connection, media, Terms("tensors", to, 20, 0, 0))
        self.work_goes_on(rounds)

    def let_go(self, connection):
        for number, call in connection.calls.items():
            if call.state == "pinned":
                call.state = "over"
                self.say(connection, messages.Unpin(number))

    def make_offer(self, connection, media, terms, aliases=()):
        self.offered = [*self.offered[-5:], media]
        self.say_offer(connection, self.items(media, terms, aliases), media, terms)

    def items(self, media, terms, aliases):
        names = [*aliases, *[None] * len(media)]
        return [
            messages.Offered(
                m.key,
                "image",
                m.cost,
                len(m.encoded) + terms.lie,
                None if name is None else messages.Alias(name, m.digest, NAMED[ALIASES.index(name)]),
            )
            for m, name in zip(media, names, strict=False)
        ]

    def say_offer(self, connection, items, media, terms):
        number = next(self.numbers)
        made = messages.Offer(
            number, terms.need, terms.seconds * 1000, terms.priority, tuple(items), terms.lease, number % 2 == 0
        )
        connection.calls[number] = Call(made, self.now + terms.seconds, [*media], frozenset(self.superseded))
        if terms.lease is None or any(
            b.id == terms.lease.backend for b in self.core.peers.values() if b.role == "backend"
        ):
            names = [
                (i.alias.id, m)
                for i, m in zip(items, media, strict=True)
                if isinstance(i, messages.Offered) and i.alias
            ]
            self.aliases |= dict(names)
            under_way = {flight.key for flight in self.core.flights}
            taken_on = len(self.core.peers[connection.identity].calls) < 65_536
            self.superseded |= {a for a, _ in names if NAMED[ALIASES.index(a)] not in under_way and taken_on}
        held = self.core.ring.holders
        flights = {flight.id for flight in self.core.flights}
        evictions = self.core.ring.stats().evictions
        self.say(connection, made)
        assert self.core.ring.stats().evictions == evictions, "an offer evicted something"
        if connection.calls[number].state == "over":
            assert self.core.ring.holders == held, "a call that is over keeps something pinned"
            assert {flight.id for flight in self.core.flights} == flights, "a call that is over opened a flight"
        return number

    @precondition(lambda self: self.wanted())
    @rule(pick=PICK, how=st.sampled_from(["right"] * 6 + ["twice", "wrong digest", "wrong size"]))
    def put(self, pick, how):
        connection, flight = self.choose(self.wanted(), pick)
        medium = connection.wants.pop(flight)
        for _ in range(1 + (how == "twice")):
            self.upload(connection.id, flight, medium, wrong=how == "wrong digest", excess=how == "wrong size")
            self.carry_out()

    @rule(frontend=st.sampled_from(FRONTENDS), back=st.integers(-1, 5), medium=st.sampled_from(MEDIA))
    def put_what_is_not_asked_of_this_frontend(self, frontend, back, medium):
        flight = max(self.core.flights._last_id - back, 0)
        if any(c.id == frontend and flight in c.wants for c in self.connections.values()):
            return
        self.upload(frontend, flight, medium)
        assert not self.core.take_actions()

    def upload(self, frontend, flight, medium, *, wrong=False, excess=False):
        put = messages.Put(frontend, flight, "blake3", bytes(31) + b"!" if wrong else medium.digest, b"")
        self.core.put(put, medium, len(medium.encoded) + excess, self.now)

    @precondition(lambda self: self.living("frontend"))
    @rule(pick=PICK, which=PICK, message=st.sampled_from([messages.Cancel, messages.Unpin]))
    def cancel_or_unpin(self, pick, which, message):
        connection = self.choose(self.living("frontend"), pick)
        if not connection.calls:
            self.say(connection, message(next(self.numbers)))
            return
        number = self.choose(sorted(connection.calls), which)
        call = connection.calls[number]
        if message is messages.Cancel or call.state == "pinned":
            call.state = "over"
        self.say(connection, message(number))

    # -- Backends ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.living("backend"))
    @rule(
        pick=PICK,
        which=PICK,
        stale=st.sampled_from([0, 0, 0, 1]),
        kind=st.sampled_from(["copy", "view"]),
    )
    def acquire(self, pick, which, stale, kind):
        taken = [*self.core.ring._directory, *self.core.ring.spills]
        entry = self.choose(taken, which) if taken else None
        slot = which if entry is None else 0 if isinstance(entry, Spill) else entry.slot
        generation = 0 if entry is None else entry.generation + stale
        self.ask(self.choose(self.living("backend"), pick), messages.Acquire, slot, generation, kind)

    @precondition(lambda self: self.leases and self.living())
    @rule(
        pick=PICK,
        which=PICK,
        what=st.sampled_from(["renew", "release", "view", "copy", "turn"]),
        quietly=st.booleans(),
    )
    def use_a_lease(self, pick, which, what, quietly):
        lease = self.choose(sorted(self.leases), which)
        owner = self.leases[lease][0]
        connection = self.choose(self.living(), pick)
        named = owner if connection.role == "frontend" else None
        may = named or connection.id == owner
        if what == "renew":
            self.ask(connection, messages.Renew, (lease,), named)
        elif what == "release":
            if may and connection.role == "backend":
                del self.leases[lease]
            if connection.role == "frontend" and lease in {known.lease_id for known in self.core.ring.leases}:
                self.given_back = lease
            if quietly:
                self.say(connection, messages.Release(0, (lease,), named))
            else:
                self.ask(connection, messages.Release, (lease,), named)
        elif connection.role == "backend" and what == "turn":
            connection.turn += 1
            self.ask(connection, messages.Retag, connection.turn)
        elif connection.role == "backend":
            self.ask(connection, messages.Upgrade, lease, what)

    @precondition(lambda self: self.living("frontend"))
    @rule(pick=PICK)
    def clear(self, pick):
        self.ask(self.choose(self.living("frontend"), pick), messages.Clear)
        assert not len(self.core.plans)
        assert not len(self.core.aliases)
        self.aliases.clear()
        self.superseded.clear()

    # -- Lanes -------------------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, LANES - 1))
    def lane_becomes_ready(self, number):
        lane = self.lanes[number]
        if lane.ready or lane.killed:
            return
        lane.ready = True
        self.carded = self.carded or all(other.ready for other in self.lanes)
        self.core.lane_ready(number, 1000 + number, CARD, self.now)
        self.carry_out()

    @precondition(lambda self: any(lane.task for lane in self.lanes))
    @rule(pick=PICK, steps=st.integers(1, 3))
    def a_lane_works(self, pick, steps):
        number = self.choose([n for n, lane in enumerate(self.lanes) if lane.task], pick)
        for _ in range(steps):
            self.work(number)

    def work(self, number):
        """Do what a sound lane does next."""
        lane = self.lanes[number]
        task = lane.task
        if task is None:
            return
        if not lane.honest:
            other = messages.Fault.of(errors.ProtocolError("the digest differs"))
            self.from_lane(number, messages.TaskFailed(task.task, other), ends=True)
        elif task.need == "plan":
            self.from_lane(number, messages.Planned(task.task), lane.medium.meta, ends=True)
        elif lane.granted is None:
            self.from_lane(number, messages.AskExtent(task.task, lane.medium.tensor_length), lane.medium.meta)
        elif isinstance(lane.granted, messages.GrantedInline):
            self.from_lane(number, messages.Inlined(task.task, 1, 1), lane.medium.tensors, ends=True)
        else:
            self.write(lane, lane.medium.extent)
            self.from_lane(number, messages.Filled(task.task, 1, 1), ends=True)

    @precondition(lambda self: any(isinstance(lane.granted, messages.GrantedSpill) for lane in self.lanes))
    @rule()
    def there_is_no_memory_for_another_segment(self):
        for number, lane in enumerate(self.lanes):
            if isinstance(lane.granted, messages.GrantedSpill) and not lane.killed:  # nothing counts that those say
                lane.granted = None
                self.from_lane(number, messages.NoSpill(lane.task.task))

    @rule(rounds=st.integers(1, 4))
    def work_goes_on(self, rounds):
        for _ in range(rounds):
            self.all_work()

    def all_work(self):
        for connection, flight in self.wanted():
            if flight in connection.wants:
                self.upload(connection.id, flight, connection.wants.pop(flight))
                self.carry_out()
        for number in range(LANES):
            self.work(number)

    @rule(
        number=st.integers(0, LANES - 1),
        what=st.sampled_from(["dies", "refuses", "finds other bytes", "breaks the protocol"]),
        how=st.sampled_from(["ask", "filled", "inlined", "no spill", "planned", "no frames", "plan too large"]),
        luck=LUCK,
    )
    def a_lane_fails(self, number, what, how, luck):
        busy = [number for number, lane in enumerate(self.lanes) if lane.task]
        number = self.choose(busy, number) if busy else number
        lane = self.lanes[number]
        if luck:
            self.all_work()
        elif what == "dies":
            self.a_lane_dies(number)
        elif lane.task and what == "breaks the protocol":
            self.a_lane_breaks_the_protocol(number, how)
        elif lane.task:
            error = errors.DecodeError("broken") if what == "refuses" else errors.ProtocolError("other bytes")
            self.from_lane(number, messages.TaskFailed(lane.task.task, messages.Fault.of(error)), ends=True)

    def a_lane_dies(self, number):
        lane = self.lanes[number]
        self.write(lane, b"\xdd" * self.room(lane))
        self.lanes[number] = Lane()
        self.core.lane_exited(number, self.now)
        self.carry_out()

    @precondition(lambda self: any(lane.killed for lane in self.lanes))
    @rule()
    def killed_lanes_exit(self):
        for number, lane in enumerate(self.lanes):
            if lane.killed:
                self.a_lane_dies(number)

    def a_lane_breaks_the_protocol(self, number, what):
        """It is killed, and nothing happens to its flight before its exit."""
        lane, task = self.lanes[number], self.lanes[number].task
        wrong = {
            "ask": (task.need == "plan" or lane.granted, messages.AskExtent(task.task, 100), [b"meta"]),
            "filled": (not self.room(lane), messages.Filled(task.task, 1, 1), []),
            "inlined": (True, messages.Inlined(task.task, 1, 1), [b"of another size"]),
            "no spill": (not isinstance(lane.granted, messages.GrantedSpill), messages.NoSpill(task.task), []),
            "planned": (task.need != "plan", messages.Planned(task.task), [b"meta"]),
            "no frames": (task.need == "plan", messages.Planned(task.task), []),
            "plan too large": (task.need == "plan", messages.Planned(task.task), [bytes(1 << 16)]),
        }
        is_wrong, message, frames = wrong[what]
        if is_wrong:
            self.from_lane(number, message, *frames)
            assert lane.killed
            assert self.core.flights[task.task].lane == number

    @rule(number=st.integers(0, LANES - 1), back=st.integers(-1, 5))
    def a_lane_speaks_of_what_it_does_not_have(self, number, back):
        task = max(self.core.flights._last_id - back, 0)
        lane = self.lanes[number]
        if lane.task is None or lane.task.task != task:
            asks = messages.AskExtent(task, 100), messages.NoSpill(task)
            ends = messages.Filled(task, 1, 1), messages.Inlined(task, 1, 1), messages.Planned(task)
            for message in (*asks, *ends):
                self.core.from_lane(number, message, [b"meta"], self.now)
                assert not self.core.take_actions()

    def from_lane(self, number, message, *frames, ends=False):
        lane = self.lanes[number]
        if ends:
            lane.task = lane.granted = lane.medium = None
        self.core.from_lane(number, message, list(frames), self.now)
        self.carry_out()

    def write(self, lane, content):
        assert len(content) == self.room(lane)
        match lane.granted:
            case messages.Granted():
                self.memory[lane.granted.offset : lane.granted.offset + len(content)] = content
            case messages.GrantedSpill():
                self.segments[lane.granted.name] = content

    def room(self, lane):
        """Return how many bytes the lane may write."""
        return lane.granted.length if isinstance(lane.granted, messages.Granted | messages.GrantedSpill) else 0

    # -- Time --------------------------------------------------------------------------------------------------------

    @rule(seconds=st.integers(0, 9))
    def time_passes(self, seconds):
        self.now += seconds
        self.core.tick(self.now)
        self.carry_out()
        assert self.core.wake_at > self.now, "the shell would spin"
        for connection in self.living():
            assert all(call.deadline > self.now for call in connection.waiting()), "a call was not told that it is late"
        alive = {lease.lease_id for lease in self.core.ring.leases}
        self.leases = {lease: known for lease, known in self.leases.items() if lease in alive}

    # -- The shell ---------------------------------------------------------------------------------------------------

    def say(self, connection, message):
        self.core.message(connection.identity, message, self.now)
        self.carry_out()

    def ask(self, connection, kind, *arguments):
        number = next(self.numbers)
        connection.asked[number] = kind
        self.say(connection, kind(number, *arguments))
        assert number not in connection.asked or not connection.open, f"{kind.__name__} was not answered"

    def carry_out(self):
        self.core.ring.take_writes()
        while actions := self.core.take_actions():
            for action in actions:
                match action:
                    case Send():
                        connection = self.connections.get(action.peer)
                        if connection is None or not connection.open:
                            self.core.unreachable(action.peer, self.now)
                            if connection is not None:
                                self.over(connection)
                        else:
                            unpack(pack(action.message), messages.FromWriter)
                            self.receive(connection, action.message, action.frames)
                    case ToLane():
                        self.lane_receives(self.lanes[action.lane], action.message, action.medium)
                    case KillLane():
                        assert not self.lanes[action.lane].killed, "a lane is killed twice"
                        self.lanes[action.lane].killed = True
                    case RemoveSegment():
                        del self.segments[action.name]

    def receive(self, connection, message, frames):
        match message:
            case messages.WriterWelcome():
                connection.cards += bool(message.card)
            case messages.Card():
                connection.cards += 1
            case messages.Refused():
                connection.open = False
                self.over(connection)
            case messages.Wants():
                call = connection.calls[message.call]
                assert call.state == "waiting"
                for want in message.wants:
                    assert self.core.flights[want.flight].key == call.offer.items[want.index].key
                    connection.wants[want.flight] = call.media[want.index]
            case messages.Answer():
                call = connection.calls[message.call]
                assert call.state == "waiting", "a second answer, or one to a call that was cancelled"
                assert message.leased_to in {None, call.offer.lease and call.offer.lease.backend}
                self.answered(call, [unpack(frame, messages.ItemAnswer) for frame in frames])
            case messages.Failed() if message.call in connection.calls:
                assert connection.calls[message.call].state == "waiting", "a second answer"
                connection.calls[message.call].state = "over"
            case messages.StillHeld():
                overdue = self.core.ring.leases.overdue_ids(connection.id)
                assert connection.role == "backend"
                assert list(message.leases) in [overdue, [self.given_back]], "asked about what is in time"
                assert all(self.core.ring.leases.get(lease).owner == connection.id for lease in message.leases)
            case _:
                kind = connection.asked.pop(message.call)
                if isinstance(message, messages.Acquired):
                    assert kind is messages.Acquire
                    self.acquired(connection, message)

    def acquired(self, connection, message):
        lease = self.core.ring.leases.get(message.lease)
        entry = self.core.ring._at(lease.slot)
        spill = entry.epoch if isinstance(entry, Spill) else None
        about = messages.ItemAnswer("hit", entry.slot, entry.offset, entry.length, entry.generation, spill=spill)
        meta = entry.meta if spill else bytes(self.memory[entry.offset : entry.offset + entry.meta_len])
        assert BY_META[meta].key == entry.key
        self.leased(message.lease, connection.id, lease.kind, about, BY_META[meta])

    def leased(self, lease, backend, kind, about, medium):
        """A lease was granted; its holder can see that it is its own."""
        process = self.current("backend", backend)
        mark = mark_of(process.pid.to_bytes(4, "big"), process.turn)
        slot = 0 if about.spill else about.slot
        assert was_granted_to(mark, lease, slot=slot, generation=about.generation, kind=kind)
        self.leases[lease] = (backend, about, medium)

    def answered(self, call, answers):
        assert len(answers) == len(call.offer.items)
        failed = any(answer.outcome == "failed" for answer in answers)
        for position, item in enumerate(call.offer.items):
            answer = answers[position]
            if answer.outcome == "failed":
                assert answer.fault is not None
                assert isinstance(item, messages.Recalled) or answer.fault.kind != "NotFound"
                continue
            medium = call.media[position] = self.found(call, item, call.media[position], answer)
            assert answer.key == (medium.key if isinstance(item, messages.Recalled) else None)
            assert answer.meta == medium.meta, "the metadata of another key"
            assert bool(answer.length or answer.inline) == (call.offer.need == "tensors")
            assert not (answer.length and answer.inline)
            if answer.times is not None:
                assert call.offer.traced, "times that nobody asked for"
                assert answer.outcome != "hit", "times of what was there"
                times = answer.times
                assert times.queued_us <= times.started_us <= times.done_us <= self.now * 1e6, "times out of order"
            assert answer.spill is None or answer.length
            leased = call.offer.lease is not None and answer.length > 0 and not failed
            assert (answer.lease is not None) == leased
            if leased:
                to = call.offer.lease
                self.leased(answer.lease, to.backend, to.kind, answer, medium)
        call.answers = answers
        inline = any(answer.inline for answer in answers)
        keeps = call.offer.need == "tensors" and (call.offer.lease is None or inline) and not failed
        call.state = "pinned" if keeps else "over"

    def found(self, call, item, medium, answer):
        """Return what an item was answered with: what was expected, or something that was injected under its name."""
        actual = BY_META[answer.meta]
        if isinstance(actual, Elsewhere):
            assert actual.key == (item.injected if isinstance(item, messages.Recalled) else item.key)
            assert item.alias not in call.superseded, "what was injected is found behind content that came later"
            assert not answer.inline, "what was sent to be kept travels"
            if isinstance(item, messages.Injected):
                self.aliases.pop(item.alias, None)
                assert self.core.aliases.get(item.alias) is None
            return actual
        assert medium is not None, "what nobody has sent was found"
        return medium

    def lane_receives(self, lane, message, medium):
        match message:
            case messages.Task():
                assert lane.ready and not lane.killed, "a task for a lane that is not there"  # noqa: PT018
                assert lane.task is None, "a second task"
                lane.task, lane.medium, lane.honest = message, medium, message.digest == medium.digest
                assert self.core.flights[message.task].key == medium.key
            case messages.Granted() | messages.GrantedSpill() | messages.GrantedInline():
                lane.granted = message
                assert not isinstance(message, messages.GrantedSpill) or message.name not in self.segments
                self.write(lane, b"\xee" * self.room(lane))
            case messages.Denied():
                lane.task = lane.granted = lane.medium = None

    # -- The model ---------------------------------------------------------------------------------------------------

    def living(self, role=None):
        return [c for c in self.connections.values() if c.open and role in {None, c.role}]

    def current(self, role, peer_id):
        return next((c for c in reversed(self.connections.values()) if (c.role, c.id) == (role, peer_id)), None)

    def wanted(self):
        return [(c, flight) for c in self.living("frontend") for flight in sorted(c.wants)]

    def over(self, connection):
        for call in connection.calls.values():
            call.state = "over"
        connection.wants.clear()

    def end_leases(self, owner):
        self.leases = {lease: known for lease, known in self.leases.items() if known[0] != owner}

    def choose(self, among, pick):
        return among[pick % len(among)]

    # -- What always holds -------------------------------------------------------------------------------------------

    @invariant()
    def every_invariant_of_the_core_holds(self):
        self.core.validate()
        for flight in self.core.flights:
            if flight.state == "queued":
                level = self.core.queue._flows[flight.id].level
                assert level.priority == flight.priority, "the queue was not told of a priority"

    @invariant()
    def each_call_that_waits_is_one_of_the_core(self):
        for connection in self.living("frontend"):
            numbers = {number for number, call in connection.calls.items() if call.state != "over"}
            assert numbers == self.core.peers[connection.identity].calls.keys()

    @invariant()
    def each_frontend_has_the_card_once_the_lanes_were_warm(self):
        for connection in self.living("frontend"):
            assert connection.cards == self.carded

    @invariant()
    def whoever_may_read_finds_the_content_of_his_key(self):
        readable = [known[1:] for known in self.leases.values()]
        for connection in self.living("frontend"):
            for call in connection.calls.values():
                if call.state == "pinned":
                    found = zip(call.answers, call.media, strict=True)
                    readable += [(answer, medium) for answer, medium in found if answer.lease is None]
        for answer, medium in readable:
            if answer.inline:
                assert self.core.tensors(answer.inline) == medium.tensors
            elif answer.spill is not None:
                assert self.segments[sibling_name(RING, answer.spill)] == medium.extent
            else:
                assert self.memory[answer.offset : answer.offset + answer.length] == medium.extent

    @invariant()
    def what_was_injected_is_gone_when_other_content_came_with_its_name(self):
        ready = {
            entry.key for entry in (*self.core.ring._directory, *self.core.ring.spills) if entry.state is State.READY
        }
        assert not ready & {NAMED[ALIASES.index(alias)] for alias in self.superseded}

    @invariant()
    def the_segments_beside_the_ring_are_those_of_its_spills(self):
        spills = list(self.core.ring.spills)
        assert self.segments.keys() == {sibling_name(RING, spill.epoch) for spill in spills}
        assert len(self.segments) == len(spills)

    @invariant()
    def the_leases_are_those_that_were_answered(self):
        assert {lease.lease_id: lease.owner for lease in self.core.ring.leases} == {
            lease: known[0] for lease, known in self.leases.items()
        }

    def teardown(self):
        """When the faults stop, everyone who waits gets his answer, and then nothing is left."""
        self.process_locks_have_fallen()
        while self.unfinished():
            self.killed_lanes_exit()
            for number in range(LANES):
                self.lane_becomes_ready(number)
            self.all_work()
            self.core.validate()
        for connection in self.living("frontend"):
            assert not connection.waiting()
            self.let_go(connection)
        for connection in self.living("backend"):
            connection.open = False
            self.bury(connection)
        self.core.validate()
        stats = self.core.ring.stats()
        assert (stats.filling, stats.leased, stats.leases) == (0, 0, 0)
        assert not self.core.ring.holders
        assert not len(self.core.transfers)
        self.core.ring.clear()
        self.carry_out()
        assert not self.segments
        assert not len(self.core.flights)
        assert not len(self.core.queue)
        assert not len(self.core.admission)

    def unfinished(self):
        busy = any(lane.task or lane.killed for lane in self.lanes)
        return busy or len(self.core.flights) > 0


WriterCoreMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=70, deadline=None, database=None)
TestWriterCoreMachine = WriterCoreMachine.TestCase
