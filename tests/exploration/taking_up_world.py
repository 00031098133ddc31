"""One backend that takes up leases from addresses alone, the writer that grants them, and what goes between the two.

The real core of the writer and the real holdings of a reader; the reader's shell and the connection are played here. One
entry stays published all the time. A caller has a few addresses of it, leased as views, and opens them whenever he
likes: after a frontend has given them back, after they were released, in the next process under the same id. The promise:
whatever the reader believes to hold, the writer keeps for it.
"""

from __future__ import annotations

from collections import deque
from itertools import count

from mmprep.holdings import Holdings, Life
from mmprep.layout import Geometry
from mmprep.lease_id import mark_of, was_granted_to
from mmprep.metrics import Metrics
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL, unpack
from mmprep_worker.ring.policy import Clock
from mmprep_worker.ring.ring import Ring
from mmprep_worker.scheduling.admission import Admission, Quarantine
from mmprep_worker.scheduling.flights import Flights
from mmprep_worker.scheduling.job import Limits
from mmprep_worker.scheduling.queue import FairQueue
from mmprep_worker.writer.core import WriterCore
from mmprep_worker.writer.plans import PlanStore
from mmprep_worker.writer.state import Send

GEOMETRY = Geometry.plan(4096, 4)
EPOCH = bytes(16)
KEY = bytes(32)
FRONTEND = b"frontend"
ADDRESSES, PROCESSES, BREAKS = 2, 2, 1


class ForgetfulHoldings(Holdings):
    """Remembers one lease as over, and begins a new turn with the second."""

    most_over = 1


class TakingUpWorld:
    def __init__(self):
        self.numbers = count(1)
        self.core = self._new_core()
        self.addresses = []
        self.breaks = self.processes = 0
        self.alive = False
        self.entry = self._publish()
        self.core.message(FRONTEND, messages.Hello(PROTOCOL, "1", "frontend", "0", 1), 0.0)
        self.core.take_actions()
        self.do_start()
        while self.to_writer or self.to_reader:
            self.do_to_writer() if self.to_writer else self.do_to_reader()

    def _new_core(self):
        quarantine = Quarantine(max_keys=1, seconds=1.0)
        return WriterCore(
            ring=Ring(GEOMETRY, 1, Clock(GEOMETRY.slots), GEOMETRY.arena_capacity // 4),
            flights=Flights(max_waiting=4, upload_seconds=1.0, quarantine=quarantine),
            queue=FairQueue(max_items=1, max_bytes=1),
            queue_limits=Limits(jobs=1, nbytes=1, pinned=1),
            admission=Admission(max_items=1, max_bytes=1, max_items_per_client=1),
            quarantine=quarantine,
            plans=PlanStore(1),
            metrics=Metrics(),
            segment=messages.SegmentInfo("/ring", EPOCH, GEOMETRY.total_size),
            lanes=1,
            lease_seconds=1.0,
            task_seconds=1.0,
            read=lambda _, length: bytes(length),
            new_id=lambda: next(self.numbers).to_bytes(12, "little"),
        )

    def _publish(self):
        grant = self.core.ring.grant(KEY, 1, 1)
        self.core.ring.publish(grant.slot, grant.generation)
        return grant

    # --- events ---------------------------------------------------------------------------------------------------

    def events(self):
        found = [("grant",)] if self.peer() and len(self.addresses) < ADDRESSES else []
        if self.alive:
            for number, lease in enumerate(self.addresses) if self.holdings.life is not None else ():
                found += [("open", number), ("drop" if lease in self.believed else "release", number)]
            if self.holdings.turn > self.told or self.holdings._dropped:
                found.append(("upkeep",))
            found.append(("die",))
            if self.breaks < BREAKS:
                found.append(("break",))
        else:
            found += [("start",)] if self.processes < PROCESSES else []
            found += [("lock falls",)] if self.peer() else []
        found += [("give back", number) for number, lease in enumerate(self.addresses) if lease in self.table()]
        found += [("to writer",)] if self.to_writer else []
        found += [("to reader",)] if self.to_reader else []
        return [event for event in found if len(self.to_reader) < 3 or event[0] != "give back"]

    def apply(self, event):
        getattr(self, "do_" + event[0].replace(" ", "_"))(*event[1:])
        return []

    def do_grant(self):
        """A frontend offers the entry for the backend; the caller gets the address."""
        offer = messages.Offer(
            next(self.numbers),
            "tensors",
            1000,
            0,
            (messages.Offered(KEY, "image", 1, 1),),
            messages.LeaseTo("engine", "view"),
        )
        (answer,) = self.says(FRONTEND, offer)
        self.addresses.append(unpack(answer.frames[0], messages.ItemAnswer).lease)

    def do_open(self, number):
        lease = self.addresses[number]
        where = {"slot": self.entry.slot, "generation": self.entry.generation, "kind": "view"}
        good = self.holdings.adopt(lease, *where.values(), epoch=EPOCH.hex(), sent_at=0.0, sure=False)
        mine = was_granted_to(mark_of(self.instance, self.holdings.turn), lease, **where)
        right = mine and lease not in self.over | self.believed
        assert good == right, "a lease of this process is not taken up, or one that is not"
        self.believed |= {lease} if good else set()

    def do_drop(self, number):
        self.holdings.drop(self.addresses[number])
        self.believed.discard(self.addresses[number])
        self.over.add(self.addresses[number])

    #: As Backend.release, of an address that is not open.
    do_release = do_drop

    def do_upkeep(self):
        """As the reader's shell does again and again."""
        if dropped := self.holdings.take_dropped(9):
            self.to_writer.append(messages.Release(next(self.numbers), dropped))
            self.releasing[self.to_writer[-1].call] = dropped
        if self.holdings.turn > self.told:
            self.told = self.holdings.turn
            self.to_writer.append(messages.Retag(next(self.numbers), self.told))

    def do_give_back(self, number):
        """A frontend takes an address for lost that may have arrived all the same."""
        self.says(FRONTEND, messages.Release(0, (self.addresses[number],), "engine"))

    def do_die(self):
        self.alive = False
        self.believed, self.to_reader = set(), deque()

    def do_start(self):
        self.alive = True
        self.processes += 1
        self.connections = 0
        self.instance = b"process %d" % self.processes
        self.holdings = ForgetfulHoldings(self.instance)
        self.believed, self.over = set(), set()
        self._connect()

    def do_lock_falls(self):
        self.core.peer_gone("backend", "engine", 0.0)
        self.core.take_actions()

    def do_break(self):
        self.breaks += 1
        self._connect()

    def _connect(self):
        """Begin a connection; what was on its way on the one before is lost."""
        self.connections += 1
        self.identity = b"engine %d %d" % (self.processes, self.connections)
        self.told = self.holdings.turn
        hello = messages.Hello(
            PROTOCOL, "1", "backend", "engine", 1, self.instance, self.connections, self.holdings.turn
        )
        self.to_writer, self.to_reader, self.releasing = deque([hello]), deque(), {}

    def do_to_writer(self):
        self.says(self.identity, self.to_writer.popleft())

    def says(self, identity, message):
        """Let the writer hear a message; what it sends to the backend is on its way, the rest is returned."""
        self.core.message(identity, message, 0.0)
        self.core.ring.take_writes()
        sent = [action for action in self.core.take_actions() if isinstance(action, Send)]
        self.to_reader += [send.message for send in sent if self.alive and send.peer == self.identity]
        return [send for send in sent if send.peer == FRONTEND and identity == FRONTEND]

    def do_to_reader(self):
        match self.to_reader.popleft():
            case messages.WriterWelcome() as welcome:
                held = self.holdings.welcomed(Life(EPOCH.hex(), welcome.incarnation), 1.0)
                self.to_writer.append(messages.Reassert(next(self.numbers), held, True))
            case messages.StillHeld() as asked:
                self.holdings.asked(asked.leases)
                self.over |= set(asked.leases) - self.believed
            case messages.Renewed() as renewed:
                assert not renewed.lost, "the writer did not keep what is held"
            case messages.Done() as done:
                self.holdings.released(self.releasing.pop(done.call, ()))
            case other:
                raise AssertionError(f"the reader is told {other}")

    # --- what must hold -------------------------------------------------------------------------------------------

    def table(self):
        return {lease.lease_id for lease in self.core.ring.leases}

    def peer(self):
        return next((peer for peer in self.core.peers.values() if peer.role == "backend"), None)

    def check(self):
        self.core.validate()
        self.holdings.validate()
        if self.alive:
            assert self.believed <= self.table(), "the reader believes to hold what the writer does not keep"

    def canonical(self):
        names = {lease: number for number, lease in enumerate(self.addresses)}

        def plain(message):
            match message:
                case messages.Release() | messages.StillHeld():
                    return type(message).__name__, *sorted(names[lease] for lease in message.leases)
                case messages.Hello() | messages.Retag():
                    return type(message).__name__, message.turn
                case messages.Reassert():
                    return "Reassert", *sorted(names[one.lease] for one in message.leases)
            return type(message).__name__

        held, peer = self.holdings, self.peer()
        of_whom = [
            next(
                (
                    (process, turn)
                    for process in (1, 2)
                    for turn in range(8)
                    if was_granted_to(
                        mark_of(b"process %d" % process, turn),
                        lease,
                        slot=self.entry.slot,
                        generation=self.entry.generation,
                        kind="view",
                    )
                ),
            )
            for lease in self.addresses
        ]
        return (
            of_whom,
            self.alive,
            self.processes,
            self.breaks,
            peer and (peer.instance, peer.turn, peer.connected, peer.identity == self.identity),
            sorted(names[lease] for lease in self.table()),
            held.life is not None,
            (held.turn, self.told),
            sorted(names[lease] for lease in held._held),
            sorted(names[lease] for lease in held._over),
            [names[lease] for lease in held._dropped],
            sorted(names[lease] for lease in held._releasing),
            sorted(names[lease] for lease in self.over),
            [plain(message) for message in self.to_writer],
            [plain(message) for message in self.to_reader],
        )

    def probe(self):
        """When everything was opened that can be, let go of and asked about, nothing is left with the writer."""
        if not self.alive:
            self.do_start()
        self._settle()
        for number in range(len(self.addresses)):
            self.do_open(number)
            self.check()
        for number, lease in enumerate(self.addresses):
            if lease in self.believed:
                self.do_drop(number)
            self.do_give_back(number)
        self._settle()
        assert not self.table(), "a lease is left that nobody holds"

    def _settle(self):
        while True:
            self.do_upkeep()
            if self.to_writer:
                self.do_to_writer()
            elif self.to_reader:
                self.do_to_reader()
            else:
                return
            self.check()
