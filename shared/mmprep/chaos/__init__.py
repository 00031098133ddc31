"""``./scripts/chaos``: a real service under load while its processes are killed, stopped and fed garbage.

The package uses what users have: ``mmprep serve``, the clients, :class:`mmprep.Backend`, HTTP and ``mmprep status``. What
every answer must hold is computed here, from nothing but the picture's number. Bookkeeping and the schedule of faults are
pure (:mod:`.tally`, :mod:`.schedule`); processes, sockets and signals are around them.
"""
