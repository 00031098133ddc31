"""Simulated shared memory, what is right to be in it, and who relies on which part of it.

The :class:`Oracle` knows, without asking any core, which bytes somebody reads or may still write to. It looks at every
grant.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from functools import cached_property

import msgspec
from tests.simulation.world import Violation

from mmprep import layout
from mmprep.card import ModelCard
from mmprep.errors import StaleAddress, StartupError
from mmprep.items import align
from mmprep.layout import Geometry
from mmprep.segment import sibling_name
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


#: The directory of a ring has more slots than fit into one page, so that none of its extents starts where a spill's does.
LEAST_SLOTS = 33
#: The name of a ring, up to its epoch. Spills are its siblings.
_PREFIX = "/segment"


class Segment:
    """As :class:`mmprep.segment.Segment`: one mapping of memory that lives as long as somebody has mapped it."""

    def __init__(self, name, memory, owner, mapped):
        self.name, self.size = name, len(memory)
        self.owner = owner
        self._memory = memory
        self._mapped = mapped
        mapped.add(self)

    @property
    def buffer(self):
        if self._memory is None:
            raise ValueError("the segment is closed")
        return self._memory

    def close(self):
        self._memory = None
        self._mapped.discard(self)


class Segments:
    """All segments by name: rings, and spills beside them.

    Parameters
    ----------
    arena, slots:
        Bytes of a ring, and slots of its directory that the writer uses.
    room:
        How many rings there may be at a time.
    spill_bytes:
        Of all spills, which no writer may go beyond.

    Attributes
    ----------
    shortage: probability that there is no memory for a spill.
    """

    def __init__(self, world, arena, slots, room, spill_bytes):
        self._world, self._room, self._spill_bytes = world, room, spill_bytes
        self._layout = Geometry.plan(arena, LEAST_SLOTS)
        self.geometry = self._layout._replace(slots=slots)
        self._linked = {}
        self.shortage = 0.0
        self._mapped = weakref.WeakSet()

    @property
    def names(self):
        """Return the names of all segments, those of spills too."""
        return frozenset(self._linked)

    def mapped_by(self, process):
        """Return the names of the segments that a process maps, one a mapping."""
        return sorted(segment.name for segment in self._mapped if segment.owner is process)

    def attach(self, name, *, writable=False):  # noqa: ARG002 -- as the real one
        if name not in self._linked:
            raise StaleAddress("the shared-memory segment is gone")
        return Segment(name, self._linked[name], self._world.current, self._mapped)

    def create(self, name, size):
        """Make a spill, as a lane does; raises StartupError where there is no memory."""
        if name in self._linked:
            raise Violation(f"segment {name} is made twice")
        if self._world.chance(self.shortage):
            raise StartupError("not enough shared memory")
        self._world.say(f"   segment {name} is made")
        self._linked[name] = memoryview(bytearray(size))
        spilled = sum(len(self._linked[name]) for name in self.names - self._rings().keys())
        if spilled > self._spill_bytes:
            raise Violation(f"spills have {spilled} bytes, more than {self._spill_bytes}")
        return self.attach(name)

    def unlink(self, name):
        """Remove a name, if there is such a segment."""
        if self._linked.pop(name, None) is not None:
            self._world.say(f"   segment {name} is unlinked")

    def new(self, incarnation, max_object_size):
        """As :func:`mmprep_worker.writer.opening.new_ring`."""
        if len(self._rings()) >= self._room:
            raise StartupError("not enough shared memory")
        geometry = self.geometry
        epoch = self._world.random.randbytes(layout.EPOCH_SIZE)
        name = sibling_name(f"{_PREFIX}-", epoch)
        self._linked[name] = memoryview(bytearray(geometry.total_size))
        segment = self.attach(name)
        for slot in range(self._layout.slots):
            start = geometry.record_offset(slot)
            segment.buffer[start : start + layout.RECORD_SIZE] = layout.pack_free(slot)
        segment.buffer[: layout.PAGE] = layout.pack_header(layout.Header(epoch, incarnation, self._layout))
        return segment, epoch, self._ring(incarnation, max_object_size)

    def take_over(self, max_object_size):
        """As :func:`mmprep_worker.writer.opening.open_ring`; ``None`` where nothing was left."""
        headers = self._rings()
        newest = max(headers, key=lambda name: headers[name].incarnation, default=None)
        for name in self.names - {newest}:
            self.unlink(name)
        if newest is None:
            return None
        segment, header, geometry = self.attach(newest), headers[newest], self.geometry
        ring = self._ring(header.incarnation + 1, max_object_size)
        segment.buffer[: layout.PAGE] = layout.pack_header(header._replace(incarnation=ring.incarnation))
        kept = ring.restore(segment.buffer[geometry.directory_offset :][: geometry.slots * layout.RECORD_SIZE])
        self._world.say(f"   segment {segment.name} is taken over with {kept} entries")
        return segment, header.epoch, ring

    def _ring(self, incarnation, max_object_size):
        slots = self.geometry.slots
        return Ring(self.geometry, incarnation, Clock(slots), max_object_size, spill_bytes=self._spill_bytes)

    def _rings(self):
        """Return the headers of the rings by name: a spill's is of another geometry, or not written yet."""
        headers = {}
        for name, memory in self._linked.items():
            with contextlib.suppress(ValueError):
                header = layout.unpack_header(memory[: layout.PAGE])
                if header.geometry == self._layout:
                    headers[name] = header
        return headers


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

    def removed(self, segment):
        """The writer removes a spill; whoever relies on it may not have mapped it yet."""
        for name, *_, what, valid in self._uses.values():
            if name == segment and valid():
                raise Violation(f"{segment} is removed, which is used: {what}")

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
