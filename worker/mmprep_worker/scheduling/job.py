"""What the queues of jobs are made of: jobs, deliveries, dead letters, and the bounds."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

#: How a job leaves its queue: acknowledged, given up after too many tries, or not taken in its time.
Outcome: TypeAlias = Literal["acked", "dead", "expired"]
#: Bytes of a token: incarnation of the writer, number of the delivery.
TOKEN_SIZE = 12
_INCARNATION = 4


class Place(NamedTuple):
    """An entry that a job's tensors lie in; ``extent`` is its bytes of the ring, 0 for a spill."""

    slot: int
    generation: int
    extent: int


class Limits(NamedTuple):
    """Bounds of all queues. Sizes in bytes, times in seconds.

    Attributes
    ----------
    jobs: of one queue, delivered ones too.
    nbytes: of the jobs of all queues; one queue may have half of it.
    pinned: of the ring that all queues may hold; one queue may hold half of it. An entry that several jobs need counts once.
    queues: that there may be.
    dead: jobs on the dead-letter list of one queue.
    attempts: failed deliveries after which a job is given up.
    seconds: from a delivery to its acknowledgement.
    idle_seconds: a queue that nobody pulls from is kept for so long.
    remembered: ids of ended jobs, and tokens of acknowledged deliveries.
    """

    jobs: int
    nbytes: int
    pinned: int
    queues: int = 256
    dead: int = 64
    attempts: int = 3
    seconds: float = 60.0
    idle_seconds: float = 300.0
    remembered: int = 65_536


class Job:
    """One job.

    Attributes
    ----------
    id: unique; whoever posts it again under the same id posts the same job.
    poster: the frontend that keeps it until it has ended, as its id and instance.
    producer: whose turn it takes.
    priority: lower is more urgent.
    cost: what it takes of its producer's turn.
    nbytes: of ``content``.
    expires: when it is given up if nobody has taken it, in seconds of ``now``.
    content: opaque.
    places: of its tensors, each once.
    error: what it has in place of tensors, or ``None``; opaque.
    serial: its number, by arrival.
    attempt: deliveries so far.
    failures: deliveries that have ended without an acknowledgement and were not given back.
    avoid: the backend whose delivery failed last.
    """

    __slots__ = (
        "attempt",
        "avoid",
        "content",
        "cost",
        "error",
        "expires",
        "failures",
        "id",
        "nbytes",
        "places",
        "posted_at",
        "poster",
        "priority",
        "producer",
        "queue",
        "serial",
    )

    def __init__(
        self,
        job_id: str,
        queue: str,
        *,
        poster: tuple[str, bytes],
        producer: str,
        expires: float,
        priority: int = 0,
        cost: int = 1,
        nbytes: int = 0,
        content: Any = None,
        places: tuple[Place, ...] = (),
        error: Any = None,
    ) -> None:
        self.id = job_id
        self.queue = queue
        self.poster = poster
        self.producer = producer
        self.priority = priority
        self.cost = cost
        self.nbytes = nbytes
        self.expires = expires
        self.content = content
        self.places = places
        self.error = error
        self.posted_at = 0.0
        self.serial = 0
        self.attempt = 0
        self.failures = 0
        self.avoid = ""


class Delivery:
    """A job in the hands of a backend, until it is acknowledged, given back, or over.

    Attributes
    ----------
    token: proves to the queue that the holder's word is about this very delivery.
    backend: the holder's id.
    deadline: when it is over without an acknowledgement, in seconds of ``now``.
    job: ``None`` for one of an earlier writer whose job was not posted again (yet).
    """

    __slots__ = ("attempt", "backend", "deadline", "job", "job_id", "queue", "token")

    def __init__(
        self, token: bytes, backend: str, deadline: float, *, job_id: str, queue: str, attempt: int, job: Job | None
    ) -> None:
        self.token = token
        self.backend = backend
        self.deadline = deadline
        self.job_id = job_id
        self.queue = queue
        self.attempt = attempt
        self.job = job


class Held(NamedTuple):
    """A delivery as its holder knows it."""

    token: bytes
    queue: str
    job_id: str
    attempt: int


class DeadLetter(NamedTuple):
    """A job that was given up; ``since`` in seconds of ``now``."""

    job_id: str
    producer: str
    attempts: int
    why: str
    since: float


class Ended(NamedTuple):
    """A job has left its queue: what it holds is to be let go, and its poster is to be told."""

    job: Job
    outcome: Outcome


def token(incarnation: int, number: int) -> bytes:
    """Return the token of a delivery; no writer makes one twice, nor one that another makes."""
    return incarnation.to_bytes(_INCARNATION, "big") + number.to_bytes(TOKEN_SIZE - _INCARNATION, "big")


def token_incarnation(made: bytes) -> int:
    """Return the incarnation of the writer that made a token."""
    return int.from_bytes(made[:_INCARNATION], "big")
