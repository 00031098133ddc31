"""``python -m mmprep.demo``."""

import sys

from mmprep.demo.main import main

sys.exit(main(sys.argv[1:]))
