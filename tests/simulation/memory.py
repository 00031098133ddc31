"""Simulated shared memory, what is right to be in it, and who relies on which part of it.

The :class:`Oracle` knows, without asking any core, which bytes somebody reads or may still write to. It looks at every
grant.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import msgspec
from tests.simulation.world import Violation

from mmprep import layout
from mmprep.card import ModelCard
from mmprep.errors import StaleAddress, StartupError
from mmprep.items import align
from mmprep.wire import messages
from mmprep_worker.ring.policy import Clock
from mmprep_worker.ring.ring import Ring

#: What lanes tell of themselves.
CARD = msgspec.msgpack.encode(ModelCard("simulated", b"1", (), {}, {}))


class Medium:
    """One medium and what becomes of it.

    Attributes
    ----------
    fate: ``""``, or what a lane does over it: ``fails``, ``breaks`` (in the middle), ``crashes``, ``hangs``,
        ``stalls`` (while it fills).
    """

    def __init__(self, number, tensor_length, cost, fate=""):
        self.number, self.tensor_length, self.cost, self.fate = number, tensor_length, cost, fate

    @cached_property
    def key(self):
        return hashlib.sha256(b"key %d" % self.number).digest()

    @cached_property
    def encoded(self):
        return b"medium %d " % self.number + bytes(20 + self.number)

    @cached_property
    def digest(self):
        return hashlib.sha256(self.encoded).digest()

    @cached_property
    def meta(self):
        return b"meta of %d " % self.number + b"." * (7 * self.number)

    @cached_property
    def tensors(self):
        block = hashlib.sha512(self.key).digest()
        return (block * (self.tensor_length // len(block) + 1))[: self.tensor_length]

    @cached_property
    def extent(self):
        return self.meta.ljust(align(len(self.meta)), b"\0") + self.tensors


class Segment:
    """As :class:`mmprep.segment.Segment`: memory with a name, which lives as long as somebody has mapped it."""

    def __init__(self, name, size):
        self.name = name
        self.buffer = memoryview(bytearray(size))
        self.linked = True

    @property
    def size(self):
        return len(self.buffer)

    def close(self):
        pass


class Segments:
    """All segments by name.

    Parameters
    ----------
    room:
        How many there may be at a time.
    """

    def __init__(self, world, geometry, room):
        self._world, self.geometry, self._room = world, geometry, room
        self._linked = {}

    def attach(self, name, *, writable=False):  # noqa: ARG002 -- as the real one
        if name not in self._linked:
            raise StaleAddress("the shared-memory segment is gone")
        return self._linked[name]

    def unlink(self, segment):
        self._world.say(f"   segment {segment.name} is unlinked")
        del self._linked[segment.name]

    def new(self, incarnation, max_object_size):
        """As :func:`mmprep_worker.writer.opening.new_ring`."""
        if len(self._linked) >= self._room:
            raise StartupError("not enough shared memory")
        geometry = self.geometry
        epoch = self._world.random.randbytes(layout.EPOCH_SIZE)
        segment = self._linked[f"ring-{epoch[:3].hex()}"] = Segment(f"ring-{epoch[:3].hex()}", geometry.total_size)
        for slot in range(geometry.slots):
            start = geometry.record_offset(slot)
            segment.buffer[start : start + layout.RECORD_SIZE] = layout.pack_free(slot)
        segment.buffer[: layout.PAGE] = layout.pack_header(layout.Header(epoch, incarnation, geometry))
        return segment, epoch, Ring(geometry, incarnation, Clock(geometry.slots), max_object_size)

    def take_over(self, max_object_size):
        """As :func:`mmprep_worker.writer.opening.open_ring`; ``None`` where nothing was left."""
        headers = [(layout.unpack_header(s.buffer[: layout.PAGE]), s) for s in self._linked.values()]
        if not headers:
            return None
        header, segment = max(headers, key=lambda pair: pair[0].incarnation)
        for other in list(self._linked.values()):
            if other is not segment:
                self.unlink(other)
        geometry = self.geometry
        ring = Ring(geometry, header.incarnation + 1, Clock(geometry.slots), max_object_size)
        segment.buffer[: layout.PAGE] = layout.pack_header(header._replace(incarnation=ring.incarnation))
        kept = ring.restore(segment.buffer[geometry.directory_offset :][: geometry.slots * layout.RECORD_SIZE])
        self._world.say(f"   segment {segment.name} is taken over with {kept} entries")
        return segment, header.epoch, ring


class Oracle:
    """What must be true of the memory, whatever the cores think.

    Attributes
    ----------
    reads: how many reads were found right.
    stale: how many were refused as stale or lost.
    """

    def __init__(self, world):
        self._world = world
        self._uses = {}
        self._numbers = 0
        self._generations = {}
        self.reads = self.stale = self.grants = 0

    def use(self, segment, offset, length, what, *, valid=lambda: True):
        """Note that somebody relies on these bytes, or may write them, for as long as ``valid``; returns its number."""
        self._numbers += 1
        self._uses[self._numbers] = (segment, offset, offset + length, what, valid)
        return self._numbers

    def end(self, number):
        """The use is over; again is no error."""
        self._uses.pop(number, None)

    def in_use(self):
        """Return what is still used, in words."""
        return [what for *_, what, valid in self._uses.values() if valid()]

    def granted(self, segment, epoch, offset, length, generation):
        """An extent was granted."""
        self.grants += 1
        for name, start, end, what, valid in self._uses.values():
            if name == segment and start < offset + align(length) and offset < end and valid():
                raise Violation(f"[{offset}, {offset + length}) of {segment} is granted, which is used: {what}")
        if generation <= self._generations.get(epoch, -1):
            raise Violation(f"generation {generation} does not rise in its epoch")
        self._generations[epoch] = generation

    def read(self, who, medium, found, expected):
        """Somebody believes to have read a medium's content."""
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
            raise Violation(f"{who} read wrong bytes of medium {medium.number}, from byte {at} of {len(expected)} on")
        self.reads += 1


def offered(media):
    """Return what an offer says of media."""
    return tuple(messages.Offered(m.key, "image", m.cost, len(m.encoded)) for m in media)
