"""The simulated network: connections between peers and the writer as ZeroMQ makes them, bulk beside them.

A connection delivers everything in order while it lasts. When it breaks, of what is under way in each direction only a random
first part arrives, both sides hear of it at different times, and the peer connects anew under a fresh identity. A peer
that does not read fills its connection, and the sender has to wait. In the *harsh* mode control messages, and those about
tensors, are dropped, doubled and reordered as well, which no transport of ours does.

:class:`Link` stands for :class:`mmprep.wire.sockets.Link`, :class:`Bulk` for the pump of a PUSH socket.
"""

from __future__ import annotations

from collections import deque

import msgpack
import zmq
from tests.simulation.world import KilledError, Violation

from mmprep.errors import MmprepError
from mmprep.wire.codec import CONTROL_LIMIT
from mmprep_worker.ring.leases import ID_SIZE

RECONNECT = 0.02
REOPEN = 0.5


def describe(frames):
    """Return a message in a few words."""
    plain = msgpack.unpackb(bytes(frames[0]))
    rest = [_item(frame) if plain[0] == "Answer" else f"+{len(frame)}" for frame in frames[1:]]
    return " ".join([plain[0], *(_word(value) for value in plain[1:6]), *rest])


def _item(frame):
    outcome, slot, _, _, generation, lease, _, _, spill, inline, *_ = msgpack.unpackb(frame)
    place = f"inline {inline}" if inline else f"slot {slot} generation {generation:x}"
    if spill is not None:
        place += f" of spill {spill[:4].hex()}"
    return f"({outcome} {place} {_word(lease)})"


def _word(value):
    if isinstance(value, bytes):
        return (value[-4:] if len(value) == ID_SIZE else value[:4]).hex()  # a lease's id ends in random bytes
    if isinstance(value, list):
        return "[" + " ".join(_word(one) for one in value[:6]) + "]"
    return str(value)


class Network:
    """All connections.

    Attributes
    ----------
    bound: the writer whose socket is bound, or ``None``.
    harsh: probability that a message is dropped, doubled, or overtaken.
    high_water: messages that a control connection holds in each direction.
    """

    def __init__(self, world, high_water):
        self.world = world
        self.high_water = high_water
        self.bound = None
        self.harsh = 0.0
        self.slow_tail = world.random.choice([0.01, 0.05, 0.2])
        self.connections = []

    def delay(self):
        random = self.world.random
        base = random.uniform(0.0002, 0.003)
        return base if random.random() > self.slow_tail else base + random.uniform(0.01, 0.25)

    def break_some(self, choose):
        """Break a connection that ``choose`` picks from those that are up."""
        up = [one for one in self.connections if one.up]
        if up:
            choose(up).break_off()

    def hold_back(self, process, seconds):
        """Let nothing through between a process and the writer for a while."""
        self.world.say(f"!! {process} and the writer do not hear each other for {seconds:.2f} s")
        for one in self.connections:
            if one.client is process and one.up:
                one.blocked_until = self.world.now + seconds


class _Message:
    __slots__ = ("frames", "lost")

    def __init__(self, frames):
        self.frames, self.lost = frames, False


class Channel:
    """One direction of a connection."""

    def __init__(self, connection, receiver, deliver):
        self.connection = connection
        self.receiver = receiver
        self.pending = deque()
        self._deliver = deliver
        self._last = 0.0

    @property
    def full(self):
        return self.connection.link.box == "control" and len(self.pending) >= self.connection.network.high_water

    def send(self, frames):
        network = self.connection.network
        world = network.world
        copies = 1
        if network.harsh and world.chance(network.harsh):
            what = world.random.choice(["drop", "double", "overtake"])
            world.say(f"!! {what}: {describe(frames)}")
            if what == "drop":
                return
            if what == "double":
                copies = 2
        else:
            what = ""
        for number in range(copies):
            when = max(world.now + network.delay(), self.connection.blocked_until)
            if what == "overtake" or number:
                when += world.random.uniform(0.0, 0.5)
            else:
                self._last = when = max(when, self._last)
            message = _Message(frames)
            self.pending.append(message)
            world.at(when - world.now, self.receiver, self._arrive, message, kind="message")

    def _arrive(self, message):
        if message.lost:
            return
        self.pending.remove(message)
        if self.connection.network.world.lines is not None:
            self.connection.network.world.say(f"{self.connection.label} {self._arrow} {describe(message.frames)}")
        self._deliver(message.frames)

    @property
    def _arrow(self):
        return "→ writer" if self.receiver.role == "writer" else "← writer"

    def cut(self):
        """Lose a random last part of what is under way."""
        keep = self.connection.network.world.random.randint(0, len(self.pending))
        for message in list(self.pending)[keep:]:
            message.lost = True
            self.pending.remove(message)


class Connection:
    """One connection of a peer to the writer; never made again."""

    def __init__(self, network, link, identity):
        self.network = network
        self.link = link
        self.client = link.process
        self.identity = identity
        self.label = identity.decode()
        self.server = None
        self.up = self.closed = False
        self.blocked_until = 0.0
        self.answered = set()
        self._waiting = []
        self.to_server = self.to_client = None
        network.connections.append(self)
        self.client.deaths.append(self.break_off)
        self._dial()

    def _dial(self):
        world = self.network.world
        server = self.network.bound
        if self.closed or not self.client.alive:
            return
        if server is None or not server.alive:
            self.client.after(RECONNECT, self._dial, kind="io")
        else:
            world.at(self.network.delay(), self.client, self._connected, server, kind="io")

    def _connected(self, server):
        if self.closed:
            return
        if not server.alive or self.network.bound is not server:
            self._dial()
            return
        self.server, self.up = server, True
        server.routes[self.identity] = self
        server.deaths.append(self.break_off)
        box = self.link.box
        self.to_server = Channel(self, server, lambda frames: server.receive(box, [self.identity, *frames]))
        self.to_client = Channel(self, self.client, self._received)
        for frames in self._waiting:
            self.to_server.send(frames)
        self._waiting.clear()

    def _received(self, frames):
        if not self.closed:
            self.link.received(self, frames)

    def send(self, frames):
        """Send to the writer; before the connection is there, messages wait."""
        if self.up:
            self.to_server.send(frames)
        elif self.server is None:
            self._waiting.append(frames)

    def break_off(self):
        """The connection is lost: both sides will hear of it."""
        if not self.up:
            return
        self.up = False
        world = self.network.world
        world.say(f"!! {self.label} loses its connection")
        self.to_server.cut()
        self.to_client.cut()
        self._forget()
        world.at(world.random.uniform(0.0, 0.3), self.client, self.link.lost, self, kind="io")
        world.at(world.random.uniform(0.0, 0.3), None, self.server.routes.pop, self.identity, None)

    def close(self):
        """The peer gives the connection up."""
        self.closed = True
        self._forget()
        if self.up:
            self.up = False
            world = self.network.world
            world.at(self.network.delay(), None, self.server.routes.pop, self.identity, None)

    def _forget(self):
        if self in self.network.connections:
            self.network.connections.remove(self)
            self.client.deaths.remove(self.break_off)
            if self.server is not None:
                self.server.deaths.remove(self.break_off)


class Link:
    """As :class:`mmprep.wire.sockets.Link`, over the simulated network.

    Attributes
    ----------
    box: where the writer gets what is sent: ``control`` or ``tensors``.
    """

    def __init__(
        self, network, process, box, name, *, greeting, on_message, on_down, frame_limit=CONTROL_LIMIT, copy=True
    ):
        self.network, self.process, self.box, self._name = network, process, box, name
        self._greeting, self._on_message, self._on_down = greeting, on_message, on_down
        self._frame_limit, self._copy = frame_limit, copy
        self.connection = None
        self._reopening = 0
        self._open()

    def send(self, frames):
        self.process.point()
        if self.connection is not None and frames:
            self.connection.send([bytes(frame) for frame in frames])

    def reopen(self):
        self.close()
        self._on_down()
        self._reopening += 1
        self.process.after(REOPEN, self._open_again, self._reopening)

    def close(self):
        self._reopening += 1
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _open_again(self, number):
        if number == self._reopening:
            self._open()

    def _open(self):
        identity = f"{self._name}:{self.network.world.random.getrandbits(32):08x}".encode()
        self.connection = Connection(self.network, self, identity)
        self.send(self._greeting())

    def lost(self, connection):
        if connection is self.connection:
            self.close()
            self._on_down()
            self._open()

    def received(self, connection, frames):
        if connection is not self.connection:
            return
        self.process.point()
        _check_one_answer(self.network, connection, frames)
        if max(map(len, frames)) > self._frame_limit:
            raise Violation(f"{self.process} takes no frame as large as those of {describe(frames)}")
        try:
            self._on_message(frames if self._copy else [zmq.Frame(frame) for frame in frames])
            self.process.validate()
        except (KilledError, Violation):
            raise
        except MmprepError as error:
            self.network.world.say(f"   {self.process} refuses a message: {error}")
        except Exception as error:
            raise Violation(f"{self.process} cannot handle {describe(frames)}: {error!r}") from error


_ANSWERS = {"Answer", "Failed", "Done", "Renewed", "Acquired", "Tensors"}


def _check_one_answer(network, connection, frames):
    plain = msgpack.unpackb(frames[0])
    if plain[0] not in _ANSWERS or network.harsh or plain[1] == 0:
        return
    if plain[1] in connection.answered:
        raise Violation(f"{connection.label} got a second answer to call {plain[1]}: {describe(frames)}")
    connection.answered.add(plain[1])


class Bulk:
    """A PUSH socket to the writer that is there at the time: late, and sometimes lost or doubled over a restart."""

    def __init__(self, network, process):
        self._network, self._process = network, process

    def send(self, frames):
        self._process.point()
        frames = [bytes(frame) for frame in frames]
        network = self._network
        network.world.at(network.delay(), None, self._arrive, frames, network.bound)

    def _arrive(self, frames, meant_for):
        network = self._network
        world, server = network.world, network.bound
        if not self._process.alive and world.chance(0.3):
            return
        if server is None or not server.alive:
            if not world.chance(0.3):
                world.at(world.random.uniform(0.02, 0.3), None, self._arrive, frames, meant_for)
            return
        copies = 2 if (server is not meant_for and world.chance(0.3)) or world.chance(network.harsh / 2) else 1
        if world.chance(network.harsh / 2):
            copies = 0
        for _ in range(copies):
            world.at(network.delay(), server, self._deliver, server, frames, kind="bulk")

    def _deliver(self, server, frames):
        if self._network.world.lines is not None:
            self._network.world.say(f"{self._process} ⇒ writer {describe(frames)}")
        server.receive("bulk", frames)

    def close(self):
        pass
