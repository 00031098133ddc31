"""Messages that a socket did not take at once, in order, bounded for each peer. A pure core."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from mmprep.errors import Busy


class Outbox:
    """What waits for peers that do not keep up.

    Parameters
    ----------
    max_messages, max_bytes:
        For one peer.
    """

    def __init__(self, *, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._waiting: dict[bytes, deque[Sequence[Any]]] = {}
        self._bytes: dict[bytes, int] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def holds(self, peer: bytes) -> bool:
        """Whether something waits for ``peer``: what comes next must wait behind it."""
        return peer in self._waiting

    def add(self, peer: bytes, frames: Sequence[Any]) -> None:
        """Let a message wait.

        Raises
        ------
        Busy
            Too much waits for this peer already.
        """
        queue = self._waiting.setdefault(peer, deque())
        size = sum(len(frame) for frame in frames)
        total = self._bytes.get(peer, 0) + size
        if len(queue) >= self._max_messages or total > self._max_bytes:
            if not queue:
                del self._waiting[peer]
            raise Busy("the peer does not read its messages")
        queue.append(frames)
        self._bytes[peer] = total

    def first(self) -> list[tuple[bytes, Sequence[Any]]]:
        """Return the oldest message of each peer; :meth:`sent` takes it out."""
        return [(peer, queue[0]) for peer, queue in self._waiting.items()]

    def sent(self, peer: bytes) -> None:
        """The oldest message of ``peer`` has gone."""
        frames = self._waiting[peer].popleft()
        self._bytes[peer] -= sum(len(frame) for frame in frames)
        if not self._waiting[peer]:
            self.drop(peer)

    def drop(self, peer: bytes) -> None:
        """Forget all that waits for ``peer``."""
        self._waiting.pop(peer, None)
        self._bytes.pop(peer, None)

    def validate(self) -> None:
        """Check the invariants."""
        assert self._waiting.keys() == self._bytes.keys(), "a peer without messages is remembered"
        for peer, queue in self._waiting.items():
            assert queue, "an empty queue is remembered"
            assert self._bytes[peer] == sum(len(frame) for frames in queue for frame in frames), "bytes are miscounted"
            assert len(queue) <= self._max_messages, "too many messages wait"
            assert self._bytes[peer] <= self._max_bytes, "too many bytes wait"
