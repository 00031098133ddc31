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
from mmprep.settings import CANNOT_START
from mmprep.supervisor.child import Child
from mmprep.supervisor.desk import Desk
from mmprep.supervisor.options import ServeOptions

_log = logging.getLogger("mmprep.supervisor")

#: Starts of a process that does not get ready, after which a service gives up that never was.
MOST_STARTS = 5

_ORPHANS_SECONDS = 5.0
#: The name of the door for backends on other hosts.
_REMOTE = "remote-0"
_WORDS = {"remote": "door for other hosts"}
_LONGEST_DELAY = 2.0
#: Seconds that a process gets to end, however short the drain timeout is.
_LEAST_TO_END = 0.5
#: Seconds between two questions for a sign of life, and after how many unanswered ones a process is killed. The writer may
#: be making another segment meanwhile, which takes a second or more for each of these bytes.
_ROUND_SECONDS = 4.0
_SILENT_ROUNDS = 3
_BYTES_A_ROUND = 2 << 30
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
                settings = {"media_cache": self._options.media_cache()}
                self._desk = Desk(context, self._runtime.supervisor, self._state_changed, settings)
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
            for name in self._names():
                self._start(name)
            watching = asyncio.create_task(self._watch())
            await self._stopping.wait()
            watching.cancel()
        finally:
            await self._stop_all()

    async def _watch(self) -> None:
        """Kill what has been ready and is silent for long: it hangs or is stopped, and its place is needed."""
        more = self._options.cache_size // _BYTES_A_ROUND
        while True:
            await asyncio.sleep(_ROUND_SECONDS)
            rounds = {"writer": _SILENT_ROUNDS + more, "frontend": _SILENT_ROUNDS, "remote": _SILENT_ROUNDS}
            for role, number in await self._desk.silent(rounds):
                child = self._children.get("writer" if role == "writer" else f"{role}-{number}")
                if child is not None:
                    _log.error("%s (pid %d) gives no sign of life and is killed", child.name, child.pid)
                    child.signal(signal.SIGKILL)

    # --- children -------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        """Return the names of all processes, each ``role-number``, but the writer's."""
        frontends = [f"frontend-{index}" for index in range(self._options.frontends)]
        return ["writer", *frontends, *([] if self._options.remote_endpoint is None else [_REMOTE])]

    def _start(self, name: str) -> None:
        if self._stopping.is_set():
            return
        path = self._runtime.path
        if name == "writer":
            self._children[name] = Child(name, "mmprep_worker", self._options.writer(path), self._exited)
        elif name == _REMOTE:
            self._children[name] = Child(name, "mmprep_frontend.remote", self._options.remote(path), self._exited)
        else:
            states = [self._desk.state("frontend", str(index)) for index in range(self._options.frontends)]
            joins = any(state is not None and state.ready for state in states)
            settings = self._options.frontend(int(name.partition("-")[2]), path, self._port, joins=joins)
            self._children[name] = Child(name, "mmprep_frontend", settings, self._exited)

    def _exited(self, child: Child) -> None:
        role, _, number = child.name.partition("-")
        self._desk.gone(role, number or "0")
        if self._stopping.is_set():
            return
        # What once could start is tried again: whatever it lacks now, as room in /dev/shm, may come back.
        if child.status == CANNOT_START and not self._announced:
            self._fail(f"the {_WORDS.get(role, role)} could not start; its message stands above")
            return
        _log.warning("%s (pid %d) ended with status %s and is replaced", child.name, child.pid, child.status)
        failures = self._failures.get(child.name, 0)
        self._failures[child.name] = failures + 1
        if not self._announced and failures + 1 >= MOST_STARTS:
            self._fail(
                f"the {_WORDS.get(role, role)} ended {failures + 1} times before it was ready, the last time with status {child.status}; "
                "what it said stands above"
            )
            return
        delay = 0.0 if failures == 0 else min(0.1 * 2**failures, _LONGEST_DELAY)
        asyncio.get_running_loop().call_later(delay, self._start, child.name)

    def _state_changed(self) -> None:
        ready = True
        for name in self._names():
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
            self._announcing = asyncio.create_task(self._announce())

    async def _announce(self) -> None:
        """Let ``/ready`` say so on every frontend, and then whoever has started the service."""
        await self._desk.begin()
        self._on_ready(self._port, self._runtime)

    def _fail(self, reason: str) -> None:
        if not self._stopping.is_set():
            self._failed = reason
            self._stopping.set()

    # --- the beginning and the end --------------------------------------------------------------------------------

    async def _end_orphans(self) -> None:
        """Wait for, then kill, processes that a killed supervisor of this directory left: they still own its files."""
        deadline = time.monotonic() + _ORPHANS_SECONDS
        while orphans := [h for h in self._runtime.holders() if h.role in {"writer", "lane", "frontend", "remote"}]:
            if time.monotonic() > deadline + _ORPHANS_SECONDS:
                raise StartupError("processes of an earlier service do not end; stop them, then start again")
            if time.monotonic() > deadline:
                for orphan in orphans:
                    if orphan.pid:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(orphan.pid, signal.SIGKILL)
            await asyncio.sleep(0.05)

    def _told_to_stop(self) -> None:
        if self._stopping.is_set():
            self._hurry = True
            for child in self._children.values():
                child.signal(signal.SIGKILL)
        self._stopping.set()

    async def _stop_all(self) -> None:
        """Drain the frontends, give leases their time, then stop everything; the writer last, whose lanes end with it.

        Backends on other hosts are served until nothing is under way, as those of this host are by themselves.

        What does not end within the drain timeout is killed.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._options.drain_timeout
        others = [child for name, child in self._children.items() if name != "writer"]
        for child in others:
            if child.name != _REMOTE:
                child.signal(signal.SIGTERM)
        if others:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.grace):
                    await self._until_quiet()
        left = max(_LEAST_TO_END, (deadline - loop.time()) / 2)
        await asyncio.gather(*(child.stop(left) for child in others))
        writer = self._children.get("writer")
        if writer is not None:
            await writer.stop(max(_LEAST_TO_END, deadline - loop.time()))

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
