"""``python -m mmprep_frontend.remote``: the door for backends on other hosts; started by the supervisor."""

from mmprep_frontend.remote.process import main

main()
