"""Media of one request: from URLs and attachments to bytes with digests.

Small data URLs are decoded and hashed in the request's one hop to the executor, together with the template; large ones in
a hop of their own beside it, on other threads. Fetches start at once, on the loop; files are read on threads of their own.
Of what was fetched or read, little is hashed on the loop: a hop costs as much.
What all media of a request have together is bounded by its :mod:`allowance <mmprep_frontend.media.allowance>`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mmprep.digest import Hasher
from mmprep.errors import InvalidRequest, TooLarge
from mmprep_frontend.media.allowance import Allowance, Hold, MediaLimits
from mmprep_frontend.media.cache import Fetched, Keepable, MediaCache
from mmprep_frontend.media.exchange import Reply
from mmprep_frontend.media.fetch import Fetcher
from mmprep_frontend.media.files import LocalFiles
from mmprep_frontend.media.memory import Loaded, Share
from mmprep_frontend.media.sources import DataSource, FileSource, HttpSource, inline_source, parse_source
from mmprep_frontend.render.conversation import MediaPart
from mmprep_frontend.tracing.spans import recording

_ATTACHMENT = "attachment:"

#: Bytes of all data URLs of a request up to which they are hashed in the hop that renders.
SMALL = 4 << 20

#: Bytes that are decoded and hashed on the loop where nothing else needs a hop: 0.2 ms, about what the hop costs.
TINY = 1 << 20

#: Seconds before a request's deadline at which its fetches end, and say what the host did.
_WORD = 0.1


@dataclass(frozen=True, slots=True)
class Medium:
    """One medium's encoded bytes and their digest.

    Attributes
    ----------
    seconds: that reading base64 and hashing took.
    hashed: when that was over, on the monotonic clock.
    keepable: where the disk cache may want it once it was decoded.
    held: counts the bytes, as long as it lives, where they came from elsewhere than from the request.
    pixels: that the picture's header announces; 0 where it is none, or a broken one.
    """

    data: bytes | memoryview
    digest: bytes
    seconds: float
    keepable: Keepable | None = None
    held: Reply | Loaded | Share | None = None
    pixels: int = 0
    hashed: float = 0.0


@dataclass(frozen=True, slots=True)
class Attached:
    """A medium that travelled with the request as a frame of its own.

    Attributes
    ----------
    param: the place in the request, for errors.
    """

    data: memoryview
    param: str | None


@dataclass(frozen=True, slots=True)
class Absent:
    """A medium that the request only names by its ``uuid``."""


Source = DataSource | HttpSource | FileSource | Attached | Absent


@dataclass(frozen=True, slots=True)
class _Reading:
    """What the media of one request share: the end of their time, whose they are, and what they may have together."""

    deadline: float
    scope: bytes
    allowance: Allowance


class Intake:
    """Turns sources into media.

    Parameters
    ----------
    fetcher:
        For http(s).
    hasher:
        The content hash.
    limits:
        Of one medium, and of all of a request.
    threads:
        For decoding and hashing beside the render thread.
    on_fetched:
        Called with the seconds of each fetch or file.
    files:
        For file URLs; ``None`` where they are not read.
    cache:
        Of fetched media, where there is one.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        hasher: Hasher,
        limits: MediaLimits,
        threads: ThreadPoolExecutor,
        on_fetched: Callable[[float], None],
        *,
        files: LocalFiles | None = None,
        cache: MediaCache | None = None,
    ) -> None:
        self._files = files
        self._cache = cache
        self._on_fetched = on_fetched
        self._fetcher = fetcher
        self._hasher = hasher
        self._limits = limits
        self._threads = threads

    @property
    def most_bytes(self) -> int:
        """How many bytes a request's one medium may have."""
        return min(self._limits.medium_bytes, self._limits.request_bytes)

    def sources(self, parts: Sequence[MediaPart], attachments: Sequence[memoryview]) -> list[Source]:
        """Return where each part's bytes are, if anywhere; raises InvalidRequest or TooLarge that names the part."""
        sources = [self._source(part, attachments) for part in parts]
        self._allowance(sources, parts)
        return sources

    def _allowance(self, sources: Sequence[Source], parts: Sequence[MediaPart]) -> Allowance:
        """Return a request's allowance, of which the bytes that it holds itself have taken their part."""
        allowance = Allowance(self._limits)
        for number, (source, part) in enumerate(zip(sources, parts, strict=True)):
            allowance.hold(number, part.param, size(source))
        return allowance

    def _source(self, part: MediaPart, attachments: Sequence[memoryview]) -> Source:
        if not part.url:
            return Absent()
        if attachments and isinstance(part.url, str) and part.url.startswith(_ATTACHMENT):
            number = part.url[len(_ATTACHMENT) :]
            if not number.isdecimal() or int(number) >= len(attachments):
                raise InvalidRequest("the part names an attachment that the request does not have", param=part.param)
            data = attachments[int(number)]
            if len(data) > self._limits.medium_bytes:
                raise TooLarge(
                    f"the medium is larger than {self._limits.medium_bytes:,} bytes, this service's limit "
                    "(--max-media-size)",
                    param=part.param,
                )
            return Attached(data, part.param)
        if part.bare:
            return inline_source(part.url, param=part.param, max_bytes=self._limits.medium_bytes)
        source = parse_source(
            part.url, param=part.param, max_bytes=self._limits.medium_bytes, local_files=self._files is not None
        )
        if isinstance(source, FileSource):
            assert self._files is not None
            self._files.beneath(source)
        return source

    def read_now(self, sources: Sequence[Source]) -> list[Medium | None]:
        """Return the media whose bytes are at hand, on the calling thread; ``None`` for the others."""
        allowance = Allowance(self._limits)
        return [self._decode(source, allowance) for source in sources]

    def decoded(self, medium: Medium) -> None:
        """Note that a medium turned out to be one."""
        if self._cache is not None and medium.keepable is not None:
            self._cache.keep(medium.keepable, medium.data, medium.digest, self._hasher.name)

    async def read(
        self, sources: Sequence[Source], parts: Sequence[MediaPart], deadline: float, scope: bytes
    ) -> list[Medium | None]:
        """Return all media, fetching and decoding side by side; the first failure cancels the rest.

        Those whose data are absent stay ``None``.
        ``scope`` is whose media of the disk cache may be used.
        """
        reading = _Reading(deadline, scope, self._allowance(sources, parts))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._one(number, source, part.param, reading))
                    for number, (source, part) in enumerate(zip(sources, parts, strict=True))
                ]
        except BaseExceptionGroup as failures:
            raise first_error(failures) from None
        return [task.result() for task in tasks]

    async def _one(self, number: int, source: Source, param: str | None, reading: _Reading) -> Medium | None:
        loop, allowance = asyncio.get_running_loop(), reading.allowance
        if isinstance(source, Absent):
            return None
        if isinstance(source, DataSource | Attached):
            return await loop.run_in_executor(self._threads, self._decode, source, allowance)
        hold, started = partial(allowance.hold, number, param), time.monotonic()
        scheme = source.url.partition(":")[0].lower() if isinstance(source, HttpSource) else "file"
        with recording("fetch", {"url.scheme": scheme}):
            fetched = await self._fetched(source, param, reading, hold)
        if fetched.asked:
            self._on_fetched(time.monotonic() - started)
        hold(len(fetched.data))
        if fetched.digest is not None and fetched.hash_name == self._hasher.name:
            pixels = allowance.take_pixels(fetched.data, param)
            return Medium(fetched.data, fetched.digest, 0.0, held=fetched.held, pixels=pixels)
        if len(fetched.data) <= TINY:
            hashed = self._hashed(fetched.data, allowance, param)
        else:
            hashed = await loop.run_in_executor(self._threads, self._hashed, fetched.data, allowance, param)
        return replace(hashed, keepable=fetched.keepable, held=fetched.held)

    async def _fetched(
        self, source: HttpSource | FileSource, param: str | None, reading: _Reading, hold: Hold
    ) -> Fetched:
        if isinstance(source, FileSource):
            assert self._files is not None
            loaded = await self._files.read(source, hold=hold)
            return Fetched(loaded.data, None, None, True, None, loaded)
        seconds = _for_hosts(reading.deadline - asyncio.get_running_loop().time())
        if self._cache is not None:
            return await self._cache.fetch(source.url, scope=reading.scope, param=param, timeout=seconds, hold=hold)
        reply = await self._fetcher.fetch(source.url, param=param, timeout=seconds, hold=hold)
        assert reply.data is not None
        return Fetched(reply.data, None, None, True, None, reply)

    def _decode(self, source: Source, allowance: Allowance) -> Medium | None:
        if isinstance(source, HttpSource | FileSource | Absent):
            return None
        started = time.monotonic()
        data = source.decode() if isinstance(source, DataSource) else source.data
        return self._hashed(data, allowance, source.param, started)

    def _hashed(
        self, data: bytes | memoryview, allowance: Allowance, param: str | None, started: float | None = None
    ) -> Medium:
        if started is None:
            started = time.monotonic()
        pixels = allowance.take_pixels(data, param)
        digest = self._hasher.content_digest(data)
        ended = time.monotonic()
        return Medium(data, digest, ended - started, pixels=pixels, hashed=ended)


def _for_hosts(seconds: float) -> float:
    """Return how many of the seconds left a host has: it, and not the request's time, is to blame where it is silent."""
    return max(0.001, seconds - min(_WORD, seconds / 10))


def at_hand(source: Source) -> bool:
    """Return whether nothing has to be fetched: the request itself holds the source's bytes, or nobody does."""
    return isinstance(source, DataSource | Attached | Absent)


def size(source: Source) -> int:
    """Return the bytes that a source holds already; 0 for one that is fetched or absent."""
    if isinstance(source, DataSource):
        return source.size
    return len(source.data) if isinstance(source, Attached) else 0


def first_error(group: BaseExceptionGroup[Any]) -> BaseException:
    """Return the first error in a (nested) group.

    It is for ``except BaseExceptionGroup``: Python before 3.11.4 wraps what an ``except*`` raises into a group again.
    """
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
