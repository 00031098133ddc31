"""Where the real shells of readers meet the simulated world.

:class:`mmprep.registration.Registration`, :class:`mmprep.pulling.Pulling`, :class:`mmprep_frontend.dispatch.WriterLink` and
:class:`mmprep_frontend.tensors.TensorLink` run as they are. What they reach the outside with is replaced for the time of
a run: sockets, process locks, shared memory, clock, random source.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

from tests.simulation import network
from tests.simulation.jobs import plain_meta

from mmprep import pulling, registration
from mmprep.holdings import Holdings
from mmprep_frontend import dispatch, tensors

#: Coarser than the real one, so that a run takes less time.
UPKEEP_SECONDS = 0.2
#: Fewer than the real ones, so that a run comes to more than one turn.
MOST_OVER = 8


class Lock:
    """As :class:`mmprep.process_lock.ProcessLock`, of the process that is running."""

    def __init__(self, world, path):
        self._world, self._path, self._process = world, path, world.current

    def acquire(self):
        return self._process.take_lock(self._path)

    def note(self, data):
        self._world.notes[self._path] = data

    def remove(self):
        if self._world.locks.get(self._path) is self._process:
            del self._world.locks[self._path]


class Runtime:
    """As much of a :class:`mmprep.runtime.RuntimeDir` as readers use."""

    writer = "control"
    writer_bulk = "bulk"
    tensors = "tensors"

    def lock_path(self, role, ident):
        return role, ident


class Context:
    """As much of a ZeroMQ context as readers use."""

    def socket(self, _):
        return SimpleNamespace(connect=lambda _: None)


@contextlib.contextmanager
def simulated(service):
    """Let the readers' shells run in the simulated world of ``service``."""
    world, net = service.world, service.network

    def link(_context, endpoint, name, **options):
        return network.Link(net, world.current, endpoint, name, **options)

    def now():
        return world.current.clock()

    outside = SimpleNamespace(urandom=world.random.randbytes, getpid=lambda: world.current.pid)
    replaced = {
        registration: {
            "Link": link,
            "ProcessLock": lambda path: Lock(world, path),
            "Segment": service.segments,
            "time": SimpleNamespace(monotonic=now),
            "os": outside,
            "_UPKEEP_SECONDS": UPKEEP_SECONDS,
        },
        pulling: {"time": SimpleNamespace(monotonic=now), "unpack_meta": plain_meta},
        Holdings: {"most_over": MOST_OVER},
        dispatch: {
            "Link": link,
            "ProcessLock": lambda path: Lock(world, path),
            "holder": world.locks.get,
            "configure": lambda _: None,
            "Pump": lambda *_, **__: network.Bulk(net, world.current),
            "os": outside,
        },
        tensors: {"Link": link, "os": outside},
    }
    former = {place: {name: getattr(place, name) for name in names} for place, names in replaced.items()}
    try:
        for place, names in replaced.items():
            for name, value in names.items():
                setattr(place, name, value)
        yield
    finally:
        for place, names in former.items():
            for name, value in names.items():
                setattr(place, name, value)
