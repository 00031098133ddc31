"""Carries faults out: signals to real processes, garbage to real sockets, a full /dev/shm."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from mmprep.chaos import schedule
from mmprep.chaos.crew import Crew
from mmprep.chaos.garbage import send_garbage
from mmprep.chaos.schedule import Fault
from mmprep.chaos.service import Service, send
from mmprep.chaos.shm import fill_for


class Faults:
    """What faults there are, and what they have to be undone.

    Parameters
    ----------
    enter:
        Called with a fault's kind, its time and the name of the load's process that it hit.
    """

    def __init__(self, service: Service, crew: Crew, enter: Callable[[str, float, str], None]) -> None:
        self._service = service
        self._crew = crew
        self._enter = enter
        self._stopped: list[tuple[float, int]] = []
        self._threads: list[threading.Thread] = []

    def commit(self, fault: Fault) -> bool:
        """Do it; false where there is nobody to do it to at the moment."""
        if fault.kind == schedule.GARBAGE:
            self._enter(fault.kind, time.monotonic(), "")
            self._beside(lambda: send_garbage(self._service.runtime_dir, fault.seed))
            return True
        if fault.kind in {schedule.FILL, schedule.FILL_AND_KILL}:
            self._beside(lambda: fill_for(fault.seconds))
            if fault.kind == schedule.FILL_AND_KILL:
                return self._signal(fault, "writer", signal.SIGKILL)
            self._enter(fault.kind, time.monotonic(), "")
            return True
        verb, _, role = fault.kind.partition(" ")
        return self._signal(fault, role, signal.SIGKILL if verb == "kill" else signal.SIGSTOP)

    def tick(self, now: float) -> None:
        """Let those go on whose time has come."""
        for item in [item for item in self._stopped if item[0] <= now]:
            self._stopped.remove(item)
            _go_on(item[1])

    def end(self) -> None:
        """Undo all that is not over."""
        for _, pidfd in self._stopped:
            _go_on(pidfd)
        self._stopped.clear()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _signal(self, fault: Fault, role: str, number: signal.Signals) -> bool:
        if role in {"backend", "client"}:
            victims = [(member.pid, member.name) for member in self._crew.of(role) if not member.gone()]
        else:
            victims = [(pid, "") for pid in self._service.pids(role)]
        if not victims:
            return False
        pid, name = victims[int(fault.choice * len(victims))]
        if number == signal.SIGSTOP:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                return False
            self._stopped.append((time.monotonic() + fault.seconds, pidfd))
        at = time.monotonic()
        if not send(pid, number):
            return False
        self._enter(fault.kind, at, name)
        return True

    def _beside(self, work: Callable[[], object]) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=work)
        thread.start()
        self._threads.append(thread)


def _go_on(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    except ProcessLookupError:  # killed meanwhile
        pass
    finally:
        os.close(pidfd)
