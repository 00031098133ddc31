"""The writer: the one process that owns ring, index, leases, flights and queue, and never decodes a pixel.

``core`` is the state machine, ``shell`` the sockets, the segment, the clock and the child processes around it.
"""
