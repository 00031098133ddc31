"""Recordings: opening, decoding, one channel at a model's rate, and features."""
