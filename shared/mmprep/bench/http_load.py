"""The load of the requests' measurement, a process of its own: renders over HTTP, on connections that are kept.

Modes: *cached* (a few pictures, all seen before, with a question that repeats), *uuid* (these, only named), *cold* (every
picture has bytes of its own), *turns* (conversations of up to four turns, each with one more of the pictures), *text* (200
words, others each time). Addresses are taken by a backend in this process, which opens each and lets go of it.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmprep.backend import Backend
from mmprep.bench.pictures import distinct
from mmprep.bench.running import read_orders, say_answer, say_ready
from mmprep.errors import ServiceUnavailable

_PATH = "/v1/chat/completions/render"
_QUESTION = "What is on this picture? Answer in one sentence."
_WORDS = 200
_TURNS = 4
_BUSY = 429
#: Seconds until a connection that was refused asks for the next thing.
_BUSY_SECONDS = 0.05


class Bodies:
    """Makes the requests of one mode.

    Parameters
    ----------
    fields:
        That every request has beside its messages.
    """

    def __init__(self, pictures: list[bytes], fields: dict[str, Any]) -> None:
        self._pictures = pictures
        self._fields = fields
        self._random = random.Random(os.getpid())  # noqa: S311 -- words, not secrets
        # The high bits are this process's, so that no two load generators send the same picture.
        self._numbers = itertools.count(os.getpid() << 32)

    def body(self, messages: list[dict[str, Any]]) -> bytes:
        """Return a request as JSON."""
        return json.dumps({"messages": messages, **self._fields}).encode()

    def first(self) -> list[bytes]:
        """Return the requests after which every picture, and its name, is known."""
        return [self.body([_user(_part(picture, str(n)))]) for n, picture in enumerate(self._pictures)]

    def cached(self) -> Iterator[bytes]:
        """Pictures that are known, without their names."""
        return itertools.cycle([self.body([_user(_part(picture))]) for picture in self._pictures])

    def uuid(self) -> Iterator[bytes]:
        """Pictures that are known, only named."""
        return itertools.cycle([self.body([_user(_part(None, str(n)))]) for n in range(len(self._pictures))])

    def cold(self) -> Iterator[bytes]:
        """Pictures that nobody has seen."""
        for picture in itertools.cycle(self._pictures):
            yield self.body([_user(_part(distinct(picture, next(self._numbers))))])

    def turns(self) -> Iterator[bytes]:
        """Conversations that grow by a picture and an answer, one request a turn; every question is a new one."""
        for start in itertools.cycle(range(len(self._pictures))):
            messages: list[dict[str, Any]] = []
            for turn in range(_TURNS):
                picture = self._pictures[(start + turn) % len(self._pictures)]
                messages += [_user(_part(picture), self._words(12))]
                yield self.body(messages)
                messages += [{"role": "assistant", "content": self._words(30)}]

    def text(self) -> Iterator[bytes]:
        """Texts of 200 words, each another one."""
        while True:
            yield self.body([{"role": "user", "content": self._words(_WORDS)}])

    def _words(self, count: int) -> str:
        return " ".join(self._random.choices(_VOCABULARY, k=count))


_VOCABULARY = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "that",
    "it",
    "is",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "they",
    "at",
    "be",
    "this",
    "from",
    "have",
    "or",
    "one",
    "had",
    "by",
    "word",
    "but",
    "not",
    "what",
    "all",
    "were",
    "we",
    "when",
    "your",
    "can",
    "said",
    "there",
    "use",
    "an",
    "each",
    "which",
    "she",
    "do",
    "how",
    "their",
    "if",
    "will",
    "up",
    "other",
    "about",
    "out",
    "many",
    "then",
    "them",
    "these",
    "so",
    "some",
    "her",
    "would",
    "make",
    "like",
    "him",
    "into",
    "time",
    "has",
    "look",
    "two",
    "more",
    "write",
    "go",
    "see",
    "number",
    "no",
    "way",
    "could",
    "people",
    "picture",
    "engine",
    "request",
    "memory",
    "tensor",
    "question",
    "answer",
    "another",
    "between",
]


def _part(picture: bytes | None, uuid: str | None = None) -> dict[str, Any]:
    named = {} if uuid is None else {"uuid": uuid}
    if picture is None:
        return {"type": "image_url", "image_url": None, **named}
    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    return {"type": "image_url", "image_url": {"url": url}, **named}


def _user(part: dict[str, Any], question: str = _QUESTION) -> dict[str, Any]:
    return {"role": "user", "content": [part, {"type": "text", "text": question}]}


class Load:
    """Connections that ask one after the other.

    Parameters
    ----------
    backend:
        Takes the addresses in answers.
    """

    def __init__(self, port: int, bodies: Iterator[bytes], backend: Backend | None) -> None:
        self._port = port
        self._bodies = bodies
        self._backend = backend
        self._guard = threading.Lock()
        self.latencies: list[float] = []
        self.nbytes = 0
        #: Requests that the service had no room for; they are no requests of the measurement.
        self.refused = 0

    def keep(self, in_flight: int, seconds: float) -> None:
        """Keep ``in_flight`` requests under way for ``seconds``; raises what one of them met."""
        end = time.perf_counter() + seconds
        failures: list[BaseException] = []
        work = [
            threading.Thread(target=self._connection, args=(lambda: time.perf_counter() < end, failures))
            for _ in range(in_flight)
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        if failures:
            raise failures[0]

    def _connection(self, more: Callable[[], bool], failures: list[BaseException]) -> None:
        try:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=120.0)) as connection:
                while more() and not failures:
                    with self._guard:
                        body = next(self._bodies)
                    self.one(connection, body)
        except Exception as error:  # noqa: BLE001 -- raised again by who started this thread
            failures.append(error)

    def one(self, connection: http.client.HTTPConnection, body: bytes) -> None:
        """Send one request and wait for its answer."""
        started = time.perf_counter()
        connection.request("POST", _PATH, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        elapsed = time.perf_counter() - started
        if response.status == _BUSY:
            with self._guard:
                self.refused += 1
            time.sleep(_BUSY_SECONDS)
            return
        if response.status != 200:
            raise ServiceUnavailable(f"a request of the benchmark was answered with {response.status}")
        if self._backend is not None:
            for address in json.loads(answer)["features"]["mm_addresses"]["image"]:
                self._backend.open(address).release()
        with self._guard:
            self.latencies.append(elapsed)
            self.nbytes += len(answer)


def _measure(orders: dict[str, Any], pictures: list[bytes]) -> None:
    shm = orders["payload"] == "shm"
    with contextlib.ExitStack() as stack:
        backend = None
        fields = {"mm_payload": orders["payload"]}
        if shm:
            backend = stack.enter_context(Backend(f"ipc://{orders['runtime_dir']}", id=f"bench-{os.getpid()}"))
            fields["backend_id"] = f"bench-{os.getpid()}"
        bodies = Bodies(pictures, fields)
        mode: Callable[[], Iterator[bytes]] = getattr(bodies, orders["mode"])
        load = Load(orders["port"], mode(), backend)
        first = [] if orders["mode"] in {"cold", "text"} else bodies.first()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", orders["port"], timeout=120.0)) as connection:
            for body in (*first, *itertools.islice(mode(), orders["warm_up"])):
                load.one(connection, body)
        load.latencies.clear()
        load.nbytes = load.refused = 0
        say_ready()
        started = time.perf_counter()
        load.keep(orders["in_flight"], orders["seconds"])
        elapsed = time.perf_counter() - started
    say_answer(
        {
            "seconds": elapsed,
            "latencies_ms": [round(1000 * latency, 4) for latency in load.latencies],
            "bytes": load.nbytes,
            "refused": load.refused,
        }
    )


if __name__ == "__main__":
    given = read_orders()
    _measure(given, [Path(path).read_bytes() for path in given["pictures"]])
