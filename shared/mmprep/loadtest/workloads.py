"""What is asked: endless chats with generated pictures, the same for the same seed. Nothing is downloaded.

Pictures are JPEGs of the sizes in bytes that photographs have. Where every one has to be new, a comment in it differs: the
bytes, and so the hash, are others, and decoding costs the same.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Final, TypeGuard

from mmprep.bench.pictures import FULL_HD, HD, TWELVE_MEGAPIXELS, VGA, Size, distinct, jpeg
from mmprep.errors import InvalidRequest

SIZES: Final = {size.name: size for size in (VGA, HD, FULL_HD, TWELVE_MEGAPIXELS)}
#: About how many bytes their files have.
_BYTES: Final = {VGA: 118_000, HD: 271_000, FULL_HD: 509_000, TWELVE_MEGAPIXELS: 2_200_000}
#: Of a mixed workload: size and weight.
_MIX: Final = ((VGA, 60), (HD, 25), (FULL_HD, 14), (TWELVE_MEGAPIXELS, 1))
#: Pictures that differ as pictures; more are made of them by their bytes.
_DRAWN: Final = 8
_WORDS: Final = [
    "the",
    "a",
    "this",
    "that",
    "one",
    "light",
    "river",
    "stone",
    "garden",
    "window",
    "street",
    "yellow",
    "distant",
    "broken",
    "quiet",
    "map",
    "table",
    "letter",
    "voice",
    "between",
    "under",
    "above",
    "near",
    "early",
    "never",
    "often",
    "because",
    "while",
    "which",
    "where",
    "mountain",
    "harbour",
    "signal",
    "paper",
    "copper",
    "engine",
    "morning",
    "winter",
    "number",
    "answer",
    "question",
    "picture",
    "left",
    "right",
    "behind",
    "before",
    "after",
    "small",
    "large",
    "round",
    "narrow",
    "open",
    "closed",
]
#: A trace's line is not longer.
_LONGEST_LINE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a request: what names it among those of a workload, its bytes, and a number that makes them others."""

    name: str
    drawn: bytes = field(repr=False)
    number: int | None = None

    @property
    def data(self) -> bytes:
        """The bytes of its file; made anew each time, since most workloads have more than can be kept."""
        return self.drawn if self.number is None else distinct(self.drawn, self.number)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says: pictures, then words."""

    role: str
    text: str
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes
    ----------
    turns: of its chat.
    due: seconds after the start at which it is due, where the workload says so.
    """

    turns: tuple[Turn, ...]
    due: float | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """What a workload's requests look like.

    Attributes
    ----------
    size: of the pictures.
    pictures: of a request (of a conversation's first turn).
    words: of a request, or of a turn.
    population: how many different pictures there are, where they come again.
    exponent: of the Zipf law: the k-th most wanted picture is asked for in proportion to ``k ** -exponent``.
    turns: of a conversation.
    conversations: that go on side by side.
    seed: of everything that is drawn.
    """

    size: Size = VGA
    pictures: int = 1
    words: int = 20
    population: int = 100
    exponent: float = 1.0
    turns: int = 5
    conversations: int = 16
    seed: int = 0


def distinct_pictures(shape: Shape) -> Iterator[Ask]:
    """Yield requests whose pictures nobody has seen before."""
    random, numbers = Random(shape.seed), itertools.count()
    while True:
        pictures = tuple(_new(shape, next(numbers)) for _ in range(shape.pictures))
        yield _single(_text(random, shape.words), pictures)


def zipf(shape: Shape) -> Iterator[Ask]:
    """Yield requests for a population of pictures of which some are wanted far more often than others."""
    random, ranks = Random(shape.seed), _Ranks(shape.population, shape.exponent)
    while True:
        pictures = tuple(_new(shape, ranks.draw(random)) for _ in range(shape.pictures))
        yield _single(_text(random, shape.words), pictures)


def multi_turn(shape: Shape) -> Iterator[Ask]:
    """Yield the turns of many conversations side by side: each request repeats all that was said before in its own.

    Pictures come with the first turn of a conversation. When it has had its turns another one takes its place.
    """
    random, numbers, going = Random(shape.seed), itertools.count(), deque[tuple[Turn, ...]]()
    while True:
        if len(going) < shape.conversations:
            pictures = tuple(_new(shape, next(numbers)) for _ in range(shape.pictures))
            said: tuple[Turn, ...] = (Turn("user", _text(random, shape.words), pictures),)
        else:
            answer = Turn("assistant", _text(random, shape.words))
            said = (*going.popleft(), answer, Turn("user", _text(random, shape.words)))
        yield Ask(said)
        if len(said) < 2 * shape.turns - 1:
            going.append(said)


def texts(shape: Shape) -> Iterator[Ask]:
    """Yield requests without pictures, each with words of its own."""
    random = Random(shape.seed)
    while True:
        yield _single(_text(random, shape.words))


def mixed(shape: Shape) -> Iterator[Ask]:
    """Yield requests for new pictures of many sizes: mostly small ones, one in a hundred of twelve megapixels."""
    random, numbers = Random(shape.seed), itertools.count()
    sizes, weights = [size for size, _ in _MIX], [weight for _, weight in _MIX]
    while True:
        chosen = random.choices(sizes, weights, k=shape.pictures)
        pictures = tuple(_new(replace(shape, size=size), next(numbers)) for size in chosen)
        yield _single(_text(random, shape.words), pictures)


def trace(path: Path, shape: Shape, *, speed: float = 1.0) -> Iterator[Ask]:
    """Yield the requests of a recorded trace, at its times.

    A line is a JSON object: ``timestamp`` in seconds, ascending; ``prompt_length`` in words; ``media``: a list of objects
    with ``id`` and either ``size`` in bytes or ``width`` and ``height``. The same id is the same picture.

    Parameters
    ----------
    speed:
        How much faster than recorded it goes.

    Raises
    ------
    mmprep.errors.InvalidRequest
        The file cannot be read, or a line is none of these; the message says which line and why.
    """
    random, first, before = Random(shape.seed), None, -1.0
    try:
        with path.open("rb") as lines:
            for number in itertools.count(1):
                line = lines.readline(_LONGEST_LINE + 1)
                if not line:
                    break
                if not line.strip():
                    continue
                entry = _entry(line, number)
                first = entry.timestamp if first is None else first
                due = (entry.timestamp - first) / speed
                if due < before:
                    raise InvalidRequest(f"line {number} of the trace: timestamps must not go back")
                before = due
                pictures = tuple(_sized(name, size, shape.seed) for name, size in entry.media)
                yield replace(_single(_text(random, entry.words), pictures), due=due)
    except OSError as error:
        raise InvalidRequest(f"the trace cannot be read: {error.strerror}") from None
    if first is None:
        raise InvalidRequest("the trace holds no requests")


#: By the name on the command line.
WORKLOADS: Final[dict[str, Callable[[Shape], Iterator[Ask]]]] = {
    "distinct": distinct_pictures,
    "zipf": zipf,
    "multi-turn": multi_turn,
    "text": texts,
    "mixed": mixed,
}


class _Ranks:
    """Draws ranks from 0 by a Zipf law."""

    def __init__(self, count: int, exponent: float) -> None:
        self._sums = list(itertools.accumulate((rank + 1) ** -exponent for rank in range(count)))

    def draw(self, random: Random) -> int:
        return bisect.bisect_right(self._sums, random.random() * self._sums[-1])


@dataclass(frozen=True, slots=True)
class _Entry:
    timestamp: float
    words: int
    media: tuple[tuple[str, Size | int], ...]


def _entry(line: bytes, number: int) -> _Entry:
    def wrong(why: str) -> InvalidRequest:
        return InvalidRequest(f"line {number} of the trace: {why}")

    if len(line) > _LONGEST_LINE:
        raise wrong(f"it is longer than {_LONGEST_LINE:,} bytes")
    try:
        entry = json.loads(line)
    except ValueError:
        raise wrong("it is not JSON") from None
    if not isinstance(entry, dict):
        raise wrong("it is not a JSON object")
    timestamp, words, media = entry.get("timestamp"), entry.get("prompt_length", 20), entry.get("media", [])
    if not _is_number(timestamp):
        raise wrong("timestamp must be a number of seconds")
    if not _is_whole(words, 0, 1_000_000):
        raise wrong("prompt_length must be a whole number from 0 to 1,000,000")
    if not isinstance(media, list) or not all(isinstance(one, dict) for one in media):
        raise wrong("media must be a list of objects")
    return _Entry(float(timestamp), words, tuple((_name(one, wrong), _size(one, wrong)) for one in media))


def _name(medium: dict[str, Any], wrong: Callable[[str], InvalidRequest]) -> str:
    name = medium.get("id")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise wrong("every medium needs an id, a string or a whole number")
    return str(name)


def _size(medium: dict[str, Any], wrong: Callable[[str], InvalidRequest]) -> Size | int:
    if "width" in medium or "height" in medium:
        width, height = medium.get("width"), medium.get("height")
        if not _is_whole(width, 16, 8192) or not _is_whole(height, 16, 8192):
            raise wrong("width and height of a medium must be whole numbers from 16 to 8192")
        return Size(width, height, 6.0)
    size = medium.get("size")
    if not _is_whole(size, 1, 1 << 30):
        raise wrong("every medium needs a size in bytes, or width and height")
    return int(size)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _is_whole(value: Any, least: int, most: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _sized(name: str, size: Size | int, seed: int) -> Picture:
    """Return the picture of a trace, of one of our sizes where the trace knows its bytes alone: of the nearest."""
    if not isinstance(size, Size):
        wanted = size
        size = min(_BYTES, key=lambda known: abs(_BYTES[known] - wanted))
    number = int.from_bytes(name.encode()[-12:].rjust(12, b"\0"), "big") ^ len(name) << 96
    drawn = _drawn(size, seed + number % _DRAWN)
    return Picture(name, drawn, number)


def _new(shape: Shape, number: int) -> Picture:
    """Return picture ``number`` of a workload."""
    drawn = _drawn(shape.size, shape.seed * _DRAWN + number % _DRAWN)
    # No two workloads share pictures, so that a run does not find those of the one before in the cache.
    return Picture(f"{shape.seed}-{shape.size.name}-{number}", drawn, shape.seed << 40 | number)


@lru_cache(maxsize=64)
def _drawn(size: Size, seed: int) -> bytes:
    return jpeg(size, seed)


def _text(random: Random, words: int) -> str:
    return " ".join(random.choices(_WORDS, k=words))


def _single(text: str, pictures: Sequence[Picture] = ()) -> Ask:
    return Ask((Turn("user", text, tuple(pictures)),))
