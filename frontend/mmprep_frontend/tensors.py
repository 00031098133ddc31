"""Where the tensors of an answer are: in the ring, in spills, or fetched from the writer because no memory is shared.

Spills are mapped when they are read and unmapped with the answer. What travels inline is fetched before the answer is
used, on a socket of its own: control sockets carry no tensors.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import zmq

from mmprep import failpoints
from mmprep.errors import MmprepError, ProtocolError, ServiceUnavailable
from mmprep.items import align
from mmprep.registration import Mapping
from mmprep.runtime import RuntimeDir
from mmprep.wire import messages
from mmprep.wire.calls import CallTable
from mmprep.wire.codec import CONTROL_LIMIT, pack, unpack
from mmprep.wire.sockets import Link

_LOST = "the writer went away; try again"
#: Fetches under way at a time: far below what makes the writer's socket drop an answer.
_AT_ONCE = 8


class Tensors:
    """The tensors of one answer, for as long as it is held.

    Parameters
    ----------
    ring:
        The mapped ring.
    """

    def __init__(self, ring: Mapping) -> None:
        self._ring = ring
        self._fetched: dict[int, memoryview] = {}
        self._spills: dict[bytes, Mapping] = {}

    def add(self, fetched: dict[int, memoryview]) -> None:
        """Take tensor regions that travelled inline, by their number."""
        self._fetched.update(fetched)

    def region(self, answer: messages.ItemAnswer) -> memoryview:
        """Return an item's tensor region as it lies there.

        Raises
        ------
        StaleAddress
            Its spill is gone, which is held otherwise: the writer is gone too.
        """
        if answer.inline:
            return self._fetched[answer.inline]
        start = answer.offset + align(len(answer.meta))
        return self._mapping(answer).segment.buffer[start : answer.offset + answer.length]

    def nbytes(self, answer: messages.ItemAnswer) -> int:
        """Return about how many bytes :meth:`region` has; nothing is mapped for it."""
        return len(self._fetched[answer.inline]) if answer.inline else answer.length

    def close(self) -> None:
        """Unmap the spills; regions that are still in use stay good."""
        while self._spills:
            self._spills.popitem()[1].segment.close()
        self._fetched.clear()

    def _mapping(self, answer: messages.ItemAnswer) -> Mapping:
        if answer.spill is None:
            return self._ring
        mapping = self._spills.get(answer.spill)
        if mapping is None:
            mapping = self._spills[answer.spill] = Mapping.of_spill(self._ring.name, answer.spill)
        return mapping


class TensorsLostError(ServiceUnavailable):
    """The tensors went with their writer; the items are to be offered again."""


class TensorLink:
    """The connection to the writer on which tensors are fetched.

    Parameters
    ----------
    frontend:
        The frontend's id.
    largest:
        Bytes of the largest tensor region.
    """

    def __init__(self, context: zmq.Context[Any], runtime: RuntimeDir, frontend: str, *, largest: int) -> None:
        self._calls = CallTable()
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._link = Link(
            context,
            runtime.tensors,
            f"tensors:{frontend}:{os.getpid()}",
            greeting=list,
            on_message=self._on_message,
            on_down=self._on_down,
            frame_limit=max(CONTROL_LIMIT, largest),
            copy=False,
        )

    def close(self) -> None:
        """Disconnect."""
        self._link.close()

    async def fetch(self, answers: Sequence[messages.ItemAnswer]) -> dict[int, memoryview]:
        """Return the tensor regions that ``answers`` name as inline, by their number.

        Raises
        ------
        TensorsLostError
            They are not kept any more, or the writer went away.
        """
        numbers = dict.fromkeys(answer.inline for answer in answers if answer.inline)
        return {number: await self._fetch(number) for number in numbers}

    async def _fetch(self, inline: int) -> memoryview:
        async with self._at_once:
            number, future = self._calls.open()
            try:
                self._link.send([pack(messages.Fetch(number, inline))])
                failpoints.reach("frontend.fetch.sent")
                region: memoryview = await future
            finally:
                self._calls.forget(number)
        return region

    def _on_down(self) -> None:
        self._calls.fail_all(TensorsLostError, _LOST)

    def _on_message(self, frames: list[zmq.Frame]) -> None:
        message = unpack(frames[0].buffer, messages.FromTensors)
        outcome: MmprepError | memoryview
        match message:
            case messages.Tensors() if len(frames) == 2:
                outcome = frames[1].buffer
            case messages.Failed():
                outcome = TensorsLostError(_LOST)
            case _:
                outcome = ProtocolError("tensors without their frame")
        self._calls.resolve(message.call, outcome)
