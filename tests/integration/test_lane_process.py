"""A lane as a process of its own."""

import math
import select
import signal
import subprocess
import sys

import msgspec
import pytest

from mmprep import embedded
from mmprep.process_lock import holder
from mmprep.segment import Segment
from mmprep_worker.lanes.config import LaneConfig
from mmprep_worker.lanes.pool import LanePool


@pytest.fixture
def segment():
    made = Segment.create("/mmprep-0-test-lane", 1 << 20)
    yield made
    made.unlink()
    made.close()


def orders(runtime_dir, segment, token=bytes(32)):
    return LaneConfig(
        lane=0,
        token=token.hex(),
        endpoint=f"ipc://{runtime_dir}/lanes.sock",  # nobody listens there: this writer is gone
        lock=str(runtime_dir / "lane-0.lock"),
        segment=segment.name,
        model=str(embedded.path()),
        max_image_pixels=1 << 24,
        max_media_size=1 << 24,
        data_limit=4 << 30,
        nice=0,
    )


def test_a_lane_whose_writer_goes_away_while_it_warms_up_ends(runtime_dir, segment):
    config = orders(runtime_dir, segment)
    lane = subprocess.run(
        [sys.executable, "-m", "mmprep_worker.lanes"],
        input=msgspec.json.encode(config) + b"\n",
        capture_output=True,
        check=False,
    )
    assert (lane.returncode, lane.stderr) == (0, b"")
    assert holder(runtime_dir / "lane-0.lock") is None


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
        ((pidfd, _),) = pool.pidfds().items()
        select.select([pidfd], [], [])
        assert pool.exited(0, until) == -signal.SIGKILL
        assert pool.start_due(until) == [0]
        assert pool.pid(0) != started
    else:
        assert pool.pid(0) == started
    pool.stop()
