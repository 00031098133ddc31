"""``python -m mmprep_worker.lanes``: one lane; started by the writer."""

import gc

gc.disable()  # until the lane is warm: what a start makes stays; to look for garbage among it costs a sixth of its time

from mmprep_worker.lanes.lane import main  # noqa: E402, imports are what this is about

main()
