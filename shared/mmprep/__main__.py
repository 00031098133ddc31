"""``python -m mmprep``: the command line, as ``mmprep``."""

from mmprep.cli import main

main()
