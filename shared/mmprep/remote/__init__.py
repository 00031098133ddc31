"""Backends on other hosts: their end of the connection, and what both ends share.

The other end is :mod:`mmprep_frontend.remote`, a process beside the frontends.
"""
