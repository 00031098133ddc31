"""One chaos run from start to end: service, load, faults, recovery, end, and what is left."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mmprep.chaos import backend, client, schedule
from mmprep.chaos.crew import MOST_SEEDS, Crew
from mmprep.chaos.events import Called, Event, Started
from mmprep.chaos.faults import Faults
from mmprep.chaos.schedule import Schedule
from mmprep.chaos.service import Service, left_behind, not_quiet, unbalanced
from mmprep.chaos.tally import Tally
from mmprep.errors import ServiceUnavailable

#: Small, so that something is evicted all the time; the largest pictures are nearly a quarter of it.
CACHE_MIB = 24
LEASE_SECONDS = 3.0
#: A call's time. Above what a service needs that has lost its writer while a frontend was stopped.
CALL_SECONDS = 30.0
_OPTIONS = ["--frontends", "2", "--lanes", "2", "--cache-size", f"{CACHE_MIB}MiB"]
_OPTIONS += ["--lease-seconds", f"{LEASE_SECONDS:g}s", "--log-level", "warning"]

_CLIENTS: dict[str, tuple[str, ...]] = {
    "native-shm": ("native shm",),
    "native": ("native tensors", "native none", "native shm"),
    "http": ("http tensors", "http none"),
    "http-shm": ("http shm",),
    "all": ("native shm", "native tensors", "native none", "http tensors", "http none", "http shm"),
}
_BACKENDS = 3
#: Faults never hit it: it calls every so often, whatever has become of its earlier calls.
_PROBE = "probe"
_PROBE_KINDS = ("native none", "native tensors")
_PROBE_EVERY = 0.1

_TICK = 0.05
_STATUS_EVERY = 5.0
_CALM = 3.0
_SECONDS_TO_START = 60.0
#: Beyond the time that a call may take.
_SECONDS_TO_END = 30.0
_SECONDS_TO_QUIET = 30.0


class Plan(msgspec.Struct, frozen=True):
    """How long a run is; ``every`` seconds a fault, ``shm``: also those of a full /dev/shm."""

    minutes: float
    seed: int
    every: float
    shm: bool


class Run:
    """One run.

    Parameters
    ----------
    directory:
        Empty, with a short path: sockets lie in it.
    say:
        Called with a line about what goes on.
    """

    def __init__(self, plan: Plan, directory: Path, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._directory = directory
        self._say = say
        self._started: set[str] = set()
        self._succeeded: set[str] = set()
        self.tally = Tally()
        self.circumstances: dict[str, Any] = {}

    def run(self) -> None:
        """Do it all; the tally has the result."""
        name = f"CHAOS_RUN_{os.getpid()}_{os.urandom(4).hex()}"
        environment = {name: "1"}
        service = Service(self._directory, _OPTIONS, environment)
        try:
            service.wait_ready()
            with Crew(environment) as crew:
                self._man(crew, service.port, str(service.runtime_dir))
                self._wait_until(service, crew, lambda: self._all_in(self._started, crew), _SECONDS_TO_START, "start")
                self._load(service, crew, _CALM)
                self._torment(service, crew)
                self._recover(service, crew)
                self._dismiss(crew)
            self._come_to_rest(service)
            self._end(service, f"{name}=1")
        finally:
            if service.process.poll() is None:
                service.kill()
        self.tally.judge()
        if found := service.tracebacks():
            self.tally.unexpected.append(f"{found} tracebacks in the service's log")

    # --- the load -------------------------------------------------------------------------------------------------

    def _man(self, crew: Crew, port: int, runtime_dir: str) -> None:
        sockets = {f"chaos-backend-{number}": str(self._directory / f"b{number}") for number in range(_BACKENDS)}
        first = self._plan.seed * 1000 % (MOST_SEEDS - 1000)
        seeds = iter(range(first + 1, first + 1000))
        for name, socket in sockets.items():
            crew.add(name, "backend", backend.Orders(name, next(seeds), runtime_dir, socket, LEASE_SECONDS))
        for short, kinds in _CLIENTS.items():
            name = f"chaos-{short}"
            orders = client.Orders(name, next(seeds), runtime_dir, port, kinds, CALL_SECONDS, backends=sockets)
            crew.add(name, "client", orders)
        orders = client.Orders(
            _PROBE, next(seeds), runtime_dir, port, _PROBE_KINDS, CALL_SECONDS, in_flight=0, pace=_PROBE_EVERY
        )
        crew.add(_PROBE, "probe", orders)

    def _hear(self, crew: Crew) -> None:
        """Enter all that has been said, and wait a moment for more."""
        end = time.monotonic() + _TICK
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._enter(*crew.heard.get(timeout=left))

    def _enter(self, source: str, event: Event) -> None:
        self.tally.event(source, event)
        if isinstance(event, Started):
            self._started.add(source)
        elif isinstance(event, Called) and event.outcome == "ok":
            self._succeeded.add(source)

    def _wait_until(self, service: Service, crew: Crew, met: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not met():
            if time.monotonic() > end:
                self.tally.stuck(f"the processes of the load did not {what} within {seconds:g} s")
                return
            self._hear(crew)
            _check_alive(service)

    @staticmethod
    def _all_in(names: set[str], crew: Crew, *roles: str) -> bool:
        return names >= {member.name for member in crew.members if not roles or member.role in roles}

    def _load(self, service: Service, crew: Crew, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._hear(crew)
            _check_alive(service)

    # --- faults ---------------------------------------------------------------------------------------------------

    def _torment(self, service: Service, crew: Crew) -> None:
        plan, began = self._plan, time.monotonic()
        planned = Schedule(plan.seed, schedule.kinds(shm=plan.shm))
        faults = Faults(service, crew, self.tally.fault)
        next_fault = began
        looking = threading.Event()
        watch = threading.Thread(target=self._look, args=(service, looking))
        watch.start()
        try:
            while (now := time.monotonic()) < began + plan.minutes * 60:
                if now >= next_fault:
                    fault = planned.next()
                    done = faults.commit(fault)
                    self._say(f"{now - began:7.1f} s  {fault.kind}{'' if done else ': nobody there'}")
                    next_fault += plan.every
                faults.tick(time.monotonic())
                self._replace_the_dead(crew)
                self._hear(crew)
                _check_alive(service)
        finally:
            faults.end()
            looking.set()
            watch.join()

    def _replace_the_dead(self, crew: Crew) -> None:
        for name in crew.replace_the_dead():
            self.tally.unexpected.append(f"{name} broke; its message is on standard error")

    def _look(self, service: Service, enough: threading.Event) -> None:
        """Check now and then what must hold at any moment."""
        while not enough.wait(_STATUS_EVERY):
            with contextlib.suppress(ServiceUnavailable):  # no answer in time, while something is stopped
                ring = service.status().get("ring")
                for wrong in unbalanced(ring) if ring else []:
                    self.tally.leak(wrong)

    # --- afterwards -----------------------------------------------------------------------------------------------

    def _recover(self, service: Service, crew: Crew) -> None:
        """Every client must get an answer that began after the last fault."""
        self._say("no more faults")
        self._replace_the_dead(crew)
        self._load(service, crew, 1.0)
        self._succeeded.clear()
        clients = ("client", _PROBE)
        self._wait_until(
            service,
            crew,
            lambda: self._all_in(self._succeeded, crew, *clients),
            CALL_SECONDS,
            "all get an answer after the last fault",
        )

    def _dismiss(self, crew: Crew) -> None:
        """Tell the clients to end, then the backends; each must have had an outcome of every call."""
        for roles in (("client", _PROBE), ("backend",)):
            members = [member for member in crew.members if member.role in roles]
            for member in members:
                member.stop()
            end = time.monotonic() + CALL_SECONDS + client.PATIENCE + _SECONDS_TO_END
            while time.monotonic() < end and not all(member.gone() for member in members):
                self._hear(crew)
            self._hear(crew)
            for member in members:
                if not member.ended:
                    self.tally.stuck(f"{member.name} did not come to its end")

    def _come_to_rest(self, service: Service) -> None:
        """Nothing may be leased, pinned, filling or under way once all have left."""
        self._say("everybody has left")
        held = ["mmprep status does not answer"]
        end = time.monotonic() + _SECONDS_TO_QUIET
        while time.monotonic() < end and service.process.poll() is None:
            with contextlib.suppress(ServiceUnavailable):
                status = service.status()
                held = not_quiet(status)
                if not held:
                    self.circumstances["evictions of the last writer"] = status["ring"]["evictions"]
                    return
            time.sleep(0.2)
        for what in held:
            self.tally.leak(f"after everybody had left: {what}")

    def _end(self, service: Service, mark: str) -> None:
        status = service.stop()
        if status != 0:
            self.tally.leak("the service had to be killed" if status is None else f"the service ended with {status}")
        # Children of a process that has just ended may need a moment.
        end = time.monotonic() + 1.0
        while (left := list(left_behind(service.runtime_dir, service.runtime_id, mark))) and time.monotonic() < end:
            time.sleep(_TICK)
        for what in left:
            self.tally.leak(f"after the service's end: {what}")


def _check_alive(service: Service) -> None:
    status = service.process.poll()
    if status is not None:
        last = service.log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        raise ServiceUnavailable(f"the service ended by itself, with status {status}; its log ends: {last[:300]}")
