"""The loop: take an input that did something new, change it, look at what comes out.

An input is kept for further changes when its *outcome* is new: what was accepted, or the error without its numbers. That
guides the search without an instrumented interpreter, and the same seed finds the same inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

#: Seconds after which one execution counts as one that never ends; most take less than a millisecond.
STUCK = 20
#: Bytes that one execution may take at its peak: inputs have at most 70 kB, plain data is larger than what it was packed in.
MEMORY = 16 << 20
#: Executions between two looks at the memory, beside those with a new outcome.
_LOOK_EVERY = 64
_KEPT = 2000
#: Of the changed inputs, how many are made from those with the newest outcomes.
_NEWEST = 0.3


def outcome_of(error: BaseException) -> str:
    """Return an error without what is different each time: numbers, names and places."""
    text = str(error).split(" unknown field ")[0]
    text = re.sub(r"'[^']*'|`[^`]*`|\$\S*|0x\w+|\d+", "#", text)
    return f"{type(error).__name__}: {text[:70]}"


class Target(Protocol):
    """What is fuzzed."""

    name: str

    def corpus(self) -> list[bytes]:
        """Return valid inputs."""

    def mutate(self, rng: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        """Return a changed input."""

    def run(self, data: bytes) -> str:
        """Execute one input and check what comes out; return the outcome. Any exception is a finding."""

    def close(self) -> None:
        """Give back what was opened; the next input opens it again."""


class Finding(AssertionError):
    """An input for which the target does not hold what it promises."""

    def __init__(self, target: Target, data: bytes, error: BaseException) -> None:
        self.data = data
        super().__init__(
            f"{type(error).__name__}: {str(error)[:500]}\nreplay: ./scripts/fuzz {target.name} --replay {data.hex()}"
        )


@dataclass
class Fuzzed:
    """What a run did."""

    executions: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    #: Seconds of the slowest execution.
    slowest: float = 0.0
    #: Of all inputs, so that two runs can be compared.
    digest: str = ""

    @property
    def accepted(self) -> int:
        """How many inputs were taken for valid."""
        return sum(count for outcome, count in self.outcomes.items() if outcome.startswith("accepted"))

    def __str__(self) -> str:
        rate = self.executions / self.seconds if self.seconds else 0
        return (
            f"{self.executions} executions in {self.seconds:.1f} s ({rate:.0f}/s), {self.accepted} accepted, "
            f"{len(self.outcomes)} different outcomes, the slowest took {self.slowest:.2f} s"
        )


def execute(target: Target, data: bytes, *, memory: bool = True) -> str:
    """Run one input within time and memory; return the outcome.

    Raises
    ------
    Finding
        It did something that it must not do.
    """
    try:
        with _limited(memory=memory):
            return target.run(data)
    except Exception as error:
        raise Finding(target, data, error) from error


def fuzz(target: Target, *, seed: int, executions: int | None = None, seconds: float | None = None) -> Fuzzed:
    """Run the corpus and then changed inputs, until there were so many, or for so long.

    Raises
    ------
    Finding
        The first input that does something that it must not do.
    """
    with contextlib.closing(target):
        return _fuzz(target, seed, executions, seconds)


def _fuzz(target: Target, seed: int, executions: int | None, seconds: float | None) -> Fuzzed:
    rng = Random(f"{target.name} {seed}")
    start = time.monotonic()
    done = Fuzzed()
    corpus = list(target.corpus())
    for data in corpus:
        outcome = execute(target, data)
        assert outcome.startswith("accepted"), f"the corpus of {target.name} has an input that is refused: {outcome}"
        done.outcomes[outcome] += 1
    done.executions = len(corpus)
    digest = hashlib.sha256()
    known = set(done.outcomes)
    while (executions is None or done.executions < executions) and (
        seconds is None or time.monotonic() - start < seconds
    ):
        newest = rng.random() < _NEWEST
        data = target.mutate(rng, rng.choice(corpus[-20:] if newest else corpus), corpus)
        digest.update(data)
        begun = time.monotonic()
        outcome = execute(target, data, memory=done.executions % _LOOK_EVERY == 0)
        done.slowest = max(done.slowest, time.monotonic() - begun)
        done.executions += 1
        done.outcomes[outcome] += 1
        if outcome not in known:
            known.add(outcome)
            execute(target, data)
            if len(corpus) < _KEPT:
                corpus.append(data)
    done.seconds = time.monotonic() - start
    done.digest = digest.hexdigest()
    return done


@contextlib.contextmanager
def _limited(*, memory: bool) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, STUCK)
    if memory:
        tracemalloc.start()
    try:
        yield
        if memory:
            peak = tracemalloc.get_traced_memory()[1]
            assert peak < MEMORY, f"it took {peak} bytes"
    finally:
        if memory:
            tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _stuck(*_: object) -> None:
    raise TimeoutError(f"it took more than {STUCK} seconds")


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Let executions that do not end raise TimeoutError; only in the main thread."""
    before = signal.signal(signal.SIGALRM, _stuck)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
