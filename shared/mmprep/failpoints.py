"""Points at which a test makes a real process die, stop, hang or misbehave.

They are armed by the environment variable ``MMPREP_FAILPOINTS`` and by nothing else. It is read once, when this module is
imported, so nothing that a running process is sent can arm one. Where it is not set, a point costs one look at a name.

The variable holds entries ``point=step,step,…``, separated by semicolons::

    MMPREP_FAILPOINTS="lane.filled.before=kill;writer.record.after=once:/tmp/gate,touch:/tmp/seen,kill@2"

What happens at the point, one of:

- ``kill`` (SIGKILL to itself), ``segv`` (a read at address 0), ``exit`` (status 1, without any clean-up),
- ``stop`` (SIGSTOP to itself; SIGCONT lets it go on), ``hang`` (this thread never goes on),
- ``raise`` (:class:`FailpointError`), ``garbage:<kind>`` (the code at the point sends something wrong; it knows the kinds).

``@n`` behind it: only the nth time that this process is there. Two more steps may stand before it, or ``touch`` alone:

- ``touch:<file>`` creates the file, which tells the test that the point was reached.
- ``once:<file>``: it happens only where the file can be created exclusively. So one process of the service takes it, and
  the one that replaces it does not die again. While the file exists, the entry is asleep and counts nothing: a test
  that makes the files first and removes one at a time leads one service through all points.

Of several entries for one point the first that is due is taken. ``point[Name]``: only where what is being handled there is a ``Name``, as in ``writer.send.before[Answer]``.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading

from mmprep.errors import StartupError

VARIABLE = "MMPREP_FAILPOINTS"

#: Every point, with what has happened there and what has not.
POINTS = {
    "lane.task.received": "The lane has a task with its medium, and has looked at nothing yet.",
    "lane.digest.checked": "The medium is the one that the key names; its decoder comes next.",
    "lane.granted": "The lane may write to an extent, and has not.",
    "lane.fill.middle": "The item's metadata stand in the extent, its tensors do not.",
    "lane.filled.before": "The extent is full; the writer does not know.",
    "lane.filled.after": "The writer was told that the extent is full.",
    "lane.spill.made": "A segment for one item was made; nothing stands in it.",
    "lane.spill.filled": "The item stands in its segment, the record does not.",
    "lane.send": "The lane is about to send a message. Kinds of garbage: those of mmprep_worker.lanes.garbage.",
    "writer.lanes.ended": "A writer that takes over has ended the lanes of the one before, and looked at nothing yet.",
    "writer.ring.chosen": "It has found the ring to go on with, or none; all other segments still have their names.",
    "writer.others.removed": "Their names are removed: those of spills, and of rings of earlier lives.",
    "writer.ring.claimed": "The ring's header names this writer; its directory was not read.",
    "writer.ring.restored": "The directory was read; what is wrong with it still stands in the segment.",
    "writer.segment.before": "A new ring is about to be made.",
    "writer.segment.made": "Its memory is there, and has no header.",
    "writer.segment.ready": "It is laid out; nobody has been told of it.",
    "writer.anew.lanes": "The cache starts anew: the new ring is there, the lanes have ended, no name was removed.",
    "writer.anew.spills": "The names of the spills are removed, that of the former ring is not.",
    "writer.anew.ring": "The former ring's name is removed; no reader has been told of the new one.",
    "writer.put.received": "The writer has a medium's bytes, and has not queued them.",
    "writer.record.before": "A record of the directory has changed; the segment does not have it.",
    "writer.record.after": "A record was written to the segment: of a new item first its grant's, then its publishing's.",
    "writer.lane.before": "The directory is written; a lane is about to be told something: Task, Granted, GrantedSpill, ….",
    "writer.lane.after": "A lane was told.",
    "writer.inlined.received": "The writer has tensors that travel inline; those who wait for them do not know.",
    "writer.fetch.received": "A frontend fetches such tensors; they were not sent.",
    "writer.send.before": "The directory is written; a peer is about to be told something: Wants, Answer, Done, ….",
    "writer.send.after": "A peer was told.",
    "writer.message.before": "A peer's message (Offer, Unpin, Release, Renew, …) has come and has changed nothing.",
    "writer.message.after": "A peer's message has changed the writer's state; nothing was written or said about it.",
    "frontend.offer.sent": "The writer was sent a request's keys.",
    "frontend.wants.received": "The writer wants media; none was sent.",
    "frontend.put.sent": "One wanted medium was sent.",
    "frontend.answer.received": "The writer's answer is there; the caller waits.",
    "frontend.fetch.sent": "The writer was asked for tensors that travel inline.",
    "frontend.fetched": "They are there; the writer keeps them still.",
    "frontend.unpin.before": "The caller's answer was made; the items in the ring are pinned.",
    "frontend.unpin.after": "The writer was told to unpin them.",
    "frontend.post.sent": "A job was posted; whether the writer has it is not known.",
    "remote.ask.received": "A backend on another host has asked for chunks of an item; none was sent.",
    "remote.chunk.sent": "One chunk was sent, the others that were asked for were not.",
    "remote.job.sent": "A job was passed on to a backend on another host.",
    "backend.job.received": "A job was delivered to this process, which has not looked at it.",
    "backend.ack.before": "The program is done with a job; the writer was not told.",
    "backend.lease.received": "An answer has leased an item to this process, which has not taken charge of it.",
    "backend.mapped": "The item's bytes were found where its address says; they are about to be read.",
    "backend.release.before": "The process has let go of leases; the writer does not know.",
    "backend.release.after": "The writer was told.",
}

_ENTRY = re.compile(r"(?P<point>[a-z.]+)(\[(?P<name>\w+)\])?=(?P<steps>[^;]+)")
_ACTION = re.compile(r"(?P<what>kill|segv|exit|stop|hang|raise|garbage:(?P<kind>\w+))(@(?P<nth>[1-9][0-9]*))?")


class FailpointError(Exception):
    """What ``raise`` raises: an error that no code expects."""


class _Trap:
    """One entry of the variable."""

    def __init__(self, name: str | None, steps: str) -> None:
        self.name = name
        self.once: str | None = None
        self.touch: str | None = None
        self.action: str | None = None
        self.kind: str | None = None
        self.nth: int | None = None
        self.count = 0
        for step in map(str.strip, steps.split(",")):
            word, _, rest = step.partition(":")
            if self.action is None and word in {"once", "touch"} and rest:
                setattr(self, word, rest)
            elif self.action is None and (found := _ACTION.fullmatch(step)):
                self.action, _, _ = found["what"].partition(":")
                self.kind = found["kind"]
                self.nth = int(found["nth"]) if found["nth"] else None
            else:
                raise ValueError(f"{step!r} is no step, or stands behind the action")
        if self.action is None and self.touch is None:
            raise ValueError(f"{steps!r} does nothing")

    def is_due(self, about: object) -> bool:
        """Count one passage and return whether something happens this time."""
        if self.name is not None and type(about).__name__ != self.name:
            return False
        if self.once is not None and os.path.exists(self.once):  # noqa: PTH110 -- nothing that this module needs costs more
            self.count = 0
            return False
        self.count += 1
        if self.nth is not None and self.count != self.nth:
            return False
        return self.once is None or _create(self.once)


def _create(path: str) -> bool:
    """Return whether the file was not there, and is now."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _read(text: str | None) -> dict[str, list[_Trap]] | None:
    """Return the traps by point, ``None`` where there are none; raises ValueError."""
    traps: dict[str, list[_Trap]] = {}
    for entry in filter(None, map(str.strip, (text or "").split(";"))):
        found = _ENTRY.fullmatch(entry)
        if found is None:
            raise ValueError(f"{entry!r} is not of the form point=action")
        if found["point"] not in POINTS:
            raise ValueError(f"there is no point {found['point']!r}; there are {', '.join(POINTS)}")
        traps.setdefault(found["point"], []).append(_Trap(found["name"], found["steps"]))
    return traps or None


_mistake = ""
_lock = threading.Lock()
try:
    _armed = _read(os.environ.get(VARIABLE))
except ValueError as error:
    _armed, _mistake = {}, f"{VARIABLE}: {error}"


def check() -> bool:
    """Return whether any point is armed.

    Raises
    ------
    StartupError
        The variable is not right. (A process that does not ask is told at its first point.)
    """
    if _mistake:
        raise StartupError(_mistake)
    return _armed is not None


def reach(point: str, about: object = None) -> str | None:
    """Let happen what the environment says for this point; mostly nothing.

    Parameters
    ----------
    point:
        One of :data:`POINTS`.
    about:
        What is being handled, as a message; its type's name can be asked for.

    Returns
    -------
    str or None
        The kind of garbage that the caller shall send, ``None``: none.
    """
    return None if _armed is None else _reached(point, about)


def _reached(point: str, about: object) -> str | None:
    check()
    assert _armed is not None
    assert point in POINTS, f"{point} is not registered"
    with _lock:
        trap = next((trap for trap in _armed.get(point, ()) if trap.is_due(about)), None)
    if trap is None:
        return None
    if trap.touch is not None:
        _create(trap.touch)
    _act(trap.action, point)
    return trap.kind


def _act(action: str | None, point: str) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segv":
            ctypes.string_at(0)
        case "exit":
            os._exit(1)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            while True:
                threading.Event().wait()
        case "raise":
            raise FailpointError(f"at {point}, as {VARIABLE} says")
