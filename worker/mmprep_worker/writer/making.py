"""Makes the writer's state machine for a segment, by the service's settings."""

from __future__ import annotations

import os
from collections.abc import Callable

from mmprep.layout import Geometry
from mmprep.metrics import Metrics
from mmprep.settings import WriterSettings
from mmprep.wire import messages
from mmprep_worker.scheduling.admission import Admission, Quarantine
from mmprep_worker.scheduling.flights import Flights
from mmprep_worker.scheduling.job import Limits
from mmprep_worker.scheduling.queue import FairQueue
from mmprep_worker.writer.core import WriterCore
from mmprep_worker.writer.opening import Opened
from mmprep_worker.writer.plans import PlanStore

#: Seconds in which the readers of an earlier writer's ring have to say what they hold. Lanes take about as long to start.
_SILENT_SECONDS = 2.0
_PLAN_BYTES = 32 << 20
_QUARANTINED = 1024
#: A medium in quarantine is refused for at least this long, and for so many times of a lane's time for one medium: the
#: strike of a first try that took all of it must still count when the second one has.
_QUARANTINE_SECONDS = 60.0
_QUARANTINE_TASKS = 3
#: Calls that may wait, for each medium that may be in work.
_WAITERS = 16
#: Queued jobs may hold this part of the ring.
_QUEUES_SHARE = 2


def make_core(  # noqa: PLR0917 -- of one place
    settings: WriterSettings,
    opened: Opened,
    geometry: Geometry,
    now: float,
    metrics: Metrics,
    read: Callable[[int, int], bytes],
) -> WriterCore:
    """Return the state machine of an opened segment.

    Parameters
    ----------
    now:
        Monotonic seconds.
    read:
        Returns bytes of the segment: ``read(offset, length)``.
    """
    quarantined = max(_QUARANTINE_SECONDS, _QUARANTINE_TASKS * settings.task_seconds)
    quarantine = Quarantine(max_keys=_QUARANTINED, seconds=quarantined)
    return WriterCore(
        ring=opened.ring,
        flights=Flights(
            max_waiting=settings.queue_limit * _WAITERS,
            upload_seconds=settings.upload_seconds,
            quarantine=quarantine,
            after=int.from_bytes(os.urandom(5), "big"),
        ),
        quarantine=quarantine,
        queue=FairQueue(max_items=settings.queue_limit, max_bytes=settings.queue_bytes),
        admission=Admission(
            max_items=settings.queue_limit,
            max_bytes=settings.queue_bytes,
            max_items_per_client=settings.queue_limit,
        ),
        plans=PlanStore(_PLAN_BYTES),
        metrics=metrics,
        segment=messages.SegmentInfo(opened.segment.name, opened.epoch, geometry.total_size),
        lanes=settings.lanes,
        lease_seconds=settings.lease_seconds,
        task_seconds=settings.task_seconds,
        read=read,
        new_id=lambda: os.urandom(12),
        inline_bytes=settings.inline_size,
        awaited=opened.awaited,
        silent_at=now + _SILENT_SECONDS,
        queue_limits=Limits(
            jobs=settings.queue_jobs,
            nbytes=settings.queue_size,
            pinned=geometry.arena_capacity // _QUEUES_SHARE,
            attempts=settings.job_attempts,
            seconds=settings.job_seconds,
            idle_seconds=settings.job_expiry,
        ),
        declared_queues=settings.queues,
    )
