"""The frontend's link to the supervisor: tells its state, reports and forgets when asked, and asks about the whole service."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
import zmq

import mmprep
from mmprep.errors import ServiceUnavailable
from mmprep.metrics import ProcessReport, Snapshot
from mmprep.wire import messages
from mmprep.wire.calls import CallTable
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.sockets import Link

_ANSWER_SECONDS = 5.0
_FRAME_LIMIT = 16 << 20


class SupervisorLink:
    """One process's connection to its supervisor.

    Parameters
    ----------
    report:
        Makes the process's report.
    forget:
        Forgets what the process keeps of a cache.
    role:
        What the process is.

    Attributes
    ----------
    begun: every process of the service was ready.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        index: int,
        report: Callable[[], ProcessReport],
        forget: Callable[[messages.Cache], Awaitable[None]],
        *,
        role: Literal["frontend", "remote"] = "frontend",
    ) -> None:
        self._id = str(index)
        self._role: Literal["frontend", "remote"] = role
        self._report = report
        self._forget = forget
        self._forgetting: set[asyncio.Task[None]] = set()
        self.begun = False
        self._calls = CallTable()
        self._state = messages.StateChange(False, f"the {role} process is starting")
        self._link = Link(
            context,
            endpoint,
            f"{role}:{self._id}",
            greeting=self._greeting,
            on_message=self._on_message,
            on_down=self._on_down,
            frame_limit=_FRAME_LIMIT,
        )

    def say(self, state: messages.StateChange) -> None:
        """Tell the supervisor this process's state; again is no message."""
        if state != self._state:
            self._state = state
            self._link.send([pack(state)])

    async def metrics(self) -> Snapshot:
        """Return the whole service's metrics; raises ServiceUnavailable where the supervisor does not answer."""
        return msgspec.json.decode(await self._ask("metrics"), type=Snapshot)

    async def status(self) -> bytes:
        """Return the whole service's status as JSON; raises as :meth:`metrics`."""
        return bytes(await self._ask("status"))

    async def let_all_forget(self, cache: messages.Cache) -> None:
        """Let every frontend, this one too, forget what it keeps of a cache.

        Raises
        ------
        ServiceUnavailable
            One of them, or the supervisor, has not answered.
        """
        await self._call(lambda number: messages.Forget(number, cache))

    async def _ask(self, subject: Literal["status", "metrics"]) -> Any:
        return await self._call(lambda number: messages.Ask(number, subject))

    async def _call(self, make: Callable[[int], msgspec.Struct]) -> Any:
        number, future = self._calls.open()
        try:
            self._link.send([pack(make(number))])
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await future
        except TimeoutError:
            raise ServiceUnavailable("the supervisor did not answer", retry_after=1.0) from None
        finally:
            self._calls.forget(number)

    def close(self) -> None:
        """Disconnect."""
        self._link.close()

    async def _have_forgotten(self, message: messages.Forget) -> None:
        await self._forget(message.cache)
        self._link.send([pack(messages.Done(message.call))])

    def _greeting(self) -> list[bytes]:
        return [pack(messages.Hello(PROTOCOL, mmprep.__version__, self._role, self._id, os.getpid()))]

    def _on_down(self) -> None:
        self._calls.fail_all(ServiceUnavailable, "the supervisor went away")

    def _on_message(self, frames: list[Any]) -> None:
        message = unpack(frames[0], messages.FromSupervisor)
        match message:
            case messages.SupervisorWelcome():
                self._link.send([pack(self._state)])
            case messages.StateChange():
                self.begun = message.ready
            case messages.Collect():
                self._link.send([pack(messages.Report(message.call)), msgspec.json.encode(self._report())])
            case messages.Told():
                self._calls.resolve(message.call, frames[1])
            case messages.Done():
                self._calls.resolve(message.call, None)
            case messages.Forget():
                task = asyncio.create_task(self._have_forgotten(message))
                self._forgetting.add(task)
                task.add_done_callback(self._forgetting.discard)
            case messages.Failed():
                self._calls.resolve(message.call, message.fault.error())
            case _:
                pass
