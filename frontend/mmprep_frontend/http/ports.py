"""What the HTTP edge needs of the rest of the frontend. It knows bodies, ids and readiness; not what is in a body."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from mmprep_frontend.caller import Caller
from mmprep_frontend.render.written import Encoded, written


class Kept(Protocol):
    """What keeps the memory in which an answer's tensors are, while it is written."""

    def written(self, body: Encoded) -> Iterator[bytes]:
        """Yield the answer's bytes, as :func:`mmprep_frontend.render.written.written` does.

        Raises
        ------
        ServiceUnavailable
            The tensors are not what they were, and what comes next can't be told.
        """

    async def detach(self) -> None:
        """Copy the tensors, and keep nothing more."""

    def end(self) -> None:
        """Keep nothing more; again is no error."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """An answer, and what hangs on it.

    Attributes
    ----------
    body: in the caller's encoding.
    unread: to be called where the client does not seem to have read it; ``None`` where nobody has to know.
    status: 200, or 202 where the request was accepted and its result goes elsewhere.
    kept: what keeps the body's tensors; ``None`` where it has none.
    """

    body: Encoded
    unread: Callable[[], None] | None = None
    status: int = 200
    kept: Kept | None = None

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return sum(map(len, self.body))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the body may take while it is sent: base64 is made as it is written."""
        return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in self.body)

    def pieces(self) -> Iterator[bytes]:
        """Yield the body, a piece at a time; raises as :meth:`Kept.written`."""
        return written(self.body) if self.kept is None else self.kept.written(self.body)


class Service(Protocol):
    """What answers behind the routes.

    Every coroutine takes a body as it came and returns the answer in the caller's encoding. It raises errors of
    :mod:`mmprep.errors`, which the edge turns into statuses, and is cancelled when the client hangs up. The edge counts the
    answer in the caller's ``held`` until it is sent, and ends what keeps it, whatever happens.
    """

    async def render_chat(self, body: bytes, caller: Caller) -> Rendered:
        """Answer a chat completion request with its GenerateRequest."""

    async def render_messages(self, body: bytes, caller: Caller) -> Rendered:
        """Answer a request of Anthropic's Messages API with its GenerateRequest."""

    async def render_responses(self, body: bytes, caller: Caller) -> Rendered:
        """Answer a request of OpenAI's Responses API with its GenerateRequest."""

    async def render_completions(self, body: bytes, caller: Caller) -> Rendered:
        """Answer a completion request with a list of GenerateRequests."""

    async def tokenize(self, body: bytes, caller: Caller) -> bytes:
        """Answer with the tokens of a text or a chat."""

    async def detokenize(self, body: bytes, caller: Caller) -> bytes:
        """Answer with the text of tokens."""

    async def renew_leases(self, body: bytes, caller: Caller) -> bytes:
        """Extend leases."""

    async def release_leases(self, body: bytes, caller: Caller) -> bytes:
        """End leases."""

    async def inject(self, body: bytes, caller: Caller) -> bytes:
        """Put an item that was processed elsewhere into the cache; the body is MessagePack, see :mod:`mmprep.injected`."""

    async def reset_mm_cache(self, body: bytes, caller: Caller) -> bytes:
        """Empty the cache of processed items, of the whole service."""

    async def reset_media_cache(self, body: bytes, caller: Caller) -> bytes:
        """Empty the disk cache of fetched media, and let every frontend forget its downloads."""

    async def metrics(self) -> bytes:
        """Return the whole service's metrics as Prometheus text, see :mod:`mmprep_frontend.http.exposition`."""

    async def status(self) -> bytes:
        """Return the whole service's status, as ``mmprep status --json`` prints it."""

    def models(self) -> dict[str, Any]:
        """Return the answer of ``/v1/models``, as data that JSON can hold."""

    def ready(self) -> str | None:
        """Return ``None``, or why the service is not ready, as a sentence for the sender."""

    def refusal(self) -> str | None:
        """Return ``None``, or why no request can be taken; one that is not ready may take requests and let them wait."""
