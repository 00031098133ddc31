"""Scheduling: what is computed, for whom, in which order, and what is refused.

Pure state machines without clock, socket or thread: the writer gives them events and ``now`` (monotonic seconds) and
carries out what they answer.

- :mod:`~mmprep_worker.scheduling.flights`: one computation for all who wait for the same item;
- :mod:`~mmprep_worker.scheduling.queue`: the order in which lanes take uploaded media, fair between clients;
- :mod:`~mmprep_worker.scheduling.queues`: named queues of jobs, which backends pull;
- :mod:`~mmprep_worker.scheduling.once`: requests that their clients may send again;
- :mod:`~mmprep_worker.scheduling.admission`: whether a request's work is taken on at all.
"""
