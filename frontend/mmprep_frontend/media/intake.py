"""Media of one request: from URLs and attachments to bytes with digests.

Small data URLs are decoded and hashed in the request's one hop to the executor, together with the template; large ones in
a hop of their own beside it, on other threads. Fetches start at once, on the loop; files are read on threads of their own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from mmprep.digest import Hasher
from mmprep.errors import InvalidRequest, TooLarge
from mmprep_frontend.media.cache import Keepable, MediaCache
from mmprep_frontend.media.exchange import Reply
from mmprep_frontend.media.fetch import Fetcher
from mmprep_frontend.media.files import LocalFiles
from mmprep_frontend.media.memory import Loaded, Share
from mmprep_frontend.media.sources import DataSource, FileSource, HttpSource, inline_source, parse_source
from mmprep_frontend.render.conversation import MediaPart

_ATTACHMENT = "attachment:"

#: Bytes of all data URLs of a request up to which they are hashed in the hop that renders.
SMALL = 4 << 20

#: Bytes that are decoded and hashed on the loop where nothing else needs a hop: 0.2 ms, as much as the hop costs.
TINY = 1 << 20

#: Seconds before a request's deadline at which its fetches end, and say what the host did.
_WORD = 0.1


@dataclass(frozen=True, slots=True)
class Medium:
    """One medium's encoded bytes and their digest.

    Attributes
    ----------
    seconds: that reading base64 and hashing took.
    keepable: where the disk cache may want it once it was decoded.
    held: counts the bytes, as long as it lives, where they came from elsewhere than from the request.
    """

    data: bytes | memoryview
    digest: bytes
    seconds: float
    keepable: Keepable | None = None
    held: Reply | Loaded | Share | None = None


@dataclass(frozen=True, slots=True)
class Attached:
    """A medium that travelled with the request as a frame of its own."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class Absent:
    """A medium that the request only names by its ``uuid``."""


Source = DataSource | HttpSource | FileSource | Attached | Absent


class Intake:
    """Turns sources into media.

    Parameters
    ----------
    fetcher:
        For http(s).
    hasher:
        The content hash.
    max_bytes:
        Of one medium.
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
        max_bytes: int,
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
        self._max_bytes = max_bytes
        self._threads = threads

    def sources(self, parts: Sequence[MediaPart], attachments: Sequence[memoryview]) -> list[Source]:
        """Return where each part's bytes are, if anywhere; raises InvalidRequest or TooLarge that names the part."""
        return [self._source(part, attachments) for part in parts]

    def _source(self, part: MediaPart, attachments: Sequence[memoryview]) -> Source:
        if not part.url:
            return Absent()
        if attachments and part.url.startswith(_ATTACHMENT):
            number = part.url[len(_ATTACHMENT) :]
            if not number.isdecimal() or int(number) >= len(attachments):
                raise InvalidRequest("the part names an attachment that the request does not have", param=part.param)
            data = attachments[int(number)]
            if len(data) > self._max_bytes:
                raise TooLarge(
                    f"the medium is larger than {self._max_bytes:,} bytes, this service's limit (--max-media-size)",
                    param=part.param,
                )
            return Attached(data)
        if part.bare:
            return inline_source(part.url, param=part.param, max_bytes=self._max_bytes)
        source = parse_source(
            part.url, param=part.param, max_bytes=self._max_bytes, local_files=self._files is not None
        )
        if isinstance(source, FileSource):
            assert self._files is not None
            self._files.beneath(source)
        return source

    def read_now(self, sources: Sequence[Source]) -> list[Medium | None]:
        """Return the media whose bytes are at hand, on the calling thread; ``None`` for the others."""
        return [self._decode(source) for source in sources]

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
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._one(source, part, deadline, scope))
                    for source, part in zip(sources, parts, strict=True)
                ]
        except BaseExceptionGroup as failures:
            raise first_error(failures) from None
        return [task.result() for task in tasks]

    async def _one(self, source: Source, part: MediaPart, deadline: float, scope: bytes) -> Medium | None:
        loop = asyncio.get_running_loop()
        if isinstance(source, Absent):
            return None
        if isinstance(source, HttpSource) and self._cache is not None:
            return await self._through(self._cache, source, part, deadline, scope)
        if isinstance(source, HttpSource | FileSource):
            started = time.monotonic()
            fetched = await self._fetched(source, part, _for_hosts(deadline - loop.time()))
            self._on_fetched(time.monotonic() - started)
            assert fetched.data is not None
            hashed = await loop.run_in_executor(self._threads, self._hashed, fetched.data)
            return replace(hashed, held=fetched)
        return await loop.run_in_executor(self._threads, self._decode, source)

    async def _through(
        self, cache: MediaCache, source: HttpSource, part: MediaPart, deadline: float, scope: bytes
    ) -> Medium:
        loop, started = asyncio.get_running_loop(), time.monotonic()
        seconds = _for_hosts(deadline - loop.time())
        fetched = await cache.fetch(source.url, scope=scope, param=part.param, timeout=seconds)
        if fetched.asked:
            self._on_fetched(time.monotonic() - started)
        if fetched.digest is not None and fetched.hash_name == self._hasher.name:
            return Medium(fetched.data, fetched.digest, 0.0, held=fetched.held)
        medium = await loop.run_in_executor(self._threads, self._hashed, fetched.data)
        return replace(medium, keepable=fetched.keepable, held=fetched.held)

    async def _fetched(self, source: HttpSource | FileSource, part: MediaPart, seconds: float) -> Reply | Loaded:
        if isinstance(source, HttpSource):
            return await self._fetcher.fetch(source.url, param=part.param, timeout=seconds)
        assert self._files is not None
        return await self._files.read(source)

    def _decode(self, source: Source) -> Medium | None:
        if isinstance(source, HttpSource | FileSource | Absent):
            return None
        started = time.monotonic()
        return self._hashed(source.decode() if isinstance(source, DataSource) else source.data, started)

    def _hashed(self, data: bytes | memoryview, started: float | None = None) -> Medium:
        if started is None:
            started = time.monotonic()
        digest = self._hasher.content_digest(data)
        return Medium(data, digest, time.monotonic() - started)


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
