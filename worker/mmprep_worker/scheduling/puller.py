"""A backend as the queues of jobs know it."""

from __future__ import annotations

import math

from mmprep_worker.scheduling.job import Delivery


class Puller:
    """A backend as the queues know it.

    Attributes
    ----------
    queues: the names that it pulls from, the one that was served longest ago first.
    credits: deliveries that it may have at a time; 0 while it is away or drains.
    held: its deliveries by token.
    silent: a delivery ran out of time, and it has not said a word since.
    paused_until: it gets nothing before, in seconds of ``now``.
    """

    __slots__ = ("credits", "held", "id", "paused_until", "queues", "silent")

    def __init__(self, backend: str) -> None:
        self.id = backend
        self.queues: list[str] = []
        self.credits = 0
        self.held: dict[bytes, Delivery] = {}
        self.silent = False
        self.paused_until = -math.inf

    def may_take(self, now: float) -> bool:
        """Whether it may get a job now."""
        return len(self.held) < self.credits and not self.silent and self.paused_until <= now
