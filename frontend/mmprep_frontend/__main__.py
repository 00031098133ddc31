"""``python -m mmprep_frontend``: one frontend; started by the supervisor."""

import gc

gc.disable()  # what is imported stays; to look for garbage among it costs a sixth of a start

from mmprep_frontend.process import main  # noqa: E402, imports are what this is about

gc.freeze()
gc.enable()
main()
