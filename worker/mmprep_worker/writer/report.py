"""The writer's part of the service's status and metrics."""

from __future__ import annotations

import os

from mmprep.metrics import ProcessReport
from mmprep_worker.writer.core import WriterCore
from mmprep_worker.writer.jobs import MEDIA
from mmprep_worker.writer.jobs import report as report_queues


def report(core: WriterCore, segment: str, now: float) -> ProcessReport:
    """Return what the writer tells the supervisor."""
    stats = core.ring.stats()
    metrics = core.metrics
    for state in ("free", "ready", "leased", "filling"):
        metrics.gauge("mmprep_ring_bytes", getattr(stats, state), state=state)
    metrics.total("mmprep_ring_evictions_total", stats.evictions)
    metrics.total("mmprep_leases_revoked_total", stats.revoked)
    metrics.gauge("mmprep_spill_bytes", stats.spills.nbytes)
    metrics.total("mmprep_spills_total", stats.spills.made)
    metrics.total("mmprep_inline_total", core.transfers.filled)
    metrics.gauge("mmprep_leases", stats.leases)
    metrics.gauge("mmprep_leases_overdue", stats.overdue)
    metrics.gauge("mmprep_quarantined", len(core.quarantine))
    states = [lane.name for lane in core.lanes]
    for state in ("starting", "idle", "busy"):
        metrics.gauge("mmprep_lanes", states.count(state), state=state)
    queues = report_queues(core.queues, metrics, now)
    metrics.gauge("mmprep_queue_depth", len(core.queue), queue=MEDIA)
    backends = [peer for peer in core.peers.values() if peer.role == "backend"]
    return ProcessReport(
        os.getpid(),
        metrics.snapshot(),
        {
            "worker": {"pid": os.getpid(), "incarnation": core.ring.incarnation, "awaited": len(core.awaited)},
            "lanes": [{"pid": lane.pid, "state": lane.name} for lane in core.lanes],
            "backends": [
                {"id": peer.id, "pid": peer.pid, "leases": core.ring.leases.count(peer.id)} for peer in backends
            ],
            "ring": {
                "capacity": stats.capacity,
                "free": stats.free,
                "ready": stats.ready,
                "leased": stats.leased,
                "filling": stats.filling,
                "entries": stats.entries,
                "evictions": stats.evictions,
            },
            "spills": {
                "entries": stats.spills.entries,
                "bytes": stats.spills.nbytes,
                "filling": stats.spills.filling,
                "made": stats.spills.made,
            },
            "inline": {"items": len(core.transfers), "bytes": core.transfers.nbytes, "sent": core.transfers.filled},
            "queues": {MEDIA: {"depth": len(core.queue), "bytes": core.queue.bytes}, **queues},
            "segment": segment,
            "pins": sum(len(peer.calls) for peer in core.peers.values()),
        },
    )
