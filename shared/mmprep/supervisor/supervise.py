"""Starts the writer and the frontends, replaces those that die, drains on SIGTERM.

While it drains the frontends say so at ``/ready``, refuse new work, end what is under way and still renew and release
leases; when nothing is under way and no lease is left, or the time is over, everything stops.

The runtime directory's service lock is taken first and let go last: whoever holds it owns everything in the directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import zmq

from mmprep.errors import StartupError
from mmprep.ports import claim_port
from mmprep.runtime import RuntimeDir
from mmprep.supervisor.child import Child
from mmprep.supervisor.desk import Desk
from mmprep.supervisor.options import ServeOptions

_log = logging.getLogger("mmprep.supervisor")

#: A child's exit status that says: what is wrong will not get better by another try.
CANNOT_START = 78

_ORPHANS_SECONDS = 5.0
_LONGEST_DELAY = 2.0
_AFTER_DRAIN = 5.0
#: Seconds between two looks for what is still under way while the service drains.
_LOOK_AGAIN = 0.05


class Supervisor:
    """One service.

    Parameters
    ----------
    options:
        What was decided.
    on_ready:
        Called once, with the HTTP port and the runtime directory, when requests are taken.
    """

    def __init__(self, options: ServeOptions, on_ready: Callable[[int, RuntimeDir], None]) -> None:
        self._options = options
        self._on_ready = on_ready
        self._runtime = RuntimeDir.prepare(options.runtime_dir)
        self._children: dict[str, Child] = {}
        self._failures: dict[str, int] = {}
        self._stopping = asyncio.Event()
        self._hurry = False
        self._failed: str | None = None
        self._announced = False
        self._port = 0

    async def run(self) -> int:
        """Serve until told to stop; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop)
        self._runtime.take()
        try:
            await self._end_orphans()
            self._runtime.remove_leftovers()
            with claim_port(self._options.host, self._options.port) as reserved:
                self._port = reserved.getsockname()[1]
                context: zmq.Context[Any] = zmq.Context()
                self._desk = Desk(context, self._runtime.supervisor, self._state_changed)
                try:
                    await self._serve()
                finally:
                    self._desk.close()
                    context.destroy(linger=0)
        finally:
            with contextlib.suppress(StartupError):
                await self._end_orphans()  # lanes of a writer that was killed are on their way out
            self._runtime.clean()
        if self._failed:
            print(f"mmprep: {self._failed}", file=sys.stderr, flush=True)  # noqa: T201 -- for the person who starts the service
            return 1
        return 0

    async def _serve(self) -> None:
        try:
            self._start("writer")
            for index in range(self._options.frontends):
                self._start(f"frontend-{index}")
            await self._stopping.wait()
        finally:
            await self._stop_all()

    # --- children -------------------------------------------------------------------------------------------------

    def _start(self, name: str) -> None:
        if self._stopping.is_set():
            return
        path = self._runtime.path
        if name == "writer":
            self._children[name] = Child(name, "mmprep_worker", self._options.writer(path), self._exited)
        else:
            settings = self._options.frontend(int(name.partition("-")[2]), path, self._port)
            self._children[name] = Child(name, "mmprep_frontend", settings, self._exited)

    def _exited(self, child: Child) -> None:
        role, _, number = child.name.partition("-")
        self._desk.gone(role, number or "0")
        if self._stopping.is_set():
            return
        # What once could start is tried again: whatever it lacks now, as room in /dev/shm, may come back.
        if child.status == CANNOT_START and not self._announced:
            self._fail(f"the {role} could not start; its message stands above")
            return
        _log.warning("%s (pid %d) ended with status %s and is replaced", child.name, child.pid, child.status)
        failures = self._failures.get(child.name, 0)
        self._failures[child.name] = failures + 1
        delay = 0.0 if failures == 0 else min(0.1 * 2**failures, _LONGEST_DELAY)
        asyncio.get_running_loop().call_later(delay, self._start, child.name)

    def _state_changed(self) -> None:
        names = ["writer", *(f"frontend-{index}" for index in range(self._options.frontends))]
        ready = True
        for name in names:
            role, _, number = name.partition("-")
            state = self._desk.state(role, number or "0")
            if state is not None and state.fatal:
                self._fail(state.reason)
                return
            if state is None or not state.ready:
                ready = False
            else:
                self._failures[name] = 0
        if ready and not self._announced:
            self._announced = True
            self._on_ready(self._port, self._runtime)

    def _fail(self, reason: str) -> None:
        if not self._stopping.is_set():
            self._failed = reason
            self._stopping.set()

    # --- the beginning and the end --------------------------------------------------------------------------------

    async def _end_orphans(self) -> None:
        """Wait for, then kill, processes that a killed supervisor of this directory left: they still own its files."""
        deadline = time.monotonic() + _ORPHANS_SECONDS
        while orphans := [h for h in self._runtime.holders() if h.role in {"writer", "lane", "frontend"}]:
            if time.monotonic() > deadline + _ORPHANS_SECONDS:
                raise StartupError("processes of an earlier service do not end; stop them, then start again")
            if time.monotonic() > deadline:
                for orphan in orphans:
                    if orphan.pid:
                        os.kill(orphan.pid, signal.SIGKILL)
            await asyncio.sleep(0.05)

    def _told_to_stop(self) -> None:
        if self._stopping.is_set():
            self._hurry = True
            for child in self._children.values():
                child.signal(signal.SIGKILL)
        self._stopping.set()

    async def _stop_all(self) -> None:
        """Drain the frontends, give leases their time, then stop everything; the writer last, whose lanes end with it."""
        deadline = time.monotonic() + self._options.grace
        frontends = [child for name, child in self._children.items() if name != "writer"]
        for child in frontends:
            child.signal(signal.SIGTERM)
        if frontends:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.grace):
                    await self._until_quiet()
        left = max(0.0, deadline - time.monotonic())
        await asyncio.gather(*(child.stop(left + _AFTER_DRAIN) for child in frontends))
        writer = self._children.get("writer")
        if writer is not None:
            await writer.stop(_AFTER_DRAIN)

    async def _until_quiet(self) -> None:
        while True:
            if self._hurry or await self._desk.quiet():
                return
            await asyncio.sleep(_LOOK_AGAIN)


def supervise(options: ServeOptions, on_ready: Callable[[int, RuntimeDir], None]) -> int:
    """Run one service in this process and return its exit status; raises StartupError before anything has started."""

    async def main() -> int:
        return await Supervisor(options, on_ready).run()

    return asyncio.run(main())
