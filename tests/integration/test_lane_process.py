"""A lane as a process of its own."""

import subprocess
import sys

import msgspec
from tests.integration.service import eventually

from mmprep import embedded
from mmprep.process_lock import holder
from mmprep.segment import Segment
from mmprep_worker.lanes.config import LaneConfig


def config_of(runtime_dir, segment):
    return LaneConfig(
        lane=0,
        token="00" * 32,
        endpoint=f"ipc://{runtime_dir}/lanes.sock",  # nobody listens there: this writer is gone
        lock=str(runtime_dir / "lane-0.lock"),
        segment=segment,
        model=str(embedded.path()),
        max_image_pixels=1 << 24,
        max_media_size=1 << 24,
        data_limit=4 << 30,
        nice=0,
    )


def start(config):
    lane = subprocess.Popen(
        [sys.executable, "-m", "mmprep_worker.lanes"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    lane.stdin.write(msgspec.json.encode(config) + b"\n")
    lane.stdin.flush()
    return lane


def test_a_lane_whose_writer_goes_away_while_it_warms_up_ends(runtime_dir):
    with Segment.create("/mmprep-0-test-lane", 1 << 20) as segment:
        try:
            lane = start(config_of(runtime_dir, segment.name))
            eventually(lambda: holder(runtime_dir / "lane-0.lock"), "the lane's lock")
            _, said = lane.communicate()
        finally:
            segment.unlink()
    assert (lane.returncode, said) == (0, b"")
    assert holder(runtime_dir / "lane-0.lock") is None


def test_a_lane_whose_writer_goes_away_before_it_has_begun_takes_no_lock(runtime_dir):
    """The next writer starts a lane of the same number at once; found by ``scripts/chaos``."""
    lane = start(config_of(runtime_dir, "/mmprep-0-gone"))
    _, said = lane.communicate()
    assert (lane.returncode, said) == (0, b"")
    assert not (runtime_dir / "lane-0.lock").exists()
