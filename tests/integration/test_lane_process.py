"""A lane as a process of its own."""

import math
import select
import signal
import subprocess
import sys

import msgspec
import pytest
from tests.integration.service import eventually

from mmprep import embedded
from mmprep.logs import LogSettings
from mmprep.process_lock import holder
from mmprep.segment import Segment
from mmprep_worker.lanes.config import LaneConfig
from mmprep_worker.lanes.pool import LanePool
from mmprep_worker.models.family import MediaLimits


@pytest.fixture
def segment():
    with Segment.create("/mmprep-0-test-lane", 1 << 20) as made:
        yield made.name
        made.unlink()


def orders(runtime_dir, segment, token=bytes(32)):
    return LaneConfig(
        lane=0,
        token=token.hex(),
        endpoint=f"ipc://{runtime_dir}/lanes.sock",  # nobody listens there: this writer is gone
        tensors=f"ipc://{runtime_dir}/lanes-bulk.sock",
        lock=str(runtime_dir / "lane-0.lock"),
        segment=segment,
        model=str(embedded.path()),
        limits=MediaLimits(1 << 24, 64, 60.0, 60.0),
        modalities=("image", "video"),
        image_background=None,
        max_media_size=1 << 24,
        data_limit=4 << 30,
        nice=0,
        logs=LogSettings("warning", "text"),
    )


def start(config):
    lane = subprocess.Popen(
        [sys.executable, "-m", "mmprep_worker.lanes"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    lane.stdin.write(msgspec.json.encode(config) + b"\n")
    lane.stdin.flush()
    return lane


def test_a_lane_whose_writer_goes_away_while_it_warms_up_ends(runtime_dir, segment):
    lane = start(orders(runtime_dir, segment))
    eventually(lambda: holder(runtime_dir / "lane-0.lock"), "the lane's lock")
    _, said = lane.communicate()
    assert (lane.returncode, said) == (0, b"")
    assert holder(runtime_dir / "lane-0.lock") is None


def test_a_lane_whose_writer_goes_away_before_it_has_begun_takes_no_lock(runtime_dir):
    """The next writer starts a lane of the same number at once; found by ``scripts/chaos``."""
    lane = start(orders(runtime_dir, "/mmprep-0-gone"))
    _, said = lane.communicate()
    assert (lane.returncode, said) == (0, b"")
    assert not (runtime_dir / "lane-0.lock").exists()


@pytest.mark.parametrize("warm", [False, True])
def test_a_lane_that_does_not_get_warm_is_killed_and_started_again(runtime_dir, segment, warm):
    pool = LanePool(1, lambda _, token: orders(runtime_dir, segment, token), 0.0)
    assert pool.start_due(0.0) == [0]
    started, until = pool.pid(0), pool.wake_at
    assert 0.0 < until < math.inf
    if warm:
        pool.settled(0)
        assert pool.wake_at == math.inf
    assert pool.start_due(until) == []
    if not warm:
        pidfd = pool.pidfd(0)
        select.select([pidfd], [], [])
        assert pool.exited(0, until) == -signal.SIGKILL
        assert pool.start_due(until) == [0]
        assert pool.pid(0) != started
    else:
        assert pool.pid(0) == started
    pool.stop()
