"""Plans, kept apart from the tensors: small, and they outlive their tensors' eviction."""

from __future__ import annotations

from collections import OrderedDict


class PlanStore:
    """Packed metadata by key, least recently used out first.

    Parameters
    ----------
    max_bytes:
        Of metadata, and :attr:`OVERHEAD` a plan.
    """

    #: Bytes that a plan costs beside its metadata.
    OVERHEAD = 200

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._plans: OrderedDict[bytes, bytes] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, key: bytes) -> bytes | None:
        """Return the metadata of ``key`` and note its use."""
        meta = self._plans.get(key)
        if meta is not None:
            self._plans.move_to_end(key)
        return meta

    def put(self, key: bytes, meta: bytes) -> None:
        """Keep the metadata of ``key``, unless they alone are above the bound."""
        previous = self._plans.pop(key, None)
        if previous is not None:
            self._bytes -= len(previous) + self.OVERHEAD
        if len(meta) + self.OVERHEAD > self._max_bytes:
            return
        self._plans[key] = meta
        self._bytes += len(meta) + self.OVERHEAD
        while self._bytes > self._max_bytes:
            _, dropped = self._plans.popitem(last=False)
            self._bytes -= len(dropped) + self.OVERHEAD

    def drop(self, key: bytes) -> None:
        """Forget the metadata of ``key``; an unknown one changes nothing."""
        dropped = self._plans.pop(key, None)
        if dropped is not None:
            self._bytes -= len(dropped) + self.OVERHEAD

    def clear(self) -> None:
        """Forget everything."""
        self._plans.clear()
        self._bytes = 0

    def validate(self) -> None:
        """Check the invariants."""
        assert self._bytes == sum(len(meta) + self.OVERHEAD for meta in self._plans.values()), "bytes are miscounted"
        assert self._bytes <= self._max_bytes, "above the limit"
