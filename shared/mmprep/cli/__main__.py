"""``python -m mmprep.cli``."""

from mmprep.cli import main

main()
