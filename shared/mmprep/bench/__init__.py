"""The benchmark of the running service: ``python -m mmprep.bench``, or ``./scripts/bench`` with the kernel's part.

It needs what ``mmprep[server]`` installs and no network: pictures are generated, services are started on loopback. Load,
probe and reader are processes of their own, so that their CPU time is not counted as the service's.
"""
