"""The process of the door for backends on other hosts: opens it, reports, and ends when it is told to."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import uvloop
import zmq

from mmprep.allocator import keep_memory
from mmprep.errors import MmprepError, StartupError
from mmprep.metrics import Metrics, ProcessReport
from mmprep.process_lock import ProcessLock
from mmprep.remote.endpoint import tcp_to_bind
from mmprep.runtime import RuntimeDir
from mmprep.settings import CANNOT_START, RemoteSettings, read_settings
from mmprep.wire import messages
from mmprep_frontend.remote.door import RemoteDoor
from mmprep_frontend.supervision import SupervisorLink

_INPUT = 0
#: Of the heap, for the next chunks.
_KEPT_BYTES = 32 << 20
#: ZeroMQ's threads, which encrypt.
_IO_THREADS = 2


class RemoteProcess:
    """Everything of the process, on the running loop."""

    def __init__(self, settings: RemoteSettings) -> None:
        self._runtime = RuntimeDir(settings.runtime_dir)
        self._lock = ProcessLock(self._runtime.lock_path("remote", "0"))
        if not self._lock.acquire():
            raise StartupError("the door of an earlier service has not ended; stop it, then start again")
        self._stop = asyncio.Event()
        self._metrics = Metrics()
        self._context: zmq.Context[Any] = zmq.Context(_IO_THREADS)
        self._door = RemoteDoor(
            self._context,
            self._runtime,
            tcp_to_bind(settings.endpoint, "--remote-endpoint"),
            settings,
            self._metrics,
        )
        self._supervisor = SupervisorLink(
            self._context, self._runtime.supervisor, 0, self._report, _forget, role="remote"
        )

    async def run(self) -> None:
        """Serve until SIGTERM, or until the supervisor is gone."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        loop.add_reader(_INPUT, self._input_ready)
        self._supervisor.say(messages.StateChange(True, ""))
        await self._stop.wait()
        await self._door.close()
        self._supervisor.close()
        self._context.destroy(linger=0)
        self._lock.remove()

    def _input_ready(self) -> None:
        if not os.read(_INPUT, 4096):
            asyncio.get_running_loop().remove_reader(_INPUT)
            self._stop.set()

    def _report(self) -> ProcessReport:
        status = self._door.status
        self._metrics.gauge("mmprep_remote_backends", len(status["backends"]))
        return ProcessReport(os.getpid(), self._metrics.snapshot(), {"remote": {"pid": os.getpid(), **status}})


async def _forget(_cache: messages.Cache) -> None:
    """Nothing of a cache is kept here."""


async def _run(settings: RemoteSettings) -> None:
    await RemoteProcess(settings).run()


def main() -> None:
    """Run the door; the orders come on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings: RemoteSettings = read_settings(RemoteSettings)
    settings.logs.apply()
    keep_memory(_KEPT_BYTES, arenas=1)
    try:
        uvloop.run(_run(settings))
    except MmprepError as error:
        print(f"mmprep: {error}", file=sys.stderr, flush=True)  # noqa: T201 -- before there is a log
        sys.exit(CANNOT_START)
