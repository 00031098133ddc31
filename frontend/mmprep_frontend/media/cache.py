"""The disk cache of fetched media, between the intake and the fetcher. It may make a fetch needless, and never fail one.

A lookup comes after the policy has judged the URL, and whatever led to the medium when it was fetched is judged again.
What was fetched is offered back by :meth:`MediaCache.keep` when it turned out to be a medium. Nothing here touches the
disk on the event loop: lookups have threads of their own, so that a disk that hangs holds up nothing else, and a bounded
time, after which the medium is fetched; writing has one thread and a bounded backlog, beyond which media are not kept.

Of several frontends with one cache, one downloads a medium that is not there, and the others wait for what it keeps, for a
bounded time (:mod:`mmprep_frontend.media.claims`).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from mmprep.digest import HashName
from mmprep.errors import Busy, MmprepError, ServiceUnavailable
from mmprep.metrics import Metrics
from mmprep_frontend.media.allowance import Hold
from mmprep_frontend.media.cache_disk import CacheDisk, Damaged, Found
from mmprep_frontend.media.cache_index import Change, Kept
from mmprep_frontend.media.cache_uses import Uses
from mmprep_frontend.media.claims import Claim, Claims
from mmprep_frontend.media.exchange import Condition, Reply
from mmprep_frontend.media.fetch import Fetcher
from mmprep_frontend.media.keys import fetched_key, url_digest
from mmprep_frontend.media.memory import Loaded, MediaMemory, Share
from mmprep_frontend.media.policy import UrlPolicy

_log = logging.getLogger("mmprep.frontend")

#: Seconds after which a lookup is given up.
_PATIENCE: Final = 1.0
#: Seconds for what is still to be written when the frontend ends.
_LAST: Final = 1.0
_READERS: Final = 2
#: Lookups under way, media that wait to be written, and their bytes, at most.
_LOOKUPS: Final = 512
_BACKLOG: Final = 64
_BACKLOG_BYTES: Final = 256 << 20
#: Seconds to wait for another frontend that downloads the same, and between two looks; at most half of a fetch's time.
_TURN: Final = 5.0
_LOOKS: Final = (0.005, 0.05)


@dataclass(frozen=True, slots=True)
class Keepable:
    """A fetched medium that may be kept once it was decoded.

    Attributes
    ----------
    key: of the cache.
    reply: what its host said; while there is this, others are given it, too.
    fetched: the wall clock before it was asked for.
    claim: to be kept until it was written, or turned out not to be a medium.
    reset: how often the cache had been reset before it was asked for.
    """

    key: bytes
    reply: Reply
    fetched: float
    claim: Claim | None
    reset: int


class _Seen(NamedTuple):
    """What a look at the disk gave.

    Attributes
    ----------
    claim: where a host may be asked, and there are claims.
    elsewhere: whether another process is about to keep it.
    """

    found: Found | None
    claim: Claim | None = None
    elsewhere: bool = False


_NOTHING: Final = _Seen(None)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A medium, from the disk or its host.

    Attributes
    ----------
    digest, hash_name: of the bytes, where they were checked already.
    asked: whether a host was asked.
    keepable: where it is to be offered to the cache.
    held: to be kept with the bytes; it counts them.
    """

    data: bytes
    digest: bytes | None
    hash_name: HashName | None
    asked: bool
    keepable: Keepable | None
    held: Reply | Loaded | Share


class MediaCache:
    """Fetches through a disk cache. To be made and used within one event loop.

    Parameters
    ----------
    disk:
        What lies on the disk.
    fetcher, policy:
        What fetches, and the policy it follows.
    max_bytes:
        Largest medium, in bytes, ``--max-media-size``: larger ones are not read from the disk either.
    memory:
        What all media may take.
    metrics:
        Where hits, misses and what goes wrong are counted, and the stages' times.
    """

    def __init__(
        self,
        disk: CacheDisk,
        fetcher: Fetcher,
        policy: UrlPolicy,
        *,
        max_bytes: int,
        memory: MediaMemory,
        metrics: Metrics,
    ) -> None:
        self._disk = disk
        self._fetcher = fetcher
        self._policy = policy
        self._max_bytes = max_bytes
        self._memory = memory
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="cache-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cache-write")
        self._claims = Claims(disk.home)
        self._lookups = 0
        self._elsewhere: dict[bytes, asyncio.Future[None]] = {}
        #: What waits to be written, in bytes, and its reply, which is shared until the loop knows that it was written: whoever
        #: looked before finds the one or the other.
        self._keeping: dict[bytes, tuple[int, Keepable]] = {}
        #: Keys of what was written last.
        self._written: deque[bytes] = deque(maxlen=_BACKLOG)
        self._uses = Uses(lambda names, done: self._later(partial(disk.touch, names), done))
        self._closed = False
        self._warned = False
        self._resets = 0
        self._later(disk.sweep, self._swept)

    async def fetch(
        self, url: str, *, scope: bytes, param: str | None, timeout: float, hold: Hold | None = None
    ) -> Fetched:
        """Return the medium at ``url``; errors as of :meth:`Fetcher.fetch`.

        Parameters
        ----------
        scope:
            From :func:`mmprep_frontend.media.keys.scope`; others never see what is kept for it.
        hold:
            As for :meth:`Fetcher.fetch`, where a host is asked.
        """
        deadline = self._loop.time() + timeout
        try:
            target = self._policy.judge_url(url)
        except MmprepError as error:
            raise error.at(param) if param is not None else error from None
        key = fetched_key(scope=scope, url=target.url, allow_private=self._policy.allow_private)
        try:
            found, claim = await self._in_turn(key, timeout)
        except Busy as error:
            raise error.at(param) if param is not None else error from None
        if found is not None and found.fresh:
            return self._hit(found, asked=False)
        condition = None
        if found is not None and found.kept.validators:
            condition = Condition(found.kept.source, found.kept.validators)
        elif found is not None:
            self._later(partial(self._disk.drop, found.kept.name))
        fetched, reset = self._disk.now(), self._resets
        try:
            reply = await self._fetcher.fetch(
                url, param=param, timeout=max(0.001, deadline - self._loop.time()), condition=condition, hold=hold
            )
        except BaseException:
            self._metrics.count("mmprep_media_cache_misses_total", 1)
            raise
        if reply.data is None:
            assert found is not None
            self._renew(found.kept, reply)
            return self._hit(found, asked=True)
        self._metrics.count("mmprep_media_cache_misses_total", 1)
        keepable = self._allowed(Keepable(key, reply, fetched, claim, reset), found)
        return Fetched(reply.data, None, None, True, keepable, reply)

    def keep(self, keepable: Keepable, data: bytes | memoryview, digest: bytes, hash_name: HashName) -> None:
        """Keep a medium that was fetched and decoded, unless the cache was reset since; returns at once, and may do nothing.

        Parameters
        ----------
        digest, hash_name:
            Of ``data``, to check it with when it is read.
        """
        if keepable.reset != self._resets:
            return
        key, reply = keepable.key, keepable.reply
        waiting = sum(nbytes for nbytes, _ in self._keeping.values())
        if key in self._keeping or len(self._keeping) >= _BACKLOG or (waiting and waiting + len(data) > _BACKLOG_BYTES):
            return
        kept = Kept(
            key=key,
            nbytes=len(data),
            hash_name=hash_name,
            digest=digest,
            origins=tuple(hop.origin for hop in reply.hops),
            source=url_digest(reply.hops[-1].url),
            private=self._policy.allow_private,
            validators=reply.validators,
            ask=reply.keeping == "ask",
        )
        self._keeping[key] = len(data), keepable

        def write() -> tuple[Change, float]:
            started = time.monotonic()
            return self._disk.keep(kept, data, fetched=keepable.fetched), time.monotonic() - started

        def done(written: tuple[Change, float] | None) -> None:
            del self._keeping[key]
            self._written.append(key)
            if written is not None:
                change, seconds = written
                self._timed("cache_write", seconds)
                if change.evicted:
                    self._metrics.count("mmprep_media_cache_evictions_total", change.evicted)

        self._uses.write_down()  # their order decides what makes room for it
        self._later(write, done)

    async def forget(self) -> None:
        """Keep and give to nobody else what was asked for before this; returns when nothing is left to be written of it."""
        self._resets += 1
        self._fetcher.forget()
        if not self._closed:
            await self._loop.run_in_executor(self._writer, lambda: None)

    async def clear(self) -> tuple[int, int]:
        """Drop all media from the disk; return how many, and their bytes.

        Raises
        ------
        ServiceUnavailable
            The disk or its index does not let them be dropped.
        """
        try:
            gone = await self._loop.run_in_executor(self._writer, self._disk.clear)
        except (OSError, sqlite3.Error) as error:
            self._failed(error)
            raise ServiceUnavailable(
                "the media cache cannot be emptied for the moment; its disk or index fails"
            ) from None
        return len(gone), sum(kept.charge for kept in gone)

    async def close(self) -> None:
        """Write what waits, within a second, and let go of the disk."""
        self._uses.write_down()
        self._closed = True
        end = self._loop.run_in_executor(self._writer, self._disk.close)
        await asyncio.wait([end], timeout=_LAST)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._writer.shutdown(wait=False, cancel_futures=True)
        self._claims.close()

    async def _in_turn(self, key: bytes, timeout: float) -> tuple[Found | None, Claim | None]:
        """Look until there is something to use, or this process may download it, or that takes too long.

        While another process downloads it, one of those who wait looks again and again.
        """
        end = self._loop.time() + min(_TURN, timeout / 2)
        looked: asyncio.Future[None] | None = None
        again = False
        pause, longest = _LOOKS
        try:
            while True:
                found, claim, elsewhere = await self._look(key, min(_PATIENCE, timeout))
                left = end - self._loop.time()
                stale = claim is not None and not (found is not None and found.fresh)
                if stale and not again and left > 0 and key in self._written:
                    again = True  # it may have been written since
                    continue
                if not elsewhere or left <= 0:
                    return found, claim
                del found  # it counts as long as it is referred to
                if looked is None and (other := self._elsewhere.get(key)) is not None:
                    await asyncio.wait([other], timeout=left)
                    continue
                if looked is None:
                    looked = self._elsewhere[key] = self._loop.create_future()
                await asyncio.sleep(min(pause, left))
                pause = min(2 * pause, longest)
        finally:
            if looked is not None:
                del self._elsewhere[key]
                looked.set_result(None)

    async def _look(self, key: bytes, patience: float) -> _Seen:
        if self._lookups >= _LOOKUPS:
            return _NOTHING
        self._lookups += 1
        looking = self._loop.run_in_executor(self._readers, self._see, key, self._memory.share())
        looking.add_done_callback(self._looked_up)
        started = time.monotonic()
        await asyncio.wait([looking], timeout=patience)
        self._timed("cache_lookup", time.monotonic() - started)
        if not looking.done():
            self._failed(TimeoutError("the disk is slow"))
            return _NOTHING
        error = looking.exception()
        if isinstance(error, Busy):
            raise error  # a fetch would need the same memory
        if error is not None:
            return _NOTHING
        seen = looking.result()
        if seen.found is not None:
            self._timed("cache_read", seen.found.seconds)
        return seen

    def _see(self, key: bytes, share: Share) -> _Seen:
        """Find a medium; where a host has to be asked, claim that, and look whether another did it just before."""
        found = self._find(key, share)
        if found is not None and found.fresh:
            return _Seen(found)
        if (claim := self._claims.held(key)) is not None:
            return _Seen(found, claim)
        try:
            claim = self._claims.claim(key)
        except OSError:
            return _Seen(found)  # no locks here: everybody asks
        if claim is not None and self._disk.look_up(key) not in {None, found and found.kept}:
            found = self._find(key, self._memory.share())
        return _Seen(found, claim, claim is None)

    def _find(self, key: bytes, share: Share) -> Found | None:
        found = self._disk.find(key, max_bytes=self._max_bytes, share=share)
        return found if found is not None and found.kept.may_be_read(self._policy) else None

    def _looked_up(self, looking: asyncio.Future[_Seen]) -> None:
        self._lookups -= 1
        error = None if looking.cancelled() else looking.exception()
        if error is not None and not isinstance(error, Busy):
            self._failed(error)
        if isinstance(error, Damaged):
            self._later(partial(self._disk.drop, error.name))

    def _hit(self, found: Found, *, asked: bool) -> Fetched:
        self._metrics.count("mmprep_media_cache_hits_total", 1)
        self._uses.note(found.kept.name)
        return Fetched(found.data, found.kept.digest, found.kept.hash_name, asked, None, found.share)

    def _renew(self, kept: Kept, reply: Reply) -> None:
        if reply.keeping == "never":
            self._later(partial(self._disk.drop, kept.name))
            return
        ask = kept.ask if reply.keeping is None else reply.keeping == "ask"
        self._later(partial(self._disk.renew, kept.name, kept.validators.renewed(reply.validators), ask=ask))

    def _allowed(self, keepable: Keepable, found: Found | None) -> Keepable | None:
        """Return ``keepable`` unless its host forbids to keep it: then what was found of it goes."""
        if keepable.reply.keeping == "never":
            if found is not None:
                self._later(partial(self._disk.drop, found.kept.name))
            return None
        return keepable

    def _later(self, work: Callable[[], Any], then: Callable[[Any], None] | None = None) -> None:
        """Do ``work`` on the writing thread, then tell ``then`` on the loop what came of it, ``None`` after an error."""

        def done(future: asyncio.Future[Any]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is not None:
                self._failed(error)
            if then is not None:
                then(None if future.cancelled() or error is not None else future.result())

        if self._closed:
            return
        self._loop.run_in_executor(self._writer, work).add_done_callback(done)

    def _swept(self, number: int | None) -> None:
        if number:
            self._metrics.count("mmprep_media_cache_errors_total", number)

    def _timed(self, stage: str, seconds: float) -> None:
        self._metrics.observe("mmprep_stage_seconds", seconds, stage=stage)

    def _failed(self, error: BaseException) -> None:
        self._metrics.count("mmprep_media_cache_errors_total", 1)
        if not self._warned and not isinstance(error, Damaged):
            self._warned = True
            said = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            _log.warning("the media cache has errors, which are counted and otherwise ignored; the first: %s", said)
