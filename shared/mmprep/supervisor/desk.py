"""Where processes report to the supervisor and where questions about the whole service are answered."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import zmq

from mmprep.errors import MmprepError, ProtocolError, ServiceUnavailable
from mmprep.metrics import ProcessReport, Snapshot, merge, without_gauges
from mmprep.wire import messages
from mmprep.wire.calls import CallTable, succeeded
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.configured import router
from mmprep.wire.sockets import Pump

_COLLECT_SECONDS = 2.0
#: Seconds that frontends get to forget something: below what the one that asked for it waits.
_FORGET_SECONDS = 4.0
_FRAME_LIMIT = 16 << 20
_EMPTY = Snapshot([], [], [])
_BEGUN = messages.StateChange(True, "")


class Reporter(msgspec.Struct):
    """A process that reports here; ``unanswered`` counts the rounds of :meth:`Desk.silent` since its last message."""

    identity: bytes
    role: str
    id: str
    state: messages.StateChange
    last: Snapshot
    unanswered: int = 0


class Desk:
    """The supervisor's socket.

    Parameters
    ----------
    on_state:
        Called after every change of a process's state.
    settings:
        Of the whole service, as the status tells them.
    """

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, on_state: Callable[[], None], settings: dict[str, Any]
    ) -> None:
        self._settings = settings
        self._on_state = on_state
        self._reporters: dict[bytes, Reporter] = {}
        self._calls = CallTable()
        self._gone: list[Snapshot] = []
        self._begun = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._pump = Pump(router(context, endpoint, frame_limit=_FRAME_LIMIT), self._on_message)

    def close(self) -> None:
        """Close the socket."""
        for task in self._tasks:
            task.cancel()
        self._pump.close()

    def state(self, role: str, reporter_id: str) -> messages.StateChange | None:
        """Return what a process last said of itself."""
        return next((r.state for r in self._reporters.values() if (r.role, r.id) == (role, reporter_id)), None)

    async def begin(self) -> None:
        """Tell every process that the whole service is ready, and return when they have heard it or do not answer."""
        self._begun = True
        for reporter in list(self._reporters.values()):
            self._send(reporter.identity, _BEGUN)
        await self._collect()

    def gone(self, role: str, reporter_id: str) -> None:
        """A process has exited: keep what it had counted."""
        for reporter in [r for r in self._reporters.values() if (r.role, r.id) == (role, reporter_id)]:
            del self._reporters[reporter.identity]
            self._gone = [merge([*self._gone, without_gauges(reporter.last)])]

    async def metrics(self) -> Snapshot:
        """Return the whole service's metrics, of this moment."""
        await self._collect()
        return merge([*self._gone, *(r.last for r in self._reporters.values())])

    async def status(self) -> dict[str, Any]:
        """Return the whole service's status, as ``mmprep status --json`` prints it."""
        reports = await self._collect()
        status: dict[str, Any] = {"supervisor": {"pid": os.getpid()}, "frontends": [], **self._settings}
        for reporter, report in reports:
            if reporter.role == "frontend":
                status["frontends"].append({**report.status, "ready": reporter.state.ready})
            else:
                status.update(report.status)
        status["frontends"].sort(key=lambda frontend: frontend["pid"])
        status["metrics"] = _totals(merge([*self._gone, *(r.last for r in self._reporters.values())]))
        return status

    async def silent(self, rounds: dict[str, int]) -> list[tuple[str, str]]:
        """Ask every process for a sign of life; return, as role and id, those that gave none in the rounds of their role.

        Rounds are counted and not seconds, so that nobody is blamed for the time in which this process was stopped.
        """
        for reporter in self._reporters.values():
            reporter.unanswered += reporter.state.ready
        await self._collect()
        return [(r.role, r.id) for r in self._reporters.values() if r.unanswered >= rounds[r.role]]

    async def quiet(self) -> bool:
        """Whether every process says that no request is under way, no backend has a lease, and no job waits for one."""
        reports = await self._collect()
        if len(reports) < len(self._reporters):
            return False
        for reporter, report in reports:
            if reporter.role == "frontend" and report.status["inflight"]:
                return False
            if reporter.role == "writer" and not _at_rest(report.status):
                return False
        return True

    # --- messages -------------------------------------------------------------------------------------------------

    async def _collect(self) -> list[tuple[Reporter, ProcessReport]]:
        asked = []
        for reporter in list(self._reporters.values()):
            number, future = self._calls.open()
            self._send(reporter.identity, messages.Collect(number))
            asked.append((reporter, number, future))
        if asked:
            await asyncio.wait([future for _, _, future in asked], timeout=_COLLECT_SECONDS)
        reports = []
        for reporter, number, future in asked:
            self._calls.forget(number)
            if succeeded(future):
                report: ProcessReport = future.result()
                reporter.last = report.metrics
                reports.append((reporter, report))
        return reports

    def _on_message(self, frames: list[bytes]) -> None:
        identity = frames[0]
        try:
            if len(frames) < 2:
                raise ProtocolError("a message without a header")
            message = unpack(frames[1], messages.ToSupervisor)
            if identity in self._reporters:
                self._reporters[identity].unanswered = 0
            match message:
                case messages.Hello():
                    self._hello(identity, message)
                case messages.StateChange():
                    self._changed(identity, message)
                case messages.Report():
                    self._calls.resolve(message.call, msgspec.json.decode(frames[2], type=ProcessReport))
                case messages.Done():
                    self._calls.resolve(message.call, None)
                case messages.Ask():
                    self._start(self._answer(identity, message))
                case messages.Forget():
                    self._start(self._let_forget(identity, message))
        except (MmprepError, msgspec.MsgspecError, IndexError):
            self._send(identity, messages.Refused(messages.Fault.of(ProtocolError("not a message of this protocol"))))

    def _hello(self, identity: bytes, hello: messages.Hello) -> None:
        if hello.protocol != PROTOCOL:
            raise ProtocolError("another version of the protocol")
        if hello.role in {"frontend", "writer", "remote"}:
            state = messages.StateChange(False, "starting")
            self.gone(hello.role, hello.id)  # a hello of the one before may have been read after its end
            self._reporters[identity] = Reporter(identity, hello.role, hello.id, state, _EMPTY)
        self._send(identity, messages.SupervisorWelcome(PROTOCOL))
        if self._begun and identity in self._reporters:
            self._send(identity, _BEGUN)

    def _changed(self, identity: bytes, change: messages.StateChange) -> None:
        reporter = self._reporters.get(identity)
        if reporter is not None:
            reporter.state = change
            self._on_state()

    async def _answer(self, identity: bytes, ask: messages.Ask) -> None:
        answer: Any = await (self.status() if ask.subject == "status" else self.metrics())
        self._send(identity, messages.Told(ask.call), msgspec.json.encode(answer))

    async def _let_forget(self, identity: bytes, forget: messages.Forget) -> None:
        """Let every frontend forget a cache; one that does not say in time that it has must not be passed over."""
        asked = {}
        numbers = []
        for reporter in [r for r in self._reporters.values() if r.role == "frontend"]:
            number, asked[reporter.identity] = self._calls.open()
            numbers.append(number)
            self._send(reporter.identity, messages.Forget(number, forget.cache))
        if asked:
            await asyncio.wait(asked.values(), timeout=_FORGET_SECONDS)
        for number in numbers:
            self._calls.forget(number)
        # Who is gone has nothing to forget any more.
        if any(not done.done() and frontend in self._reporters for frontend, done in asked.items()):
            silent = ServiceUnavailable("not every frontend has answered; try again", retry_after=1.0)
            self._send(identity, messages.Failed(forget.call, messages.Fault.of(silent)))
        else:
            self._send(identity, messages.Done(forget.call))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, identity: bytes, message: msgspec.Struct, *frames: bytes) -> None:
        try:
            self._pump.send([identity, pack(message), *frames])
        except (zmq.ZMQError, MmprepError):
            self._reporters.pop(identity, None)


def _at_rest(writer: dict[str, Any]) -> bool:
    """Whether no backend has a lease, and none has a job or would be given one. For jobs that nobody pulls nobody waits."""
    pulled = [queue for queue in writer["queues"].values() if queue.get("backends")]
    return not any(backend["leases"] for backend in writer["backends"]) and not any(
        queue["depth"] or queue["delivered"] for queue in pulled
    )


def _totals(snapshot: Snapshot) -> dict[str, float]:
    """Return the counters, added up over their labels."""
    totals: dict[str, float] = {}
    for name, _, value in snapshot.counters:
        totals[name] = totals.get(name, 0) + value
    return totals
