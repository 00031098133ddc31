"""``python -m mmprep_worker.lanes``: one lane; started by the writer."""

from mmprep_worker.lanes.lane import main

main()
