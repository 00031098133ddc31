"""Lanes: the child processes that decode and process, and the pool that keeps them alive."""
