"""What a request has become in a frontend: its items, how it wants them, and the rendered chat."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmprep.card import Io
from mmprep.items import ItemMeta
from mmprep.registration import Mapping as RingMapping
from mmprep.wire.messages import ItemAnswer, LeaseTo, Need, Remembered
from mmprep.wire.messages import Offered as OfferedItem
from mmprep_frontend.media.intake import Medium
from mmprep_frontend.offered import Offered
from mmprep_frontend.render.conversation import Conversation, MediaPart
from mmprep_frontend.render.expansion import Expanded
from mmprep_frontend.render.requests import ChatRequest, CompletionRequest
from mmprep_frontend.render.tokens import EncodedPrompt


@dataclass(frozen=True, slots=True)
class RenderedItem:
    """One medium of a rendered chat."""

    part: MediaPart
    key: bytes
    answer: ItemAnswer
    meta: ItemMeta
    #: The tensors of a medium that came embedded, where they travel; they were never with the writer.
    own: memoryview | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """How a request wants its items.

    Attributes
    ----------
    need: tensors, or only plans.
    lease: to whom the addresses are to be leased; else they are pinned.
    dtype: of the main tensors, or ``auto``.
    io: how media are read, by modality.
    kwargs: how they are processed, by modality, from :func:`mmprep.arguments.choose`.
    scope: the name space of the items' keys.
    priority: lower is more urgent.
    deadline: by the loop's clock.
    for_job: whether all tensors are to lie in shared memory, also those of media that came embedded.
    """

    need: Need
    lease: LeaseTo | None
    dtype: str
    io: Mapping[str, Io]
    kwargs: Mapping[str, bytes]
    scope: bytes
    priority: int
    deadline: float
    for_job: bool = False

    def stays_here(self, part: MediaPart) -> bool:
        """Whether a medium is one that the writer does not hear of: it is embedded already, and its tensors travel, if any."""
        return part.grid is not None and not self.for_job


@dataclass(frozen=True, slots=True)
class Walked:
    """A request's conversation, the bytes of its JSON beside its media, the name space of its keys, and how its media are
    processed, by modality.
    """

    conversation: Conversation
    nbytes: int
    scope: bytes
    kwargs: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Unasked:
    """A chat was rendered of what is remembered of its items; the writer looks at them when its job is posted.

    Attributes
    ----------
    items: what is told with the job.
    media: theirs; ``None`` for those that the request only names.
    ring: in which their places lie, or beside which.
    ask: renders the chat anew, of the writer's answer.
    """

    items: tuple[OfferedItem | Remembered, ...]
    media: Sequence[Medium | None]
    ring: RingMapping
    ask: Callable[[], Awaitable[RenderedChat]]


@dataclass(slots=True)
class RenderedChat:
    """A rendered chat, or prompt of a completion; its items may be pinned or leased: see ``offered``."""

    request: ChatRequest | CompletionRequest
    prompt: EncodedPrompt
    expanded: Expanded
    offsets: Sequence[tuple[int, int]] | None = None
    items: list[RenderedItem] = field(default_factory=list)
    offered: Offered | None = None
    unasked: Unasked | None = None
    #: When the request came, and when its time is over, by the loop's clock.
    arrived: float = 0.0
    deadline: float = 0.0

    @property
    def ring(self) -> RingMapping | None:
        """The ring that places of its items lie in or beside, if it has any."""
        if self.unasked is not None:
            return self.unasked.ring
        return None if self.offered is None else self.offered.mapping

    def in_order(self) -> list[RenderedItem]:
        """Return the items in the order of the prompt's ranges."""
        waiting: dict[str, list[RenderedItem]] = {}
        for item in self.items:
            waiting.setdefault(item.part.modality, []).append(item)
        queues = {modality: iter(items) for modality, items in waiting.items()}
        return [next(queues[placed.modality]) for placed in self.expanded.ranges]

    def region(self, item: RenderedItem) -> memoryview:
        """Return an item's tensors as they lie in the ring; pinned until the chat is released."""
        if item.own is not None:
            return item.own
        assert self.offered is not None
        return self.offered.region(item.answer)

    def borrows(self, item: RenderedItem) -> bool:
        """Whether :meth:`region` is memory that only the pins keep."""
        return not item.answer.inline and item.own is None

    def kept_region(self, item: RenderedItem) -> memoryview:
        """Return an item's tensors as memory that outlives the pins: those in a segment are copied."""
        region = self.region(item)
        if not self.borrows(item):
            return region
        # Not bytes(): this copy lets other threads run.
        return np.frombuffer(region, np.uint8).copy().data

    def travels(self, item: RenderedItem) -> bool:
        """Whether an item's tensors travel in the answer itself: as asked for, or since they are in no shared memory."""
        if self.request.payload == "none":
            return False
        return self.request.payload == "tensors" or bool(item.answer.inline) or item.own is not None

    def inline_bytes(self) -> int:
        """Return about how many bytes of tensors travel in the answer itself."""
        return sum(self._nbytes(item) for item in self.items if self.travels(item))

    def _nbytes(self, item: RenderedItem) -> int:
        if item.own is not None:
            return len(item.own)
        return 0 if self.offered is None else self.offered.nbytes(item.answer)

    def release(self) -> None:
        """Let go of what is pinned."""
        if self.offered is not None:
            self.offered.release()

    def give_back(self) -> None:
        """Let go, also of leases: the answer will not reach anybody."""
        if self.offered is not None:
            self.offered.give_back()

    def lease_return(self) -> Callable[[], None] | None:
        """Return what gives the leases back where the answer turns out to have reached nobody; ``None`` without leases."""
        return None if self.offered is None else self.offered.lease_return()
