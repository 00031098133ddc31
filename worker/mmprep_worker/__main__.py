"""``python -m mmprep_worker``: the writer; started by the supervisor."""

from mmprep_worker.writer.process import main

main()
