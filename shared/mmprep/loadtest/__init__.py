"""Load tests of any server with the render paths: ``mmprep bench`` and ``./scripts/loadtest``.

A *workload* says what is asked, *arrivals* say when, a *target* sends it and a *run* keeps the time. In an open loop a
request has a time at which it is due, whatever became of those before it, and its latency counts from then: a service that
stands still for a second is seen to have kept everybody waiting who came in that second.
"""
