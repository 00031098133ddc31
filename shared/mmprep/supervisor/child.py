"""A child process that is told what to do on its standard input, and whose exit the kernel reports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import msgspec

#: transformers would advise, in each process, to install torch, which nothing here needs.
_ENVIRONMENT = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}


class Child:
    """One running child.

    Parameters
    ----------
    module:
        Run as ``python -m module``.
    settings:
        Written to its standard input, which then stays open: its end tells the child that we are gone.
    on_exit:
        Called on the loop with this child once it has exited and been reaped.
    """

    def __init__(self, name: str, module: str, settings: msgspec.Struct, on_exit: Callable[[Child], None]) -> None:
        self.name = name
        self.status: int | None = None
        self.exited = asyncio.Event()
        self._on_exit = on_exit
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**_ENVIRONMENT, **os.environ},
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(msgspec.json.encode(settings) + b"\n")
            self._process.stdin.flush()
        self._pidfd = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has exited."""
        if self.status is None:
            signal.pidfd_send_signal(self._pidfd, number)

    async def stop(self, seconds: float) -> None:
        """Ask the child to end; kill it after ``seconds``; return when it is gone."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(seconds):
                await self.exited.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.exited.wait()

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self.status = self._process.wait()
        os.close(self._pidfd)
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self.exited.set()
        self._on_exit(self)
