"""How a writer comes by its ring: a new segment, or that of the writer before it.

A writer that takes over first ends the lanes of the one before: until their locks are free they may be writing. Then it
believes the directory as far as :mod:`~mmprep_worker.ring.recovery` says. The processes that live and may hold something
of it have to say so before anything is granted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from typing import NamedTuple

from mmprep import failpoints, layout
from mmprep.errors import MmprepError, ServiceUnavailable
from mmprep.runtime import RuntimeDir
from mmprep.segment import Segment, segment_name, segments_of, unlink
from mmprep_worker.ring.policy import Clock
from mmprep_worker.ring.ring import Ring
from mmprep_worker.writer.core import READERS

_log = logging.getLogger("mmprep.writer")

_LANES_SECONDS = 10.0
_LOOK_AGAIN = 0.01


class Opened(NamedTuple):
    """A ring and its segment.

    Attributes
    ----------
    awaited: the living readers, as roles and ids, that have to say what they hold of it.
    """

    segment: Segment
    epoch: bytes
    ring: Ring
    awaited: tuple[tuple[str, str], ...]


def open_ring(runtime: RuntimeDir, geometry: layout.Geometry, max_object_size: int, spill_bytes: int) -> Opened:
    """Take over the ring of an earlier writer of this service, or make one.

    Parameters
    ----------
    geometry:
        Of the ring as it is set up; one of another geometry is not taken over. Nor are spills: their names go.
    max_object_size, spill_bytes:
        As for :class:`~mmprep_worker.ring.ring.Ring`.

    Raises
    ------
    StartupError
        There is not enough shared memory.
    ServiceUnavailable
        Lanes of the earlier writer do not end.
    """
    _end_lanes(runtime)
    failpoints.reach("writer.lanes.ended")
    found = _newest(runtime, geometry)
    failpoints.reach("writer.ring.chosen")
    for name in segments_of(runtime.runtime_id):
        if found is None or name != found[0].name:
            unlink(name)
    failpoints.reach("writer.others.removed")
    if found is None:
        return new_ring(runtime, geometry, max_object_size, 1, spill_bytes)
    segment, header = found
    ring = Ring(geometry, header.incarnation + 1, Clock(geometry.slots), max_object_size, spill_bytes=spill_bytes)
    segment.buffer[: layout.PAGE] = layout.pack_header(header._replace(incarnation=ring.incarnation))
    failpoints.reach("writer.ring.claimed")
    kept = ring.restore(segment.buffer[geometry.directory_offset :][: geometry.slots * layout.RECORD_SIZE])
    failpoints.reach("writer.ring.restored")
    awaited = tuple((holder.role, holder.id) for holder in runtime.holders() if holder.role in READERS)
    _log.warning("the ring of the writer before is taken over with %d entries", kept)
    return Opened(segment, header.epoch, ring, awaited)


def new_ring(
    runtime: RuntimeDir, geometry: layout.Geometry, max_object_size: int, incarnation: int, spill_bytes: int
) -> Opened:
    """Make a segment with an empty ring; raises StartupError where there is not enough shared memory."""
    epoch = os.urandom(layout.EPOCH_SIZE)
    failpoints.reach("writer.segment.before")
    segment = Segment.create(segment_name(runtime.runtime_id, epoch), geometry.total_size)
    failpoints.reach("writer.segment.made")
    for slot in range(geometry.slots):
        start = geometry.record_offset(slot)
        segment.buffer[start : start + layout.RECORD_SIZE] = layout.pack_free(slot)
    segment.buffer[: layout.PAGE] = layout.pack_header(layout.Header(epoch, incarnation, geometry))
    failpoints.reach("writer.segment.ready")
    ring = Ring(geometry, incarnation, Clock(geometry.slots), max_object_size, spill_bytes=spill_bytes)
    return Opened(segment, epoch, ring, ())


def _end_lanes(runtime: RuntimeDir) -> None:
    """Kill the lanes of an earlier writer and wait until the kernel has released their locks."""
    deadline = time.monotonic() + _LANES_SECONDS
    while lanes := [holder for holder in runtime.holders() if holder.role == "lane"]:
        if time.monotonic() > deadline:
            raise ServiceUnavailable("lanes of the writer before do not end")
        for lane in lanes:
            if lane.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(lane.pid, signal.SIGKILL)
        time.sleep(_LOOK_AGAIN)


def _newest(runtime: RuntimeDir, geometry: layout.Geometry) -> tuple[Segment, layout.Header] | None:
    """Return the ring of the last writer, mapped: that of the highest incarnation, should there be several."""
    best: tuple[Segment, layout.Header] | None = None
    for name in segments_of(runtime.runtime_id):
        try:
            segment = Segment.attach(name, writable=True)
        except MmprepError:
            continue
        try:
            header = layout.unpack_header(segment.buffer[: layout.PAGE])
        except ValueError as error:
            _log.warning("segment %s is not taken over: %s", name, error)
            segment.close()
            continue
        fits = header.geometry == geometry and segment.size == geometry.total_size
        if not fits or header.incarnation >= layout.MAX_INCARNATION:
            segment.close()
        elif best is None or best[1].incarnation < header.incarnation:
            if best is not None:
                best[0].close()
            best = segment, header
        else:
            segment.close()
    return best
