"""``python -m mmprep_frontend``: one frontend; started by the supervisor."""

from mmprep_frontend.process import main

main()
