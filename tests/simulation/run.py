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

from tests.simulation.memory import Medium, Oracle, Segments
from tests.simulation.network import Network
from tests.simulation.readers import Backend, Client, Frontend
from tests.simulation.seams import simulated
from tests.simulation.world import Violation, World
from tests.simulation.writer import QUARANTINE_SECONDS, Writer

from mmprep import errors
from mmprep.layout import Geometry
from mmprep.wire import messages
from mmprep.wire.messages import HEAVY_COST
from mmprep_worker.writer.core import WriterCore

#: Seconds that a call may take beyond its deadline until its outcome is there.
GRACE = 1.0
LONGEST_CALL = 12.0
#: Kinds of faults; those that are named twice are more likely.
KINDS = ("kill", "kill", "crash", "crash", "stop", "stop", "slow", "break", "partition", "clock", "replace")


def kill_lane(writer, number):
    """What the shell does when a lane is to be killed: its exit is confirmed later."""
    lane = writer.lanes.get(number)
    if lane is not None:
        lane.kill()


@dataclass
class Settings:
    """One service; ``kinds`` are those of faults, by default some; the last four are where planted bugs go."""

    arena: int = 4096
    slots: int = 8
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
    fault_seconds: float = 10.0
    kinds: tuple = ()
    core: type = WriterCore
    on_kill: object = kill_lane
    spoil_frontend: object = field(default=lambda _: None)
    spoil_backend: object = field(default=lambda _: None)

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
            "lanes": random.choice([1, 2, 3]),
            "lease_seconds": random.choice([1.0, 3.0]),
            "queue_limit": random.choice([4, 32, 32]),
            "outbox": random.choice([4, 4096]),
            "high_water": random.choice([3, 1000, 1000]),
            "segments": random.choice([1, 2, 2]),
            "frontends": random.choice([1, 2, 3]),
            "backends": random.choice([1, 2, 3]),
        }
        return cls(**{**drawn, **given})


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
        self.world = World(seed, log=log)
        self.network = Network(self.world, settings.high_water)
        geometry = Geometry.plan(settings.arena, settings.slots)
        self.segments = Segments(self.world, geometry, settings.segments)
        self.oracle = Oracle(self.world)
        self.tally = Tally(self.world)
        self.faults = Counter()
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
        media = [Medium(n, length, HEAVY_COST if n == 3 else 10 * n) for n, length in enumerate(lengths)]
        fates = ["fails", "breaks", "crashes", "hangs", "stalls"]
        media += [Medium(10 + n, 300, 5, fate) for n, fate in enumerate(fates)]
        media.append(Medium(15, 2 * largest, 5, "too large"))
        return media

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
        good, bad = self.media[:10], self.media[10:]
        media = tuple(random.sample(good, random.choice([1, 1, 1, 2, 3])))
        if world.chance(0.07):
            media = (*media, random.choice(bad))
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

    def judge(self, error, media):
        """Whether an error may be told to a client at all."""
        if isinstance(error, errors.InternalError | errors.InvalidRequest) and not self.harsh:
            raise Violation(f"a client is told: {error!r}") from error
        if isinstance(error, errors.DecodeError) and not any(m.fate for m in media):
            raise Violation(f"a good medium is told to be bad: {error!r}")

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
        self.do_harm()
        world.run(world.now + settings.fault_seconds)
        self.calm_down()
        self._end_calls()
        self._end_uses()
        world.run(world.now + settings.pause)
        self._nothing_is_left()
        self._everything_is_answered()
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

    def _readers(self):
        return [*self.frontends, *self.backends.values(), self.client]

    def _nothing_is_left(self):
        core = self.writer.core
        stats = core.ring.stats()
        left = {
            "calls": [call for peer in core.peers.values() for call in peer.calls],
            "calls that wait": core._calls,
            "flights": list(core.flights),
            "queued": len(core.queue),
            "reservations": len(core.admission),
            "media": core._tasks._media,
            "pins": core.ring.holders,
            "granted bytes": stats.filling,
            "awaited": core.awaited,
            "outbox": self.writer._outbox.first(),
            "uses": self.oracle.in_use(),
            "leases": [(lease.owner, lease.kind, lease.lease_id.hex()) for lease in core.ring.leases],
        }
        for frontend in self.frontends:
            left[f"offers of {frontend}"] = len(frontend.link._offers)
            left[f"futures of {frontend}"] = frontend.link._waiting
            left[f"words of {frontend}"] = len(frontend.link._calls)
        for backend in self.backends.values():
            left[f"holdings of {backend}"] = len(backend.registration._holdings)
            left[f"words of {backend}"] = len(backend.registration._calls)
        left = {what: found for what, found in left.items() if found}
        if left:
            raise Violation(f"left over: {left}")
        if not all(lane.ready for lane in core.lanes):
            raise Violation("not every lane is back")

    def _everything_is_answered(self):
        """New requests are answered, and the good ones with what they ask for."""
        self.world.say("==== everything is asked for ====")
        for backend in self.backends.values():
            backend.leaving = True
        before = Counter(self.tally.outcomes)
        backend = self.backends[min(self.backends)]
        for medium in self.media[:10]:
            for need in ("tensors", "plan"):
                self.client.spawn(self.client.request((medium,), need, 0, None, LONGEST_CALL))
            backend.spawn(backend.request((medium,), 0, "copy", LONGEST_CALL))
            self._end_calls()
            self._end_uses()
            self.world.run(self.world.now + 1.0)  # until what was let go of is released
        self.world.run(self.world.now + self.settings.pause)
        wrong = {what: n for what, n in (self.tally.outcomes - before).items() if what != "answered"}
        if wrong:
            raise Violation(f"after the faults, good requests end with {wrong}")
        self._nothing_is_left()

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


@dataclass(frozen=True)
class Outcome:
    """What a run did, or how it failed; ``lines`` where the log was on."""

    seed: int
    events: int
    calls: Counter
    reads: int
    stale: int
    grants: int
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
        service.faults,
        failure,
        service.world.lines,
    )


__all__ = ["Outcome", "Settings", "simulate"]
