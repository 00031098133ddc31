"""The books of a chaos run: events and faults in, a report and a verdict out. No clock, no process.

What must be zero: wrong bytes, leaks, calls without an answer, and errors that say "do not try again" although nothing was
wrong with the call. Of the latter, those that the faults themselves make right are *provoked*: a backend that is dead has
no registration, and a medium over which two lanes were killed is refused for a minute.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmprep.chaos.events import Called, Ended, Event, Failed, Held, Started

UNANSWERED = "unanswered"

#: Seconds before a writer's kill, and after service is back, over which hit rates are compared.
HIT_WINDOW = 5.0
#: How long a medium is refused over which two lanes were lost, and what its refusal says.
_QUARANTINE = 60.0
_QUARANTINED = "Processing this medium broke off"
#: Until the writer has seen that a process lock fell.
_DEATH_IS_KNOWN = 1.0
_LISTED = 20


class Tally:
    """The books."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.retries = 0
        self.errors: Counter[tuple[str, str, bool]] = Counter()
        self.unexpected: list[str] = []
        self.provoked: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.wrong_bytes = 0
        self.wrong: list[str] = []
        self.leaks: list[str] = []
        self.unanswered = 0
        self.faults: Counter[str] = Counter()
        self.notes: list[str] = []
        self._answers: list[tuple[float, float, bool]] = []
        self._hits: list[tuple[float, int, int]] = []
        self._doubtful: list[Failed] = []
        self._down: dict[str, list[list[float]]] = defaultdict(list)
        self._lane_losses: list[float] = []
        self._writer_kills: list[float] = []

    # --- what happened --------------------------------------------------------------------------------------------

    def event(self, source: str, event: Event) -> None:
        """Enter what the process ``source`` has told."""
        match event:
            case Called():
                self._called(source, event)
            case Failed():
                self.errors[event.what, event.error, event.retryable] += 1
                if not event.retryable:
                    self._doubtful.append(event)
            case Held():
                self.reads[event.way] += event.reads
                self._wrong(event.wrong, f"{source} read {event.wrong} wrong bytes ({event.way})")
            case Started():
                self._up(source, event.at)
            case Ended():
                if event.calls:
                    self.unanswered += event.calls
                    self.notes.append(f"{source} ended with {event.calls} calls without an outcome")

    def fault(self, kind: str, at: float, victim: str = "") -> None:
        """Enter a fault; ``victim`` names the process of the load that it hit."""
        self.faults[kind] += 1
        if kind.startswith("kill writer") or kind == "fill /dev/shm, kill writer":
            self._writer_kills.append(at)
        elif kind == "kill lane":
            self._lane_losses.append(at)
        if kind in {"kill backend", "kill client"}:
            self._down[victim].append([at, np.inf])

    def leak(self, what: str) -> None:
        """Enter something that was left behind."""
        self.leaks.append(what)

    def stuck(self, what: str) -> None:
        """Enter something that waits without end; it counts as an unanswered call."""
        self.unanswered += 1
        self.notes.append(what)

    def _called(self, source: str, call: Called) -> None:
        self.calls[call.kind, call.outcome] += 1
        self.retries += call.tries - 1
        self._wrong(call.wrong, f"{source} got {call.wrong} wrong bytes ({call.kind})")
        if call.outcome == UNANSWERED:
            self.unanswered += 1
            self.notes.append(f"{source}: no answer to a call ({call.kind}) after {call.end - call.start:.1f} s")
        if call.outcome == "ok":
            self._answers.append((call.start, call.end, call.cold))
            if call.lookups:
                self._hits.append((call.end, call.lookups, call.hits))

    def _wrong(self, nbytes: int, what: str) -> None:
        self.wrong_bytes += nbytes
        if nbytes:
            self.wrong.append(what)

    def _up(self, source: str, at: float) -> None:
        for interval in self._down[source]:
            interval[1] = min(interval[1], at)

    # --- what it means --------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Part the errors that say "do not try again" into provoked and unexpected ones; once, at the end."""
        doubtful, self._doubtful = self._doubtful, []
        for error in doubtful:
            reason = self._provocation(error)
            if reason is None:
                self.unexpected.append(f"{error.what}: {error.error}: {error.message}")
            else:
                self.provoked[reason] += 1

    def _provocation(self, error: Failed) -> str | None:
        if error.message.startswith(_QUARANTINED):
            since = error.start - 2 * _QUARANTINE
            if sum(since <= at <= error.end for at in self._lane_losses + self._writer_kills) > 1:
                return "a medium over which two lanes were killed"
        if error.backend is not None:
            for start, end in self._down[error.backend]:
                if start <= error.end and error.start <= end + _DEATH_IS_KNOWN:
                    return "a backend that had been killed"
        return None

    @property
    def passed(self) -> bool:
        """Whether everything that must be zero is; after :meth:`judge`."""
        return not (self.wrong_bytes or self.leaks or self.unanswered or self.unexpected)

    def report(self) -> dict[str, Any]:
        """Return everything as plain data; after :meth:`judge`."""
        ok = sum(count for (_, outcome), count in self.calls.items() if outcome == "ok")
        return {
            "passed": self.passed,
            "wrong_bytes": self.wrong_bytes,
            "leaks": len(self.leaks),
            "unanswered": self.unanswered,
            "unexpected_errors": len(self.unexpected),
            "calls": sum(self.calls.values()),
            "answered_right": ok,
            "retries": self.retries,
            "faults": sum(self.faults.values()),
            "reads": sum(self.reads.values()),
            "stale_reads_refused": self._read_errors("StaleAddress"),
            "leases_lost": self._read_errors("LeaseLost"),
            "longest_gap": self._longest_gap(),
            "after_writer_kill": self._after_writer_kills(),
            "hit_rate": self._hit_rates(),
            "calls_by_kind": _nested(self.calls),
            "faults_by_kind": dict(sorted(self.faults.items())),
            "reads_by_way": dict(sorted(self.reads.items())),
            "retryable_errors": _nested({(w, t): n for (w, t, again), n in self.errors.items() if again}),
            "other_errors": _nested({(w, t): n for (w, t, again), n in self.errors.items() if not again}),
            "provoked_errors": dict(self.provoked),
            "unexpected": self.unexpected[:_LISTED],
            "wrong": self.wrong[:_LISTED],
            "left_behind": self.leaks[:_LISTED],
            "notes": self.notes[:_LISTED],
        }

    def _read_errors(self, kind: str) -> int:
        return sum(count for (_, name, _), count in self.errors.items() if name == kind)

    def _longest_gap(self) -> dict[str, Any]:
        """Return the longest time without an answer, and when it began, in seconds after the first answer."""
        ends = np.sort(np.array([end for _, end, _ in self._answers]))
        if len(ends) < 2:
            return {"seconds": None, "began": None}
        longest = int(np.diff(ends).argmax())
        seconds, began = float(ends[longest + 1] - ends[longest]), float(ends[longest] - ends[0])
        return {"seconds": round(seconds, 2), "began": round(began, 1)}

    def _after_writer_kills(self) -> dict[str, Any]:
        """Return the seconds from a writer's kill to the end of the next call that began after it, any and cold ones."""
        return {
            "any_answer": _summary(self._next_answers(self._answers)),
            "answer_that_needs_a_lane": _summary(self._next_answers([a for a in self._answers if a[2]])),
        }

    def _next_answers(self, answers: Sequence[tuple[float, float, bool]]) -> list[float]:
        starts, ends = _columns([(start, end) for start, end, _ in answers])
        return [after for kill in self._writer_kills if (after := _next(starts, ends, kill)) is not None]

    def _hit_rates(self) -> dict[str, Any]:
        """Return the hit rates of re-used pictures in the windows before writers' kills and after service is back."""
        starts, ends = _columns([(start, end) for start, end, _ in self._answers])
        at, lookups, hits = _columns(self._hits, 3)
        rates: dict[str, Any] = {"all": _rate(lookups, hits)}
        for name in ("before", "after"):
            inside = np.zeros(len(at), bool)
            for kill in self._writer_kills:
                after = _next(starts, ends, kill)
                if after is not None:
                    first = kill - HIT_WINDOW if name == "before" else kill + after
                    inside |= (first <= at) & (at < first + HIT_WINDOW)
            rates[name] = _rate(lookups[inside], hits[inside])
        return rates


def _columns(rows: Sequence[Sequence[float]], count: int = 2) -> list[NDArray[np.float64]]:
    return list(np.array(rows, float).reshape(-1, count).T)


def _next(starts: NDArray[np.float64], ends: NDArray[np.float64], kill: float) -> float | None:
    later = ends[starts > kill]
    return float(later.min()) - kill if len(later) else None


def _rate(lookups: NDArray[np.float64], hits: NDArray[np.float64]) -> dict[str, Any]:
    total = int(lookups.sum())
    return {"lookups": total, "rate": round(float(hits.sum()) / total, 3) if total else None}


def _summary(seconds: list[float]) -> dict[str, Any]:
    if not seconds:
        return {"kills": 0, "median_seconds": None, "max_seconds": None}
    median, longest = round(float(np.median(seconds)), 2), round(max(seconds), 2)
    return {"kills": len(seconds), "median_seconds": median, "max_seconds": longest}


def _nested(counts: dict[tuple[str, str], int] | Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    nested: dict[str, dict[str, int]] = {}
    for (first, second), count in sorted(counts.items()):
        nested.setdefault(first, {})[second] = count
    return nested
