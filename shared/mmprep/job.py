"""What a backend pulls from a queue: one rendered request, with its tensors where they lie.

A job is in this backend's hands until it says what became of it: :meth:`Job.ack` when it is done, :meth:`Job.nack` when it
failed, :meth:`Job.release` when somebody else shall do it. Without a word within ``--job-timeout``, or when the process
ends, the job is delivered again, here or elsewhere. So a job may come twice: ``id`` tells, and ``attempt`` counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from mmprep.errors import MmprepError
from mmprep.item import Item, Runner, features_of
from mmprep.job_content import JobContent
from mmprep.result import ids_from_bytes
from mmprep.wire.calls import WriterLostError

if TYPE_CHECKING:
    from mmprep.pulling import Held, Pulling

Arrays = dict[str, NDArray[Any]]
#: From :meth:`mmprep.loop_thread.LoopThread.ask`.
Asker = Callable[..., Any]
#: Seconds for the word that a job is done; then it is said again with all that may take.
_SECONDS = 10.0


class JobView:
    """The tensors of all items of a job for the time of a ``with`` (or ``async with``) block, read-only and not copied."""

    def __init__(self, items: dict[str, list[Item]]) -> None:
        self._items = items
        self._stack = ExitStack()
        self._async_stack = AsyncExitStack()

    def __enter__(self) -> dict[str, list[Arrays]]:
        with ExitStack() as stack:
            arrays = {m: [stack.enter_context(item.view()) for item in items] for m, items in self._items.items()}
            self._stack = stack.pop_all()
        return arrays

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def __aenter__(self) -> dict[str, list[Arrays]]:
        async with AsyncExitStack() as stack:
            arrays = {}
            for modality, items in self._items.items():
                arrays[modality] = [await stack.enter_async_context(item.view()) for item in items]
            self._async_stack = stack.pop_all()
        return arrays

    async def __aexit__(self, *_: object) -> None:
        await self._async_stack.aclose()


class _Job:
    """What jobs of both kinds of backend have.

    Attributes
    ----------
    id: the ``request_id`` that the sender was told; the same for every delivery.
    queue: the name of the queue that it comes from.
    attempt: which delivery of the job this is, from 1.
    error: what has become of the request after it was accepted, or ``None``. A job with an error has no tensors.
    items: by modality, in the order of the prompt.
    """

    def __init__(self, pulling: Pulling, held: Held, content: JobContent, items: Iterable[Item]) -> None:
        self.id = held.job_id
        self.queue = held.queue
        self.attempt = held.attempt
        self.error: MmprepError | None = held.error
        self.items: dict[str, list[Item]] = {}
        for item in items:
            self.items.setdefault(item.modality, []).append(item)
        self._pulling = pulling
        self._held = held
        self._content = content

    @property
    def token_array(self) -> NDArray[Any]:
        """The prompt, placeholders expanded: uint32, shape ``(length,)``, without a copy."""
        return ids_from_bytes(self._content.token_ids)

    @property
    def token_ids(self) -> list[int]:
        """The prompt, placeholders expanded."""
        ids: list[int] = self.token_array.tolist()
        return ids

    @property
    def request(self) -> dict[str, Any]:
        """The request as a GenerateRequest, in the form of the HTTP interface; its tensors are in :attr:`items`."""
        request: dict[str, Any] = json.loads(self._content.request)
        return {**request, "token_ids": self.token_ids, "features": features_of(self.items)}

    def view(self) -> JobView:
        """Return a context manager over the tensors of all items, as they lie in shared memory.

        It gives for each modality a list of dictionaries of arrays by field name. They must not be used after the block, nor
        after the job's end. Raises the job's :attr:`error` where it has one.
        """
        if self.error is not None:
            raise self.error
        return JobView(self.items)


class AsyncJob(_Job):
    """A job of an :class:`~mmprep.backend.AsyncBackend`."""

    async def ack(self, *, wait: bool = True) -> None:
        """Say that the job is done, and give its tensors up.

        Parameters
        ----------
        wait:
            Until the service has heard it. Else it is told within some milliseconds, together with other jobs that are done:
            that costs its writer less. If this process dies before, or the delivery was over, the job is done again elsewhere,
            of which the program is not told.

        Raises
        ------
        StaleDelivery
            The delivery was over before: the job is, or will be, done by somebody else too.
        InvalidRequest
            Its end was told already.
        ServiceUnavailable
            Nobody heard it; say it again.
        """
        if wait:
            await self._pulling.ack(self._held)
        else:
            self._pulling.ack_soon(self._held)

    async def nack(self, why: str = "the backend failed over it") -> None:
        """Say that the job failed here, and let it be tried again; after ``--job-attempts`` failures it is given up.

        Raises as :meth:`ack`.
        """
        await self._pulling.give_back(self._held, why)

    async def release(self) -> None:
        """Give the job back undone, without counting a failure. Raises as :meth:`ack`."""
        await self._pulling.give_back(self._held, None)


class Job(_Job):
    """A job of a :class:`~mmprep.backend.Backend`; may be used from any thread."""

    def __init__(  # noqa: PLR0917 -- of one place
        self, pulling: Pulling, held: Held, content: JobContent, items: Iterable[Item], run: Runner, ask: Asker
    ) -> None:
        super().__init__(pulling, held, content, items)
        self._run = run
        self._ask = ask

    def ack(self, *, wait: bool = True) -> None:
        """Say that the job is done, and give its tensors up; see :meth:`AsyncJob.ack`."""
        if not wait:
            self._pulling.ack_soon(self._held)
            return
        try:
            self._ask(partial(self._pulling.ack_now, self._held), seconds=_SECONDS)
        except (WriterLostError, TimeoutError):
            self._run(self._pulling.ack(self._held))

    def nack(self, why: str = "the backend failed over it") -> None:
        """Say that the job failed here; see :meth:`AsyncJob.nack`."""
        self._run(self._pulling.give_back(self._held, why))

    def release(self) -> None:
        """Give the job back undone; see :meth:`AsyncJob.release`."""
        self._run(self._pulling.give_back(self._held, None))
