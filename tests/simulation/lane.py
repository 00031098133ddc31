"""A simulated lane: the protocol of :mod:`mmprep_worker.lanes.lane`, filling its extent in several steps of time.

First it scribbles over all of the extent, then it writes the content piece by piece. It is mortal at every step, and goes
on writing after it was told to die, until it does. Where it is told so, it makes a segment for the item, or sends the
tensors, on a connection of their own.
"""

from __future__ import annotations

import hashlib
from collections import deque

from tests.simulation.memory import CARD
from tests.simulation.network import describe
from tests.simulation.world import Process, Violation

from mmprep.errors import DecodeError, ProtocolError, StartupError
from mmprep.layout import PAGE, RECORD_SIZE, Geometry, Header, Record, State, pack_header, pack_record
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

    def __init__(self, world, writer, number, *, segment, segments, oracle, media):
        super().__init__(world, "lane", str(number))
        self.number, self.writer, self.token = number, writer, world.random.randbytes(32)
        self._segment, self._segments, self._oracle, self._media = segment, segments, oracle, media
        self._steps = None
        self._inbox = deque()
        self._use = None
        self._told_to_die = False
        self.misfortune = ""
        self._last_sent = {"lanes": 0.0, "lane tensors": 0.0}
        self.next_arrival = 0.0
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
        """To the writer that is there; in order on each connection, and possibly after this process's death."""
        self.point()
        box = "lane tensors" if isinstance(message, messages.Inlined) else "lanes"
        packed = [pack(message), *frames]
        if self.misfortune == "garbage" and not isinstance(message, messages.LaneReady):
            self.misfortune = ""
            wrong = [[b"\xc1"], [*packed, b"more"], [packed[0]]]
            if not isinstance(message, messages.NoSpill):  # what a lane says of memory that it was granted is believed
                wrong.append([pack(messages.Filled(message.task, 0, 0))])
            packed = self.world.random.choice(wrong)
        writer = self.writer if self.writer.alive else self.writer.network.bound
        if writer is not None:
            arrival = max(self._last_sent[box], self.world.now + self.world.random.uniform(0.0001, 0.01))
            self._last_sent[box] = arrival
            self.world.at(arrival - self.world.now, writer, writer.receive, box, [self, *packed])

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
        elif (done := (yield from self._compute(task, medium))) is not None:
            if fate == "breaks":
                self._failed(task, DecodeError("broken in the middle"))
            else:
                self.send(*done)
                self._oracle.end(self._use)

    def _compute(self, task, medium):
        """Ask where the item goes and put it there; returns what is to be said then."""
        self.send(messages.AskExtent(task.task, len(medium.tensors)), medium.meta)
        answer = yield from self._answer(task)
        segment = None
        if isinstance(answer, messages.GrantedSpill):
            segment = self._make_spill(answer)
            if segment is None:
                self.send(messages.NoSpill(task.task))
                answer = yield from self._answer(task)
        match answer:
            case messages.Granted():
                extent = self._segment.buffer[answer.offset : answer.offset + answer.length]
                yield from self._fill(medium, extent, medium.extent)
            case messages.GrantedSpill():
                yield from self._fill_spill(medium, segment, answer)
            case messages.GrantedInline():
                region = memoryview(bytearray(len(medium.tensors)))
                yield from self._fill(medium, region, medium.tensors)
                return messages.Inlined(task.task, 10, 20), bytes(region)
            case _:
                return None
        return (messages.Filled(task.task, 10, 20),)

    def _answer(self, task):
        answer = unpack((yield)[0], messages.ToLane)
        if answer.task != task.task:
            raise Violation(f"{self} is answered for task {answer.task}, while it has task {task.task}")
        return answer

    def granted(self, grant):
        """The writer has granted this lane an extent; it may write there from now on."""
        what = f"{self} may write to it for task {grant.task}"
        self._use = self._oracle.use(self._segment.name, grant.offset, grant.length, what, valid=lambda: self.alive)

    def _make_spill(self, granted):
        try:
            segment = self._segments.create(granted.name, Geometry.plan(granted.length, 1).total_size)
        except StartupError:
            self.writer.service.beside["no memory"] += 1
            return None
        self.writer.service.beside["spills"] += 1
        self.point()
        return segment

    def _fill_spill(self, medium, segment, granted):
        geometry = Geometry.plan(granted.length, 1)
        start = geometry.arena_offset
        segment.buffer[:PAGE] = pack_header(Header(granted.epoch, granted.incarnation, geometry))
        self.point()
        yield from self._fill(medium, segment.buffer[start : start + granted.length], medium.extent)
        record = Record(State.READY, 0, granted.generation, start, len(medium.meta), granted.length, granted.key)
        place = geometry.record_offset(0)
        segment.buffer[place : place + RECORD_SIZE] = pack_record(record)
        segment.close()
        self.point()

    def _fill(self, medium, room, content):
        random = self.world.random
        length = len(room)
        assert len(content) == length
        room[:] = random.randbytes(8) * (length // 8) + bytes(length % 8)
        stalls = medium.fate == "stalls" or self.misfortune == "stalls"
        for piece in range(PIECES // 2 if medium.fate == "breaks" else PIECES):
            if stalls and piece == 1:  # it is given up meanwhile, and goes on if it still can
                yield self.writer.settings.task_seconds + random.uniform(-0.1, 0.3)
            yield random.uniform(0.001, 0.03)
            start, end = (length * at // PIECES for at in (piece, piece + 1))
            room[start:end] = content[start:end]
            self.point()

    def _failed(self, task, error):
        self.send(messages.TaskFailed(task.task, messages.Fault.of(error)))
        self._oracle.end(self._use)

    def log(self, frames):
        self.world.say(f"{self} → writer {describe(frames)}")
