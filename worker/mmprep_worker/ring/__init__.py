"""The ring: what the writer knows about its segment. Pure state machines: events and ``now`` in, results out.

``ring`` ties together the allocator (:mod:`mmprep.arena`), the ``directory`` of entries, the eviction ``policy`` and the
``leases`` of the backends. None of them touches memory, sockets or the clock; what has to be written into the segment
comes out as records.
"""
