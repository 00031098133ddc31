"""Traces of requests: what came with a request, the spans that it makes, and their way to a collector."""
