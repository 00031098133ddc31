"""The simulated machine: one clock, one random source, processes with locks, and an event loop for each of them.

Everything that happens is an event on one heap, in the order of time and then of arrival, so a seed says all. An event
belongs to a process: a dead one's are dropped, those of a stopped one wait until it goes on, and those of one that is busy
for some milliseconds until it is not. Then its timers and what it received run in a random interleaving, each kind in its
own order, as a process that wakes up sees both at once; and only then whatever they woke up.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
from collections import deque

#: Events after which a run is taken for one that never ends.
MOST_EVENTS = 400_000
MOST_TASKS = 256
#: For how long at most an event keeps its process busy, in seconds.
BUSY_SECONDS = 0.01


class Violation(AssertionError):
    """A property does not hold."""


class KilledError(BaseException):
    """The process died in the middle of what it was doing; it never sees this."""


class World:
    """One run.

    Parameters
    ----------
    seed:
        Of everything.
    log:
        Whether to keep readable lines of all that happens.
    busy:
        Probability that an event keeps its process busy.
    """

    def __init__(self, seed, *, log=False, busy=0.0):
        self.busy = busy
        self.random = random.Random(seed)
        self.now = 1000.0
        self.lines = [] if log else None
        self.locks = {}
        #: What is written into the files of locks; it stays there.
        self.notes = {}
        self.current = None
        self.failure = None
        self.events = 0
        self.loops = []
        self._heap = []
        self._serial = 0
        self._pids = 100

    def say(self, text):
        if self.lines is not None:
            self.lines.append(f"{self.now - 1000:9.4f}  {text}")

    def chance(self, probability):
        return self.random.random() < probability

    def new_pid(self):
        self._pids += 1
        return self._pids

    def at(self, delay, owner, call, *args, kind="timer"):
        """Call ``call(*args)`` after ``delay`` seconds, as an event of the process ``owner``, or of the world (None)."""
        self._serial += 1
        heapq.heappush(self._heap, (self.now + max(delay, 0.0), self._serial, owner, call, args, kind))

    def run(self, until, *, done=lambda: False):
        """Let time pass until a moment, or until ``done()``, which is looked at after each event."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            when, _, owner, call, args, kind = heapq.heappop(heap)
            self.now = max(self.now, when)
            if owner is not None:
                if not owner.alive:
                    continue
                if owner.stopped or owner.busy:
                    owner.backlog.append((call, args, kind))
                    continue
            self.events += 1
            if self.events > MOST_EVENTS:
                raise Violation(f"there is no end: {MOST_EVENTS} events")
            if owner is not None and owner.loop is not None and kind != "soon" and self.busy and self.chance(self.busy):
                owner.work(self.random.uniform(0.0, BUSY_SECONDS))
            self._do(owner, call, args)
            if done():
                return
        self.now = max(self.now, until)

    def _do(self, owner, call, args):
        former, self.current = self.current, owner
        loop = None if owner is None else owner.loop
        if loop is not None:
            asyncio._set_running_loop(loop)
        try:
            call(*args)
        except KilledError:
            pass
        finally:
            self.current = former
            if loop is not None:
                asyncio._set_running_loop(None)
        if self.failure is not None:
            raise self.failure


class Process:
    """A simulated process.

    Attributes
    ----------
    crash_in: after how many more points (see :meth:`point`) it dies, or ``None``.
    disturbed: it was stopped at some time, so nobody may ask it to be in time.
    lag: how far its clock is behind, because it stood still.
    """

    def __init__(self, world, role, ident):
        self.world = world
        self.role, self.id, self.pid = role, ident, world.new_pid()
        self.alive, self.stopped, self.busy, self.disturbed = True, False, False, False
        self.backlog = []
        self.crash_in = None
        self.lag = 0.0
        self.loop = None
        self.deaths = []
        self._frozen_at = None

    def __str__(self):
        return f"{self.role} {self.id}({self.pid})"

    def clock(self):
        """Return monotonic seconds as this process sees them."""
        return (self.world.now if self._frozen_at is None else self._frozen_at) - self.lag

    @property
    def clock_is_right(self):
        """Whether its clock has never stood still."""
        return not self.lag and self._frozen_at is None

    def after(self, delay, call, *args, kind="timer"):
        self.world.at(delay, self, call, *args, kind=kind)

    def point(self):
        """A place between two effects, at which the process may die."""
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in <= 0:
                self.die("in the middle of a step")
                raise KilledError

    def validate(self):
        """Check the invariants of its cores."""

    def take_lock(self, path):
        if self.world.locks.get(path) not in {None, self}:
            return False
        self.world.locks[path] = self
        return True

    def die(self, why="is killed"):
        """End at once; the kernel lets go of the locks."""
        if not self.alive:
            return
        self.world.say(f"!! {self} {why}")
        self.alive = False
        self.backlog.clear()
        for path in [path for path, holder in self.world.locks.items() if holder is self]:
            del self.world.locks[path]
        for told in list(self.deaths):
            told()

    def stop(self):
        if self.alive and not self.stopped:
            self.world.say(f"!! {self} is stopped")
            self.stopped = self.disturbed = True

    def go_on(self):
        if not (self.alive and self.stopped):
            return
        self.world.say(f"!! {self} goes on")
        self.stopped = False
        if not self.busy:
            self._catch_up()

    def work(self, seconds):
        """Look at no other event for a while."""
        self.busy = True
        self.world.at(seconds, None, self._worked)

    def _worked(self):
        self.busy = False
        if self.alive and not self.stopped:
            self._catch_up()

    def _catch_up(self):
        kinds = {}
        for event in self.backlog:
            kinds.setdefault(event[2], deque()).append(event)
        self.backlog.clear()
        queues = list(kinds.values())
        while queues:
            queue = self.world.random.choice(queues)
            call, args, kind = queue.popleft()
            self.after(0.0, call, *args, kind=kind)
            if not queue:
                queues.remove(queue)

    def pause_clock(self, seconds):
        """Let its clock stand still for a while; it stays behind afterwards."""
        if self._frozen_at is None:
            self.world.say(f"!! the clock of {self} stands still for {seconds:.2f} s")
            self._frozen_at = self.world.now
            self.world.at(seconds, None, self._clock_goes_on)

    def _clock_goes_on(self):
        self.lag += self.world.now - self._frozen_at
        self._frozen_at = None


class Loop(asyncio.AbstractEventLoop):
    """The event loop of one simulated process: real tasks and futures, simulated time."""

    def __init__(self, process):
        self._process = process
        self._tasks = []
        process.world.loops.append(self)

    def time(self):
        return self._process.clock()

    def call_soon(self, callback, *args, context=None):
        handle = asyncio.Handle(callback, args, self, context)
        self._process.after(0.0, self._run, handle, kind="soon")
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay, callback, *args, context=None):
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when, callback, *args, context=None):
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._process.after(when - self.time(), self._due, handle)
        return handle

    def _due(self, handle):
        if handle.when() > self.time() + 1e-9 and not handle.cancelled():
            self._process.after(max(0.01, handle.when() - self.time()), self._due, handle)
        else:
            self._run(handle)

    @staticmethod
    def _run(handle):
        if not handle.cancelled():
            handle._run()

    def create_future(self):
        return asyncio.Future(loop=self)

    def create_task(self, coro, *, name=None, context=None):
        if len(self._tasks) > MOST_TASKS:
            self.forget_done()
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.append(task)
        return task

    def forget_done(self):
        """Let go of the tasks that have ended, and of what their errors refer to."""
        self._tasks = [task for task in self._tasks if not task.done()]

    def bury(self):
        """End the coroutines that will never go on, so that nothing of them is heard later."""
        for task in self._tasks:
            task._log_destroy_pending = False
            with contextlib.suppress(BaseException):
                task.get_coro().close()
        self._tasks.clear()

    def get_debug(self):
        return False

    def is_running(self):
        return True

    def is_closed(self):
        return not self._process.alive

    def _timer_handle_cancelled(self, handle):
        pass

    def call_exception_handler(self, context):
        """An exception that nothing caught: of a living process that is a finding."""
        error = context.get("exception")
        if isinstance(error, KilledError) or not self._process.alive or error is None:
            return
        world = self._process.world
        if world.failure is None:
            failure = Violation(f"{self._process}: {context.get('message')}: {error!r}")
            failure.__cause__ = error
            world.failure = failure
