"""A simulated lane: the protocol of :mod:`mmprep_worker.lanes.lane`, filling its extent in several steps of time.

First it scribbles over all of the extent, then it writes the content piece by piece. It is mortal at every step, and goes
on writing after it was told to die, until it does.
"""

from __future__ import annotations

import hashlib
from collections import deque

from tests.simulation.memory import CARD
from tests.simulation.network import describe
from tests.simulation.world import Process

from mmprep.errors import DecodeError, ProtocolError
from mmprep.wire import messages
from mmprep.wire.codec import pack, unpack

PIECES = 4


class Lane(Process):
    """One lane process of one writer.

    Parameters
    ----------
    media:
        By digest.
    """

    def __init__(self, world, writer, number, *, segment, oracle, media):
        super().__init__(world, "lane", str(number))
        self.number, self.writer, self.token = number, writer, world.random.randbytes(32)
        self._segment, self._oracle, self._media = segment, oracle, media
        self._steps = None
        self._inbox = deque()
        self._use = None
        self._told_to_die = False
        self.misfortune = ""
        self._last_sent = self.next_arrival = 0.0
        self.after(world.random.uniform(0.01, 0.05), self._start)

    def kill(self):
        """SIGKILL: it takes a moment, in which the process may still do something."""
        if self.alive and not self._told_to_die:
            self._told_to_die = True
            random = self.world.random
            self.world.at(random.choice([0.0, 0.001, random.uniform(0, 0.05), random.uniform(0, 0.4)]), None, self.die)

    def die(self, why="is gone"):
        if self.alive:
            super().die(why)
            self._oracle.end(self._use)

    def parent_died(self):
        """The kernel kills it, or it finds its orders closed, unless it is too young for either."""
        if self._steps is not None or self.world.chance(0.5):
            self.kill()

    def _start(self):
        if not self.take_lock(("lane", self.id)):
            self.die("finds its lock held, and ends")
            return
        self._steps = self._live()
        self._go(None)

    def _go(self, value):
        """Run until the next wait: for a number of seconds, or for a message."""
        try:
            wait = self._steps.send(value)
        except StopIteration:
            self.die("ends")
            return
        if wait is None:
            if self._inbox:
                self.after(0.0, self._go, self._inbox.popleft())
            else:
                self._inbox = None
        else:
            self.after(wait, self._go, None)

    def receive(self, frames):
        if self._inbox is None:
            self._inbox = deque()
            self._go(frames)
        else:
            self._inbox.append(frames)

    def send(self, message, *frames):
        """To the writer that is there; in order, and possibly after this process's death."""
        packed = [pack(message), *frames]
        if self.misfortune == "garbage" and not isinstance(message, messages.LaneReady):
            self.misfortune = ""
            packed = self.world.random.choice(
                [[b"\xc1"], [*packed, b"more"], [pack(messages.Filled(message.task, 0, 0))], [packed[0]]]
            )
        writer = self.writer if self.writer.alive else self.writer.network.bound
        if writer is not None:
            self._last_sent = max(self._last_sent, self.world.now + self.world.random.uniform(0.0001, 0.01))
            self.world.at(self._last_sent - self.world.now, writer, writer.receive, "lanes", [self, *packed])

    def _live(self):
        random = self.world.random
        if not self.writer.alive:
            return
        yield random.uniform(0.05, 0.4)
        self.send(messages.LaneReady(self.number, self.token, CARD))
        while True:
            frames = yield
            if not self.writer.alive:
                return
            task = unpack(frames[0], messages.Task)
            yield from self._work(task, frames[1])
            self.misfortune = ""

    def _work(self, task, encoded):
        random = self.world.random
        if hashlib.sha256(encoded).digest() != task.digest:
            self._failed(task, ProtocolError("the medium's bytes do not match their digest"))
            return
        medium = self._media[task.digest]
        fate = medium.fate or self.misfortune
        self.misfortune = fate if fate in {"garbage", "stalls"} else ""
        yield random.uniform(0.002, 0.08)
        if fate == "crashes":
            self.die("crashes")
            yield 0.0
        if fate == "hangs":
            yield 1e6
        if fate == "fails":
            self._failed(task, DecodeError("no picture"))
            return
        if task.need == "plan":
            self.send(messages.Planned(task.task), medium.meta)
            return
        self.send(messages.AskExtent(task.task, len(medium.tensors)), medium.meta)
        answer = unpack((yield)[0], messages.ToLane)
        if answer.task != task.task or not isinstance(answer, messages.Granted):
            return
        yield from self._fill(medium, answer)
        if fate == "breaks":
            self._failed(task, DecodeError("broken in the middle"))
            return
        self.send(messages.Filled(task.task, 10, 20))
        self._oracle.end(self._use)

    def granted(self, grant):
        """The writer has granted this lane an extent; it may write there from now on."""
        what = f"{self} may write to it for task {grant.task}"
        self._use = self._oracle.use(self._segment.name, grant.offset, grant.length, what, valid=lambda: self.alive)

    def _fill(self, medium, granted):
        random = self.world.random
        extent = self._segment.buffer[granted.offset : granted.offset + granted.length]
        assert len(medium.extent) == granted.length
        extent[:] = random.randbytes(8) * (granted.length // 8) + bytes(granted.length % 8)
        stalls = medium.fate == "stalls" or self.misfortune == "stalls"
        for piece in range(PIECES // 2 if medium.fate == "breaks" else PIECES):
            if stalls and piece == 1:  # it is given up meanwhile, and goes on if it still can
                yield self.writer.settings.task_seconds + random.uniform(-0.1, 0.3)
            yield random.uniform(0.001, 0.03)
            start, end = (granted.length * at // PIECES for at in (piece, piece + 1))
            extent[start:end] = medium.extent[start:end]

    def _failed(self, task, error):
        self.send(messages.TaskFailed(task.task, messages.Fault.of(error)))
        self._oracle.end(self._use)

    def log(self, frames):
        self.world.say(f"{self} → writer {describe(frames)}")
