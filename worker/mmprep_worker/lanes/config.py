"""What a lane is told by the writer that starts it, as one line of JSON on its standard input.

The input stays open: its end means that the writer is gone, and the lane leaves.
"""

from __future__ import annotations

import msgspec

from mmprep.logs import LogSettings
from mmprep_worker.models.family import MediaLimits


class LaneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One lane's orders.

    Attributes
    ----------
    lane: its number.
    token: 64 hex digits that it repeats, so that the writer knows its own child.
    endpoint: the writer's socket for lanes.
    tensors: the writer's socket for tensors that travel inline.
    lock: path of the lane's process lock; while it is held, the lane may write to extents granted to it.
    segment: name of the ring's segment.
    model: the model directory.
    limits: of one medium.
    modalities: that requests may have; the lane warms up with these.
    image_background: red, green and blue that transparency of pictures is put on; ``None``: it is dropped.
    max_media_size: of one medium's encoded bytes.
    data_limit: RLIMIT_DATA in bytes; RLIMIT_AS would refuse the ring.
    nice: how much the lane steps behind the message loops.
    logs: how it logs.
    """

    lane: int
    token: str
    endpoint: str
    tensors: str
    lock: str
    segment: str
    model: str
    limits: MediaLimits
    modalities: tuple[str, ...]
    image_background: tuple[int, int, int] | None
    max_media_size: int
    data_limit: int
    nice: int
    logs: LogSettings
