"""Fetching through the disk cache, in one loop with a real media host: what is asked, what is counted, what is kept."""

import asyncio
import contextlib
import threading
from collections import Counter

import pytest
from aiohttp import web

from mmprep.digest import Hasher
from mmprep.errors import Busy, FetchBadGateway, FetchError
from mmprep.metrics import Metrics
from mmprep_frontend.media.cache import MediaCache
from mmprep_frontend.media.cache_disk import CacheDisk
from mmprep_frontend.media.fetch import Fetcher
from mmprep_frontend.media.memory import MediaMemory
from mmprep_frontend.media.policy import UrlPolicy

TTL = 100.0
BODY = b"a medium" * 1000
SCOPE = bytes(32)
POLICY = UrlPolicy(allow_private=True)


class Host:
    """What the media's host says, and what it was asked."""

    def __init__(self):
        self.headers = {"ETag": '"1"'}
        self.body = BODY
        self.status = 200
        self.moved_to = None
        self.asked = []

    async def answer(self, request):
        self.asked.append(
            (request.path, request.headers.get("If-None-Match") or request.headers.get("If-Modified-Since"))
        )
        if request.path == "/moved":
            return web.Response(status=302, headers={"Location": self.moved_to})
        if self.status != 200:
            return web.Response(status=self.status)
        if self.asked[-1][1] in self.headers.values():
            return web.Response(status=304, headers=self.headers)
        return web.Response(body=self.body, headers=self.headers)


class World:
    """A media host, a cache, and a wall clock that is set by hand."""

    def __init__(self, directory):
        self.host = Host()
        self.now = 1_000_000.0
        self.metrics = Metrics()
        self.directory = directory
        self.memory = MediaMemory(1 << 20)

    def clock(self):
        self.now += 0.001
        return self.now

    @property
    def counts(self):
        prefix, counters = "mmprep_media_cache_", self.metrics.snapshot().counters
        return Counter(
            {name.removeprefix(prefix).removesuffix("_total"): v for name, _, v in counters if prefix in name}
        )

    @property
    def timed(self):
        """How often each stage was timed."""
        return {dict(labels)["stage"]: sum(h.counts) for _, labels, h in self.metrics.snapshot().histograms}

    @contextlib.asynccontextmanager
    async def running(self, kind=CacheDisk, policy=POLICY):
        server = web.Server(self.host.answer)
        runner = web.ServerRunner(server)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = site.name
        disk = kind(self.directory, max_bytes=1 << 20, ttl=TTL, clock=self.clock)
        limits = {"max_bytes": 1 << 20, "memory": self.memory}
        async with Fetcher(policy, **limits, metrics=self.metrics) as fetcher:
            self.cache = MediaCache(disk, fetcher, policy, **limits, metrics=self.metrics)
            try:
                yield self.cache
            finally:
                await self.cache.close()
                await runner.cleanup()

    @contextlib.asynccontextmanager
    async def another(self):
        """Give a cache as of another frontend, in the same directory."""
        disk = CacheDisk(self.directory, max_bytes=1 << 20, ttl=TTL, clock=self.clock)
        limits = {"max_bytes": 1 << 20, "memory": MediaMemory(1 << 20), "metrics": Metrics()}
        async with Fetcher(POLICY, **limits) as fetcher:
            cache = MediaCache(disk, fetcher, POLICY, **limits)
            yield cache
            await cache.close()

    async def get(self, path="/a", scope=SCOPE, keep=True):
        fetched = await self.cache.fetch(self.url + path, scope=scope, param="p", timeout=20.0)
        if keep and fetched.keepable is not None:
            digest = Hasher("blake3").content_digest(fetched.data)
            self.cache.keep(fetched.keepable, fetched.data, digest, "blake3")
        await self.settled()
        return fetched

    async def settled(self):
        """Wait until the writing thread has done all that it was given, and what follows from it."""
        loop = asyncio.get_running_loop()
        for _ in range(3):
            await loop.run_in_executor(self.cache._writer, int)
            await asyncio.sleep(0)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def check(world, main, **options):
    async def run():
        async with world.running(**options):
            await main()

    asyncio.run(run())


def test_a_second_fetch_asks_nobody_and_brings_a_checked_digest(world):
    async def main():
        first, second = await world.get(), await world.get()
        assert (first.asked, first.digest, second.asked, second.keepable) == (True, None, False, None)
        assert second.data == BODY
        assert (second.digest, second.hash_name) == (Hasher("blake3").content_digest(BODY), "blake3")
        assert len(world.host.asked) == 1
        assert world.counts == {"hits": 1, "misses": 1}
        assert world.timed == {"cache_lookup": 2, "cache_read": 1, "cache_write": 1}

    check(world, main)


def test_urls_meet_in_their_normal_form_and_scopes_never(world):
    async def main():
        await world.get("/a")
        assert not (await world.get("/a#fragment")).asked
        assert (await world.get("/a", scope=bytes(31) + b"1")).asked
        assert (await world.get("/b")).asked

    check(world, main)


def test_nothing_on_the_disk_holds_a_path_or_a_query(world):
    async def main():
        world.host.moved_to = "/first-secret?signature=second-secret"
        await world.get("/moved?token=third-secret#fourth-secret")
        assert not (await world.get("/moved?token=third-secret")).asked
        written = b"".join(path.read_bytes() for path in world.directory.rglob("*") if path.is_file())
        assert BODY in written
        assert b"http://127.0.0.1" in written
        assert b"secret" not in written

    check(world, main)


def test_what_is_not_offered_is_not_kept(world):
    async def main():
        await world.get(keep=False)
        assert (await world.get()).asked

    check(world, main)


@pytest.mark.parametrize("control", ["no-store", "private", "no-cache, private"])
def test_what_the_host_forbids_to_keep_is_asked_for_each_time(world, control):
    async def main():
        world.host.headers["Cache-Control"] = control
        assert (await world.get()).keepable is None
        await world.get()
        assert [tag for _, tag in world.host.asked] == [None, None]

    check(world, main)


def test_no_cache_is_asked_about_before_each_use(world):
    async def main():
        world.host.headers["Cache-Control"] = "no-cache"
        for _ in range(3):
            assert (await world.get()).data == BODY
        assert [tag for _, tag in world.host.asked] == [None, '"1"', '"1"']
        assert world.counts == {"hits": 2, "misses": 1}

    check(world, main)


def test_after_the_ttl_a_304_begins_it_anew(world):
    async def main():
        await world.get()
        world.now += TTL
        assert (await world.get()).data == BODY
        world.now += TTL * 0.9
        assert not (await world.get()).asked
        assert [tag for _, tag in world.host.asked] == [None, '"1"']

    check(world, main)


def test_hits_do_not_put_off_the_question(world):
    async def main():
        await world.get()
        for _ in range(9):
            world.now += TTL / 9
            await world.get()
        assert len(world.host.asked) == 2

    check(world, main)


def test_a_date_will_do_where_there_is_no_tag(world):
    async def main():
        world.host.headers = {"Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT"}
        await world.get()
        world.now += TTL
        assert (await world.get()).data == BODY
        assert world.host.asked[1][1] == "Sat, 01 Jan 2022 00:00:00 GMT"
        assert world.counts["hits"] == 1

    check(world, main)


def test_what_cannot_be_asked_about_is_fetched_anew_after_the_ttl(world):
    async def main():
        world.host.headers = {}
        await world.get()
        world.now += TTL
        world.host.body = b"new"
        assert (await world.get()).data == b"new"
        assert not (await world.get()).asked

    check(world, main)


def test_a_medium_that_has_changed_replaces_the_old_one(world):
    async def main():
        await world.get()
        world.now += TTL
        world.host.headers, world.host.body = {"ETag": '"2"'}, b"new"
        assert (await world.get()).data == b"new"
        assert ((await world.get()).data, len(world.host.asked)) == (b"new", 2)

    check(world, main)


def test_a_304_that_forbids_to_keep_ends_the_keeping(world):
    async def main():
        await world.get()
        world.now += TTL
        world.host.headers["Cache-Control"] = "no-store"
        assert (await world.get()).data == BODY
        assert (await world.get()).asked
        assert world.host.asked[-1][1] is None

    check(world, main)


def test_a_host_that_fails_after_the_ttl_fails_the_fetch_with_the_place(world):
    async def main():
        await world.get()
        world.now += TTL
        world.host.status = 500
        with pytest.raises(FetchBadGateway) as caught:
            await world.get()
        assert caught.value.param == "p"
        assert world.counts == {"misses": 2}

    check(world, main)


def test_a_304_that_nobody_asked_for_is_an_error(world):
    async def main():
        world.host.status = 304
        with pytest.raises(FetchError):
            await world.get()

    check(world, main)


def test_the_tag_goes_only_to_the_url_that_gave_it(world):
    async def main():
        world.host.moved_to = "/first"
        await world.get("/moved")
        world.now += TTL
        await world.get("/moved")
        assert world.host.asked == [("/moved", None), ("/first", None), ("/moved", None), ("/first", '"1"')]
        world.now += TTL
        world.host.moved_to = "/second"
        assert (await world.get("/moved")).keepable is not None
        assert world.host.asked[-1] == ("/second", None)

    check(world, main)


def test_many_fetches_at_once_write_once(world):
    async def main():
        await asyncio.gather(*(world.get() for _ in range(20)))
        assert len(list((world.directory / "mmprep-media-1" / "bodies").iterdir())) == 1
        assert world.counts["errors"] == 0
        assert not (await world.get()).asked

    check(world, main)


def test_what_one_frontend_downloads_others_wait_for(world):
    async def main():
        async with world.another() as other:
            first = await world.cache.fetch(world.url, scope=SCOPE, param="p", timeout=20.0)
            waiting = [asyncio.create_task(other.fetch(world.url, scope=SCOPE, param="p", timeout=20.0)) for _ in "abc"]
            done, _ = await asyncio.wait(waiting, timeout=0.1)
            assert not done
            world.cache.keep(first.keepable, first.data, Hasher("blake3").content_digest(first.data), "blake3")
            assert [(await task).asked for task in waiting] == [False] * 3
            assert len(world.host.asked) == 1

    check(world, main)


def test_who_looked_just_before_it_was_written_asks_nobody_either(world):
    class Gated(CacheDisk):
        def keep(self, *arguments, **options):
            gate.wait()
            return super().keep(*arguments, **options)

    async def main():
        cache = world.cache
        first = await cache.fetch(world.url, scope=SCOPE, param="p", timeout=20.0)
        cache.keep(first.keepable, first.data, Hasher("blake3").content_digest(first.data), "blake3")
        del first
        second = asyncio.create_task(cache.fetch(world.url, scope=SCOPE, param="p", timeout=20.0))
        await asyncio.sleep(0)
        while cache._lookups:  # noqa: ASYNC110 -- the test waits for turns of the loop
            await asyncio.sleep(0)
        gate.set()
        cache._writer.submit(int).result()  # all is written, and the loop has not heard of it
        await second
        assert len(world.host.asked) == 1

    gate = threading.Event()
    check(world, main, kind=Gated)


def test_what_comes_to_nothing_keeps_nobody_waiting(world):
    async def main():
        async with world.another() as other:
            first = await world.cache.fetch(world.url, scope=SCOPE, param="p", timeout=20.0)
            waiting = asyncio.create_task(other.fetch(world.url, scope=SCOPE, param="p", timeout=1000.0))
            done, _ = await asyncio.wait([waiting], timeout=0.1)
            assert not done
            del first  # it was no medium, and nobody offers it
            assert (await waiting).asked
            world.host.status = 404
            for cache in (world.cache, other, world.cache):
                with pytest.raises(FetchError):
                    await cache.fetch(f"{world.url}/none", scope=SCOPE, param="p", timeout=1000.0)
            assert len(world.host.asked) == 5

    check(world, main)


def test_who_waits_too_long_for_another_asks_the_host(world):
    async def main():
        async with world.another() as other:
            first = await world.cache.fetch(world.url, scope=SCOPE, param="p", timeout=20.0)
            assert (await other.fetch(world.url, scope=SCOPE, param="p", timeout=0.5)).asked
            assert first.keepable is not None

    check(world, main)


def test_damage_is_counted_and_fetched_over(world):
    async def main():
        await world.get()
        (path,) = (world.directory / "mmprep-media-1" / "bodies").iterdir()
        path.write_bytes(bytes(len(BODY)))
        assert ((await world.get()).data, world.counts["errors"]) == (BODY, 1)
        assert not (await world.get()).asked

    check(world, main)


def test_a_disk_that_hangs_costs_a_moment_and_no_request(world):
    over = threading.Event()

    class Hanging(CacheDisk):
        def find(self, key, **options):
            over.wait()
            return super().find(key, **options)

    async def main():
        try:
            for _ in range(2):
                assert (await world.get(keep=False)).data == BODY
            assert world.counts == {"misses": 2, "errors": 2}
        finally:
            over.set()

    check(world, main, kind=Hanging)


def test_uses_are_written_down_together_in_their_order_before_more_is_kept_and_at_the_end(world):
    touched, kept = [], []

    class Told(CacheDisk):
        def touch(self, names):
            touched.append([name.partition("-")[0] for name in names])
            super().touch(names)

        def keep(self, medium, data, **options):
            kept.append((medium.key.hex(), len(touched)))
            return super().keep(medium, data, **options)

    async def main():
        await world.get("/a")
        await world.get("/b")
        for path in ("/a", "/b", "/a") * 10:
            assert not (await world.get(path)).asked
        await world.get("/c")
        (a, _), (b, _), (_, writes) = kept
        assert 0 < writes < 30
        uses = [name for names in touched[:writes] for name in names]
        assert (b in uses, uses[-1]) == (True, a)
        await world.get("/b")

    check(world, main, kind=Told)
    assert touched[-1] == [kept[1][0]]


def test_hits_take_their_part_of_the_memory_and_are_refused_where_there_is_none(world):
    async def main():
        await world.get()
        hit = await world.get()
        assert not hit.asked
        assert world.memory.nbytes == len(BODY)
        others = world.memory.share()
        others.grow((1 << 20) - len(BODY))
        with pytest.raises(Busy) as caught:
            await world.get()
        assert caught.value.param == "p"
        del hit, caught
        assert not (await world.get()).asked
        assert world.counts == {"hits": 2, "misses": 1}

    check(world, main)


def test_what_was_fetched_before_a_reset_is_not_kept_after_it_and_what_waited_is_dropped_with_the_rest(world):
    async def main():
        await world.get("/kept")
        before = await world.get("/late", keep=False)
        await world.cache.forget()
        dropped = await world.cache.clear()
        assert dropped[0] == 1
        world.cache.keep(before.keepable, before.data, Hasher("blake3").content_digest(BODY), "blake3")
        await world.settled()
        assert (await world.get("/late")).asked
        assert (await world.get("/kept")).asked
        # Nobody was asked whether something is still the same: nothing is there.
        assert [tag for _, tag in world.host.asked] == [None] * 4
        assert not (await world.get("/late")).asked

    check(world, main)
