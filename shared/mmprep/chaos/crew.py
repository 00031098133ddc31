"""The processes of the load: started, listened to, started again when a fault has killed them."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Self, TypeAlias

import msgspec

from mmprep.chaos import backend, client
from mmprep.chaos.events import Ended, Event

Orders: TypeAlias = backend.Orders | client.Orders

#: Seeds that are given out are below it, so that no two lives of any two members have the same.
MOST_SEEDS = 1_000_000_000
#: Events that were heard and not entered yet; above it a talkative process has to wait.
_MOST_EVENTS = 10_000


class Member:
    """One of them.

    Parameters
    ----------
    name, role:
        ``backend`` and ``client`` are those that faults may hit.
    orders:
        Written to its standard input, whose end then tells it to stop. Each of its lives has another seed.
    heard:
        Where its events go, with its name.
    """

    def __init__(
        self,
        name: str,
        role: str,
        orders: Orders,
        heard: queue.Queue[tuple[str, Event]],
        environment: Mapping[str, str],
    ) -> None:
        self.name = name
        self.role = role
        self.ended = False
        self._orders = orders
        self._heard = heard
        self._environment = environment
        self._lives = 0
        self._start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status; negative: the signal that ended it."""
        return self._process.returncode

    def gone(self) -> bool:
        """Whether its process has exited; all that it said has then been heard."""
        return self._process.poll() is not None and not self._reader.is_alive()

    def again(self) -> None:
        """Start it again."""
        self._close()
        self._start()

    def stop(self) -> None:
        """Tell it to stop."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._close()

    def _start(self) -> None:
        module = "mmprep.chaos.backend" if self.role == "backend" else "mmprep.chaos.client"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **self._environment},
        )
        assert self._process.stdin is not None
        orders = msgspec.structs.replace(self._orders, seed=self._orders.seed + self._lives * MOST_SEEDS)
        self._lives += 1
        with contextlib.suppress(OSError):
            self._process.stdin.write(msgspec.json.encode(orders) + b"\n")
            self._process.stdin.flush()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        decode = msgspec.json.Decoder(Event).decode
        for line in self._process.stdout:
            if not line.endswith(b"\n"):
                return  # killed in the middle of a word
            event: Event = decode(line)
            if isinstance(event, Ended):
                self.ended = True
            self._heard.put((self.name, event))

    def _close(self) -> None:
        self.stop()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Crew:
    """All of them; a context manager at whose end none is left."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.members: list[Member] = []
        self.heard: queue.Queue[tuple[str, Event]] = queue.Queue(maxsize=_MOST_EVENTS)
        self._environment = environment

    def add(self, name: str, role: str, orders: Orders) -> None:
        """Start one more."""
        self.members.append(Member(name, role, orders, self.heard, self._environment))

    def of(self, role: str) -> list[Member]:
        """Return the members of a role."""
        return [member for member in self.members if member.role == role]

    def replace_the_dead(self) -> list[str]:
        """Start those again that are gone, and return the names of those that nobody has killed."""
        dead = [member for member in self.members if member.gone()]
        by_themselves = [member.name for member in dead if member.status != -signal.SIGKILL]
        for member in dead:
            member.again()
        return by_themselves

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        listening = threading.Event()

        def pass_over() -> None:  # readers must not wait for room in the queue
            while not listening.is_set():
                with contextlib.suppress(queue.Empty):
                    self.heard.get(timeout=0.1)

        thread = threading.Thread(target=pass_over)
        thread.start()
        for member in self.members:
            member.kill()
        listening.set()
        thread.join()
