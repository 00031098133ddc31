"""The writer's child processes: starts lanes, notices their exit, kills those that hang.

An exit is a fact only when the kernel says so: a lane counts as gone when its pidfd is readable and it has been waited
for, never because it is silent.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import msgspec

from mmprep_worker.lanes.config import LaneConfig

_FIRST_DELAY = 0.0
#: A start takes seconds of CPU time: a lane that never gets warm is not to take those of others.
_LONGEST_DELAY = 30.0
#: What a lane gets to be warm. Compiling kernels takes seconds of CPU time, beside many others on a busy machine.
_START_SECONDS = 180.0
#: There is a lane for each core: numpy's linear algebra is not to start a thread for each in every lane.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class _Child:
    __slots__ = ("due", "pidfd", "process", "token")

    def __init__(self, process: subprocess.Popen[bytes], token: bytes, due: float) -> None:
        self.process = process
        self.token = token
        self.due = due
        self.pidfd = os.pidfd_open(process.pid)


class LanePool:
    """All lanes of one writer.

    Parameters
    ----------
    count:
        How many lanes.
    configure:
        Returns a lane's orders for its number and fresh token.
    now:
        Monotonic seconds.
    """

    def __init__(self, count: int, configure: Callable[[int, bytes], LaneConfig], now: float) -> None:
        self._configure = configure
        self._children: dict[int, _Child] = {}
        self._failures = [0] * count
        self._start_at: dict[int, float] = dict.fromkeys(range(count), now)

    @property
    def wake_at(self) -> float:
        """When :meth:`start_due` has something to do."""
        starting = [child.due for child in self._children.values()]
        return min([*self._start_at.values(), *starting], default=math.inf)

    @property
    def running(self) -> list[int]:
        """The numbers of the lanes that were started and whose end :meth:`exited` has not been told."""
        return list(self._children)

    def pidfd(self, number: int) -> int:
        """Return the descriptor of a running lane that is readable when it has exited."""
        return self._children[number].pidfd

    def pid(self, number: int) -> int:
        """Return the lane's process id, 0 where it does not run."""
        child = self._children.get(number)
        return 0 if child is None else child.process.pid

    def start_due(self, now: float) -> list[int]:
        """Start the lanes whose time has come and return their numbers; kill those that do not get warm."""
        for number, child in self._children.items():
            if child.due <= now:
                child.due = math.inf
                self.kill(number)
        due = [number for number, when in self._start_at.items() if when <= now]
        for number in due:
            del self._start_at[number]
            self._children[number] = self._start(number, now + _START_SECONDS)
        return due

    def is_child(self, number: int, token: bytes) -> bool:
        """Whether ``token`` is that of the living lane ``number``."""
        child = self._children.get(number)
        return child is not None and child.token == token

    def settled(self, number: int) -> None:
        """The lane is warm: its next restart is immediate."""
        self._failures[number] = 0
        self._children[number].due = math.inf

    def failures(self, number: int) -> int:
        """Return how many times in a row the lane has ended before it was warm."""
        return self._failures[number]

    def exited(self, number: int, now: float) -> int:
        """Reap an exited lane, plan its replacement, and return its exit status (negative: the signal)."""
        child = self._children.pop(number)
        status = child.process.wait()
        _close(child)
        delay = _FIRST_DELAY if self._failures[number] == 0 else min(0.1 * 2 ** self._failures[number], _LONGEST_DELAY)
        self._failures[number] += 1
        self._start_at[number] = now + delay
        return status

    def kill(self, number: int) -> None:
        """Kill a lane at once; its pidfd tells when it is gone."""
        child = self._children.get(number)
        if child is not None:
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def stop(self) -> None:
        """Kill every lane and wait until each is gone."""
        self._start_at.clear()
        for number in list(self._children):
            self.kill(number)
        for child in self._children.values():
            child.process.wait()
            _close(child)
        self._children.clear()

    def _start(self, number: int, due: float) -> _Child:
        token = os.urandom(32)
        process = subprocess.Popen(
            [sys.executable, "-m", "mmprep_worker.lanes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**_ENVIRONMENT, **os.environ},
        )
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.json.encode(self._configure(number, token)) + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass
        return _Child(process, token, due)


def _close(child: _Child) -> None:
    os.close(child.pidfd)
    if child.process.stdin is not None:
        # One that died before it read its configuration leaves some of it to be written.
        with suppress(BrokenPipeError):
            child.process.stdin.close()
