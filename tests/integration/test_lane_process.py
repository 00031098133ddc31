"""A lane as a process of its own."""

import subprocess
import sys

import msgspec

from mmprep import embedded
from mmprep.process_lock import holder
from mmprep.segment import Segment
from mmprep_worker.lanes.config import LaneConfig


def test_a_lane_whose_writer_goes_away_while_it_warms_up_ends(runtime_dir):
    lock = runtime_dir / "lane-0.lock"
    segment = Segment.create("/mmprep-0-test-lane", 1 << 20)
    config = LaneConfig(
        lane=0,
        token="00" * 32,
        endpoint=f"ipc://{runtime_dir}/lanes.sock",  # nobody listens there: this writer is gone
        tensors=f"ipc://{runtime_dir}/lanes-bulk.sock",
        lock=str(lock),
        segment=segment.name,
        model=str(embedded.path()),
        max_image_pixels=1 << 24,
        max_media_size=1 << 24,
        data_limit=4 << 30,
        nice=0,
    )
    try:
        lane = subprocess.run(
            [sys.executable, "-m", "mmprep_worker.lanes"],
            input=msgspec.json.encode(config) + b"\n",
            capture_output=True,
            check=False,
        )
    finally:
        segment.unlink()
        segment.close()
    assert (lane.returncode, lane.stderr) == (0, b"")
    assert holder(lock) is None
