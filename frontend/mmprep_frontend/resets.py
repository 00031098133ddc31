"""Resetting the caches of the whole service, whatever frontend was asked.

Each cache has parts that every frontend keeps, which the supervisor lets all of them forget first, and one part for all
frontends, which goes last: what a frontend still had to write is there then, or never will be.

- *mm*: the writer's ring and what is beside it, plans, aliases and quarantine; each frontend's rendered prompts. What
  somebody has leased stays readable for him. A computation that is under way goes on and is published: its key says what
  its content is, so it is never a wrong one. An injection that is under way counts as one that came later.
- *media*: the disk cache; each frontend's downloads that others may still join. Who waits for one gets it, and nothing that
  was asked for before is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import msgspec

from mmprep.logs import event
from mmprep.metrics import Metrics
from mmprep.wire.messages import Cache
from mmprep_frontend.dispatch import WriterLink
from mmprep_frontend.media.cache import MediaCache

_log = logging.getLogger("mmprep.resets")


class Resets:
    """What resets the caches.

    Parameters
    ----------
    let_all_forget:
        Lets every frontend forget its part of a cache.
    writer:
        Has the cache of processed items.
    media_cache:
        The disk cache of fetched media, where there is one.
    metrics:
        Where resets are counted.
    """

    def __init__(
        self,
        let_all_forget: Callable[[Cache], Awaitable[None]],
        writer: WriterLink,
        media_cache: MediaCache | None,
        metrics: Metrics,
    ) -> None:
        self._let_all_forget = let_all_forget
        self._writer = writer
        self._media_cache = media_cache
        self._metrics = metrics

    async def mm_cache(self) -> bytes:
        """Reset the cache of processed items; return, as JSON, how many entries are found no more and the bytes that are free now.

        Raises
        ------
        mmprep.errors.ServiceUnavailable
            A part of the service has not answered; some of the cache may be reset.
        """
        await self._let_all_forget("mm")
        cleared = await self._writer.clear()
        return self._done("mm", cleared.entries, cleared.nbytes)

    async def media_cache(self) -> bytes:
        """Reset the disk cache of fetched media; return as :meth:`mm_cache`, which it also raises as."""
        await self._let_all_forget("media")
        entries, nbytes = (0, 0) if self._media_cache is None else await self._media_cache.clear()
        return self._done("media", entries, nbytes)

    def _done(self, cache: Cache, entries: int, nbytes: int) -> bytes:
        self._metrics.count("mmprep_resets_total", cache=cache)
        event(_log, logging.INFO, "a cache was reset", cache=cache, entries=entries, bytes=nbytes)
        return msgspec.json.encode({"entries": entries, "bytes": nbytes})
