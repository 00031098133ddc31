"""One simulated run: a service of one writer, some frontends, lanes and backends, its load, its faults, and what must hold.

A run has three parts. While *faults* happen, only safety is asked for. Then they stop, and everything that is under way has
to end, and after the readers have let go nothing may be left. Then every frontend is asked for every medium, and has to
answer. At last the readers go, and the writer must hold nothing.
"""

from __future__ import annotations

import gc
import random as randoms
from collections import Counter
from dataclasses import dataclass, field

from tests.simulation.jobs import QUEUES, Ledger
from tests.simulation.memory import Medium, Oracle, Segments
from tests.simulation.network import Network
from tests.simulation.readers import Backend, Client, Frontend
from tests.simulation.seams import simulated
from tests.simulation.world import Violation, World
from tests.simulation.writer import QUARANTINE_SECONDS, Writer

from mmprep import errors
from mmprep.items import align
from mmprep.layout import PAGE, Geometry
from mmprep.segment import sibling_name
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL
from mmprep.wire.messages import HEAVY_COST
from mmprep_worker.writer.core import WriterCore

#: Seconds that a call may take beyond its deadline until its outcome is there.
GRACE = 1.0
LONGEST_CALL = 12.0
#: Seconds after which the jobs that are left must have ended when no more faults happen.
MOST_FOR_JOBS = 60.0
#: Bytes of the segment of a small item beside the ring; that of a large one has a page or two more.
SPILL = Geometry.plan(1, 1).total_size
#: Bytes of tensors that no budget takes.
VAST = 100_000
#: Kinds of faults; those that are named twice are more likely.
KINDS = ("kill", "kill", "crash", "crash", "stop", "stop", "slow", "break", "partition", "clock", "replace")


def kill_lane(writer, number):
    """What the shell does when a lane is to be killed: its exit is confirmed later."""
    lane = writer.lanes.get(number)
    if lane is not None:
        lane.kill()


@dataclass
class Settings:
    """One service; ``kinds`` are those of faults, by default some; the last ones are where planted bugs go.

    Attributes
    ----------
    spill, inline: bytes of the segments beside the ring, and of tensors on their way.
    shortage: probability that there is no memory for a spill, while faults happen.
    large: probability that a call asks for a medium that is too large for the ring.
    busy: probability that an event keeps its process so long that others wait for it together.
    jobs: how many are posted to queues while faults happen; without any, nobody pulls.
    queue_seconds: a delivery's.
    """

    arena: int = 4096
    slots: int = 8
    spill: int = 0
    inline: int = 0
    shortage: float = 0.0
    large: float = 0.2
    busy: float = 0.03
    lanes: int = 2
    lease_seconds: float = 3.0
    upload_seconds: float = 2.0
    task_seconds: float = 1.5
    queue_limit: int = 32
    outbox: int = 4096
    high_water: int = 1000
    segments: int = 2
    frontends: int = 2
    backends: int = 2
    requests: int = 26
    jobs: int = 0
    queue_seconds: float = 3.0
    fault_seconds: float = 10.0
    kinds: tuple = ()
    core: type = WriterCore
    on_kill: object = kill_lane
    spoil_frontend: object = field(default=lambda _: None)
    spoil_backend: object = field(default=lambda _: None)
    spoil_pulling: object = field(default=lambda _: None)

    @property
    def max_object_size(self):
        return Geometry.plan(self.arena, self.slots).arena_capacity // 4

    @property
    def pause(self):
        """Return seconds after which no copy lease, no late upload and no quarantine is left."""
        return max(self.lease_seconds, self.upload_seconds, QUARANTINE_SECONDS) + self.task_seconds + 3.0

    @classmethod
    def of(cls, seed, **given):
        """Return the settings of a seed."""
        random = randoms.Random(seed * 7919 + 1)
        drawn = {
            "arena": random.choice([4096, 4096, 8192]),
            "slots": random.choice([5, 8, 16]),
            "spill": random.choice([0, 1, 1, 2, 4]) * SPILL,
            "inline": random.choice([0, 700, 2500, 10_000]),
            "shortage": random.choice([0.0, 0.0, 0.3]),
            "large": random.choice([0.1, 0.3, 0.6]),
            "requests": random.choice([26, 26, 60]),
            "lanes": random.choice([1, 2, 3]),
            "lease_seconds": random.choice([1.0, 3.0]),
            "queue_limit": random.choice([4, 32, 32]),
            "outbox": random.choice([4, 4096]),
            "high_water": random.choice([3, 1000, 1000]),
            "segments": random.choice([1, 2, 2]),
            "frontends": random.choice([1, 2, 3]),
            "backends": random.choice([1, 2, 3]),
            "jobs": random.choice([0, 10, 30]),
            "queue_seconds": random.choice([1.0, 3.0]),
        }
        settings = cls(**{**drawn, **given})
        if settings.jobs:  # a frontend posts all that it keeps in one go, and reads no answer meanwhile
            settings.outbox = max(settings.outbox, settings.jobs)
        return settings


class Tally:
    """Calls, and who waits for them until when."""

    def __init__(self, world):
        self._world = world
        self._begun = 0
        self._open = {}
        self.outcomes = Counter()

    def begin(self, caller, seconds):
        self._begun += 1
        self._open[self._begun] = (caller, caller.clock() + seconds + GRACE)
        return self._begun

    def end(self, number, what):
        caller, late = self._open.pop(number)
        if caller.clock() > late and not caller.disturbed:
            raise Violation(f"{caller} was told only {caller.clock() - late + GRACE:.2f} s after its call's time")
        self.outcomes[what] += 1

    @property
    def under_way(self):
        """Return how many calls of living processes have no outcome."""
        return sum(caller.alive for caller, _ in self._open.values())


class Service:
    """Everything that is simulated in one run."""

    def __init__(self, seed, settings, *, harsh=False, log=False):
        self.seed, self.settings, self.harsh = seed, settings, harsh
        self.world = World(seed, log=log, busy=settings.busy)
        self.network = Network(self.world, settings.high_water)
        self.segments = Segments(self.world, settings.arena, settings.slots, settings.segments, settings.spill)
        self.segments.shortage = settings.shortage
        self.oracle = Oracle(self.world)
        self.tally = Tally(self.world)
        self.ledger = Ledger()
        self.faults = Counter()
        #: What happened to items that found no room in the ring.
        self.beside = Counter()
        self.calm = False
        self.media = self._make_media()
        self.by_digest = {medium.digest: medium for medium in self.media}
        self.writer = None
        self.frontends = []
        self.backends = {}
        self.client = None

    def _make_media(self):
        random, largest = self.world.random, self.settings.max_object_size
        lengths = [random.choice([64, 200, 400, 640, 800, largest - 192]) for _ in range(10)]
        self.small = [Medium(n, length, HEAVY_COST if n == 3 else 10 * n) for n, length in enumerate(lengths)]
        fates = ["fails", "breaks", "crashes", "hangs", "stalls"]
        self.bad = [Medium(10 + n, 300, 5, fate) for n, fate in enumerate(fates)]
        self.bad += [Medium(15, largest + 300, 5, "breaks"), Medium(16, VAST, 5, "too large")]
        self.large = [Medium(17 + n, length, 5) for n, length in enumerate([largest, largest + 600, PAGE + largest])]
        return [*self.small, *self.bad, *self.large]

    # --- processes ------------------------------------------------------------------------------------------------

    def start(self):
        self.client = Client(self)
        self.start_writer()
        for number in range(self.settings.frontends):
            self.frontends.append(None)
            self.start_frontend(number)
        for number in range(self.settings.backends):
            self.start_backend(f"engine-{number}")

    def start_writer(self):
        self.writer = Writer(self)
        self.writer.deaths.append(lambda: self._restart(self.start_writer))
        self.world.say(f"{self.writer} starts")

    def start_frontend(self, number):
        self.frontends[number] = Frontend(self, number)
        self.frontends[number].deaths.append(lambda: self._restart(self.start_frontend, number))

    def start_backend(self, ident):
        self.backends[ident] = Backend(self, ident)
        self.backends[ident].deaths.append(lambda: self._restart(self.start_backend, ident))

    def _restart(self, start, *args):
        self.world.at(self.world.random.uniform(0.02, 0.5), None, self._start_again, start, args)

    def _start_again(self, start, args):
        if not self.ending:
            start(*args)

    ending = False

    def started(self, lane):
        """A lane starts; some are not lucky."""
        if not self.calm and self.world.chance(0.1):
            lane.misfortune = self.world.random.choice(["crashes", "hangs", "stalls", "garbage"])

    def processes(self):
        """Return whatever may be killed or stopped."""
        lanes = list(self.writer.lanes.values()) if self.writer.alive else []
        everyone = [self.writer, self.writer, *lanes, *self.frontends, *self.backends.values()]
        return [process for process in everyone if process.alive]

    def reply_delay(self):
        """Return how long an answer takes from a frontend to whoever asked; now and then longer than a writer's restart."""
        delay = self.network.delay()
        return delay if self.calm or not self.world.chance(0.15) else delay + self.world.random.uniform(0.0, 1.5)

    # --- load -----------------------------------------------------------------------------------------------------

    def request_something(self):
        """Make one call of a random kind."""
        world, random = self.world, self.world.random
        world.at(random.expovariate(1.0) * self.settings.fault_seconds / self.settings.requests, None, self._again)
        media = tuple(random.sample(self.small, random.choice([1, 1, 1, 1, 2, 2, 3, 5])))
        if world.chance(self.settings.large):
            media = (*media[1:], random.choice(self.large))
        if world.chance(0.07):
            media = (*media, random.choice(self.bad))
        seconds = random.choice([0.3, 3.0, LONGEST_CALL, LONGEST_CALL])
        priority = random.choice([-1, 0, 0, 1])
        kind = random.choice(["copy", "view"])
        backend = self.backends[random.choice(sorted(self.backends))]
        way = random.choice(["tensors", "tensors", "plan", "lease", "own", "own", "own"])
        if way == "own":
            if backend.alive:
                backend.after(0.0, backend.begin, media, priority, kind, seconds)
        else:
            lease = messages.LeaseTo(backend.id, kind) if way == "lease" else None
            need = "plan" if way == "plan" else "tensors"
            self.client.spawn(self.client.request(media, need, priority, lease, seconds))

    def _again(self):
        if not self.calm:
            self.request_something()

    def post_something(self):
        """Post one job of a random kind."""
        world, random = self.world, self.world.random
        world.at(random.expovariate(1.0) * self.settings.fault_seconds / self.settings.jobs, None, self._post_again)
        media = tuple(random.sample(self.small, random.choice([0, 1, 1, 1, 2])))
        if world.chance(0.1):
            media = (*media, random.choice(self.large + self.bad))
        order, seconds = self.ledger.any_order(random), random.choice([0.3, 3.0, LONGEST_CALL])
        self.client.spawn(self.client.post(media, random.choice([-1, 0, 0, 1]), seconds, order))

    def _post_again(self):
        if not self.calm:
            self.post_something()

    def judge(self, error, media):
        """Whether an error may be told to a client at all."""
        if isinstance(error, errors.InternalError | errors.InvalidRequest) and not self.harsh:
            raise Violation(f"a client is told: {error!r}") from error
        if isinstance(error, errors.DecodeError) and not any(m.fate for m in media):
            raise Violation(f"a good medium is told to be bad: {error!r}")
        if isinstance(error, errors.TooLarge) and len(media) == 1 and media[0] in self.small:
            raise Violation(f"a small medium alone is told to be too large: {error!r}")

    # --- faults ---------------------------------------------------------------------------------------------------

    def do_harm(self):
        """Let one fault happen, and plan the next."""
        world, random = self.world, self.world.random
        if self.calm:
            return
        world.at(random.expovariate(1.0) * self.fault_every, None, self.do_harm)
        processes = self.processes()
        if not processes:
            return
        what = random.choice(self.kinds_of_faults)
        self.faults[what] += 1
        process = random.choice(processes)
        getattr(self, f"_{what}")(process)

    def _kill(self, process):
        process.die() if process.role != "lane" else process.kill()

    def _replace(self, _):
        """Kill a backend, which starts again under its id; the others go on."""
        living = [backend for backend in self.backends.values() if backend.alive]
        if living:
            self.world.random.choice(living).die("is replaced")

    def _crash(self, process):
        """Let a process die between two of its effects, mostly the writer."""
        process = self.world.random.choice([self.writer, self.writer, process])
        process.crash_in = self.world.random.randint(1, 40)

    def _stop(self, process):
        random = self.world.random
        process.stop()
        self.world.at(random.choice([0.05, 0.5, random.uniform(0.5, 4.0)]), None, process.go_on)

    def _slow(self, process):
        for turn in range(self.world.random.randint(3, 12)):
            self.world.at(turn * 0.1, None, process.stop)
            self.world.at(turn * 0.1 + self.world.random.uniform(0.02, 0.095), None, process.go_on)

    def _break(self, _):
        self.network.break_some(self.world.random.choice)

    def _partition(self, process):
        self.network.hold_back(process, self.world.random.uniform(0.1, 2.5))

    def _clock(self, process):
        process.pause_clock(self.world.random.uniform(0.1, 2.0))

    def calm_down(self):
        """No fault happens any more, and none goes on."""
        self.world.say("==== faults stop ====")
        self.calm = True
        self.network.harsh = 0.0
        self.network.slow_tail = 0.0
        self.segments.shortage = 0.0
        for process in [self.writer, *self.writer.lanes.values(), *self.frontends, *self.backends.values()]:
            process.crash_in = None
            process.go_on()
        for lane in self.writer.lanes.values():
            lane.misfortune = ""
        for connection in self.network.connections:
            connection.blocked_until = 0.0
        if self.harsh:
            for connection in list(self.network.connections):
                connection.break_off()

    # --- the run --------------------------------------------------------------------------------------------------

    def run(self):
        """Raise Violation where something does not hold."""
        world, random, settings = self.world, self.world.random, self.settings
        self.kinds_of_faults = settings.kinds or random.sample(KINDS, random.randint(1, 6))
        self.fault_every = random.choice([0.4, 1.0, 2.5])
        self.start()
        world.run(world.now + 1.0)
        if self.harsh:
            self.network.harsh = random.choice([0.01, 0.05, 0.15])
        self.request_something()
        if settings.jobs:
            self.post_something()
        self.do_harm()
        world.run(world.now + settings.fault_seconds)
        self.calm_down()
        self._end_calls()
        self._end_uses()
        self._end_jobs()
        world.run(world.now + settings.pause)
        self._nothing_is_left()
        self._everything_is_answered()
        self._jobs_are_done()
        self._end_readers()

    def _end_calls(self):
        self.world.run(self.world.now + LONGEST_CALL + GRACE, done=lambda: not self.tally.under_way)
        if self.tally.under_way:
            raise Violation(f"{self.tally.under_way} calls have no outcome")

    def _end_uses(self):
        for backend in self.backends.values():
            backend.leaving = True
        idle = lambda: not any(process.tasks for process in self._readers())  # noqa: E731
        self.world.run(self.world.now + 30.0, done=idle)
        if not idle():
            busy = [str(process) for process in self._readers() if process.tasks]
            raise Violation(f"there is no end to what {', '.join(busy)} does")

    def _end_jobs(self):
        """What was posted is done, by those who are left, or given up."""
        queues = lambda: self.writer.core.queues  # noqa: E731 -- the cache may start anew
        self.world.run(self.world.now + MOST_FOR_JOBS, done=lambda: not len(queues()))
        if len(queues()):
            raise Violation(f"nobody does the jobs {[job.id for job in queues().jobs]}")
        self._end_uses()
        if not self.harsh and (lost := self.ledger.lost(self.world.now)):
            raise Violation(f"jobs were accepted, and nothing is known of them: {lost}")

    def _jobs_are_done(self):
        """New jobs are done, once."""
        if not self.settings.jobs:
            return
        self.world.say("==== jobs are posted ====")
        for queue, medium in [(queue, medium) for queue in QUEUES for medium in self.small[:2]]:
            before, done = Counter(self.tally.outcomes), self.ledger.done
            self.client.spawn(self.client.post((medium,), 0, LONGEST_CALL, self.ledger.order(queue)))
            self._end_calls()
            self._end_uses()
            self._end_jobs()
            found = dict(self.tally.outcomes - before)
            if found != {"posted": 1} or self.ledger.done != done + 1:
                raise Violation(f"after the faults, a job ends with {found}, and {self.ledger.done - done} are done")
        self.world.run(self.world.now + self.settings.pause)
        self._nothing_is_left()

    def _readers(self):
        return [*self.frontends, *self.backends.values(), self.client]

    def _nothing_is_left(self):
        core = self.writer.core
        stats = core.ring.stats()
        left = {
            "calls": [call for peer in core.peers.values() for call in peer.calls],
            "calls that wait": core._waiting,
            "flights": list(core.flights),
            "queued": len(core.queue),
            "reservations": len(core.admission),
            "media": core._tasks._media,
            "pins": core.ring.holders,
            "transfers": [transfer.number for transfer in core.transfers],
            "granted bytes": stats.filling,
            "granted spills": stats.spills.filling,
            "segments": self.segments.names ^ self._segments_in_use(),
            "awaited": core.awaited,
            "outbox": self.writer._outbox.first(),
            "uses": self.oracle.in_use(),
            "deliveries": core.queues._deliveries,
            "leases": [(lease.owner, lease.kind, lease.lease_id.hex()) for lease in core.ring.leases],
        }
        for frontend in self.frontends:
            left[f"offers of {frontend}"] = len(frontend.link._offers)
            left[f"futures of {frontend}"] = frontend.link._waiting
            left[f"words of {frontend}"] = len(frontend.link._calls)
            left[f"fetches of {frontend}"] = len(frontend.link._tensors._calls)
            left[f"jobs of {frontend}"] = len(frontend.link.jobs)
            left[f"mapped by {frontend}"] = self._still_mapped(frontend)
        for backend in self.backends.values():
            left[f"holdings of {backend}"] = len(backend.registration._holdings)
            left[f"words of {backend}"] = len(backend.registration._calls)
            left[f"jobs of {backend}"] = backend.jobs and backend.jobs.pulling._held
            left[f"mapped by {backend}"] = self._still_mapped(backend)
        left = {what: found for what, found in left.items() if found}
        if left:
            raise Violation(f"left over: {left}")
        if not all(lane.ready for lane in core.lanes):
            raise Violation("not every lane is back")

    def _still_mapped(self, reader):
        """Return the segments beside the ring of today that a reader maps."""
        ring = self.writer.segment.name
        if any(name != ring for name in self.segments.mapped_by(reader)):
            reader.loop.forget_done()
            gc.collect()  # the frames of an error that was raised through a future refer to each other
        return [name for name in self.segments.mapped_by(reader) if name != ring]

    def _everything_is_answered(self):
        """New requests are answered, and the good ones with what they ask for."""
        self.world.say("==== everything is asked for ====")
        for backend in self.backends.values():
            backend.leaving = True
        for medium in self.small:
            self._ask_for([medium], ("tensors", "plan", "copy"), {"answered": 3})
        for medium in self.large:
            for way in ("tensors", "plan", "copy"):
                fits = way == "plan" or self._fits_beside(medium)
                self._ask_for([medium], (way,), {"answered" if fits else "TooLarge": 1})
        self.world.run(self.world.now + self.settings.pause)
        self._nothing_is_left()

    def _ask_for(self, media, ways, expected):
        """Make calls at once, and let go of what they give."""
        before = Counter(self.tally.outcomes)
        backend = self.backends[min(self.backends)]
        for way in ways:
            if way == "copy":
                backend.spawn(backend.request(tuple(media), 0, way, LONGEST_CALL))
            else:
                self.client.spawn(self.client.request(tuple(media), way, 0, None, LONGEST_CALL))
        self._end_calls()
        self._end_uses()
        self.world.run(self.world.now + 1.0)  # until what was let go of is released
        found = dict(self.tally.outcomes - before)
        if found != expected:
            numbers = [medium.number for medium in media]
            raise Violation(f"after the faults, requests for media {numbers} end with {found}, not {expected}")

    def _fits_beside(self, medium):
        """Whether an item that is too large for the ring can be had."""
        segment = Geometry.plan(align(len(medium.meta)) + medium.tensor_length, 1).total_size
        return segment <= self.settings.spill or medium.tensor_length <= self.settings.inline

    def _segments_in_use(self):
        """Return the names of the ring and of the spills that the writer has."""
        ring = self.writer.segment.name
        return {ring, *(sibling_name(ring, spill.epoch) for spill in self.writer.core.ring.spills)}

    def _end_readers(self):
        """The readers' locks fall, and the writer holds nothing for anybody."""
        self.world.say("==== readers go ====")
        self.ending = True
        for process in [*self.frontends, *self.backends.values()]:
            process.die()
        self.world.run(self.world.now + 2.0)
        core = self.writer.core
        held = {"leases": len(core.ring.leases), "pins": core.ring.holders, "flights": len(core.flights)}
        held["peers"] = {identity: peer for identity, peer in core.peers.items() if peer.role != "control"}
        if any(held.values()):
            raise Violation(f"held for processes that are gone: {held}")
        self._clear()

    def _clear(self):
        """Nothing is left of what nobody holds when the cache is cleared."""
        writer, desk = self.writer, b"control:desk"
        for message in (messages.Hello(PROTOCOL, "", "control", "desk", 1), messages.Clear(1)):
            writer.core.message(desk, message, writer.clock())
        writer._carry_out()
        if self.segments.names != {writer.segment.name}:
            raise Violation(f"after the cache was cleared there are segments {sorted(self.segments.names)}")
        stats = writer.core.ring.stats()
        if stats.free != stats.capacity:
            raise Violation(f"after the cache was cleared it is not empty: {stats}")


@dataclass(frozen=True)
class Outcome:
    """What a run did, or how it failed; ``jobs``: with them; ``beside``: with items that found no room in the ring; ``lines``: of the log."""

    seed: int
    events: int
    calls: Counter
    reads: int
    stale: int
    grants: int
    jobs: Counter
    beside: Counter
    faults: Counter
    failure: Violation | None
    lines: list | None


def simulate(seed, *, harsh=False, log=False, **settings):
    """Run one seed."""
    service = Service(seed, Settings.of(seed, **settings), harsh=harsh, log=log)
    failure = None
    collects = gc.isenabled()
    gc.disable()  # what a collection ends would be an event that no seed decides about
    try:
        with simulated(service):
            service.run()
    except Violation as violation:
        failure = violation
    finally:
        for loop in service.world.loops:
            loop.bury()
        if collects:
            gc.enable()
    oracle = service.oracle
    service.world.say("==== " + ("passed" if failure is None else f"FAILED: {failure}") + " ====")
    return Outcome(
        seed,
        service.world.events,
        service.tally.outcomes,
        oracle.reads,
        oracle.stale,
        oracle.grants,
        service.ledger.counts,
        service.beside,
        service.faults,
        failure,
        service.world.lines,
    )


__all__ = ["Outcome", "Settings", "simulate"]
