"""Bridges: an item's tensors and ranges in the forms of engines. One module an engine, which alone imports its package."""
