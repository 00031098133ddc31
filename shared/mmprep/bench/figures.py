"""Percentiles and medians, the same everywhere in the benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return ``p50``, ``p95``, ``p99`` and ``max`` of ``values``, of which there is at least one."""
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return {"p50": round(p50, 3), "p95": round(p95, 3), "p99": round(p99, 3), "max": round(max(values), 3)}


def median(values: Sequence[float]) -> float:
    """Return the median of ``values``, of which there is at least one."""
    return float(np.median(values))
