"""The worker: the writer that owns ring, leases and queues, and its lanes that decode."""
