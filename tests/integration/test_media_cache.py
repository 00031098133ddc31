"""The disk cache of a whole service: what is fetched once is not fetched again, and no disk fails a request."""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.integration.media_host import CAT, media_host
from tests.integration.service import eventually, mmprep, photo, serving, text, user

SMALL = ("--allow-private-networks", "--cache-size", "32MiB", "--frontends", 1)
READ_ONLY = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"',
)
FULL = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=128k none "$0" && exec "$@"')


@pytest.fixture
def host():
    with media_host() as server:
        yield server


def at(url):
    return user(text("What is this?"), {"type": "image_url", "image_url": {"url": url}})


def counted(service):
    metrics = service.metrics()
    names = ("hits", "misses", "evictions", "errors")
    return {name: metrics.get(f"mmprep_media_cache_{name}_total", 0) for name in names}


def all_kept(service, number):
    """Wait until so many media were kept: their bodies are there and the index names them."""
    series = 'mmprep_stage_seconds_count{stage="cache_write"}'
    eventually(lambda: service.metrics().get(series, 0) == number, "what was fetched in the cache")


def bodies(directory):
    return [path for path in (directory / "mmprep-media-1" / "bodies").glob("*") if not path.name.endswith(".part")]


#: What is fetched so is kept, and asked about each time; while it is being written nobody else is given it.
NEVER_SHARED = {"Cache-Control": "no-cache"}


@contextlib.contextmanager
def caching(directory, *options, **more):
    with serving(*SMALL, "--media-cache-dir", directory, *options, **more) as service:
        yield service


def test_a_medium_is_fetched_once_for_all_frontends_and_over_restarts(host, tmp_path):
    url = f"{host.url}/cat.png"
    with caching(tmp_path, "--frontends", 2) as service:
        first = service.render(at(url))["features"]
        assert first == service.render(user(text("What is this?"), photo("cat.png")))["features"]
        all_kept(service, 1)
    fetched = len(host.asked)
    assert fetched == 1
    with caching(tmp_path, "--frontends", 2) as service:
        for _ in range(8):
            assert service.render(at(url))["features"] == first
        assert len(host.asked) == fetched
        eventually(lambda: counted(service)["hits"] == 8, "eight hits in the metrics")
        assert counted(service) == {"hits": 8, "misses": 0, "evictions": 0, "errors": 0}
        # Another tenant sees nothing of it.
        assert service.render(at(url), cache_salt="other")["features"]["mm_placeholders"] == first["mm_placeholders"]
        assert len(host.asked) == fetched + 1


def test_many_requests_at_once_for_one_url_make_one_download_whichever_frontends_they_come_to(host, tmp_path):
    with caching(tmp_path, "--frontends", 2) as service, ThreadPoolExecutor(32) as threads:
        for name in "abc":
            asked = [threads.submit(service.render, at(f"{host.url}/{name}/cat.png")) for _ in range(32)]
            assert len({json.dumps(answer.result()["features"]) for answer in asked}) == 1
        assert [path for path, _ in host.asked] == ["/a/cat.png", "/b/cat.png", "/c/cat.png"]


def test_what_is_no_medium_or_was_only_counted_is_not_kept(host, tmp_path):
    with caching(tmp_path) as service:
        assert service.chat(at(f"{host.url}/text")).status == 415
        assert service.post("/tokenize", {"messages": at(f"{host.url}/a/cat.png")}).status == 200
        host.headers = {"Cache-Control": "no-store"}
        service.render(at(f"{host.url}/b/cat.png"))
        host.headers = {}
        # The last one shows that what was offered before it is written or was not offered.
        service.render(at(f"{host.url}/c/cat.png"))
        all_kept(service, 1)
        assert len(bodies(tmp_path)) == 1
        assert counted(service)["misses"] == 4


def test_after_the_ttl_the_host_is_asked_whether_the_medium_is_the_same(host, tmp_path):
    url = f"{host.url}/cat.png"
    with caching(tmp_path, "--media-cache-ttl", "0s") as service:
        first = service.render(at(url))["features"]
        all_kept(service, 1)
        assert service.render(at(url))["features"] == first
        assert [tag is None for _, tag in host.asked] == [True, False]
        assert (counted(service)["hits"], counted(service)["misses"]) == (1, 1)


def test_hits_still_meet_the_policy_and_the_size_of_today(host, tmp_path):
    direct, moved = f"{host.url}/cat.png", f"{host.url}/moved/cat.png"
    with caching(tmp_path) as service:
        for url in (direct, moved):
            service.render(at(url))
        all_kept(service, 2)
    with caching(tmp_path, "--allowed-media-domains", "127.0.0.1") as service:
        service.render(at(direct))
        assert service.chat(at(moved)).status == 400
    with caching(tmp_path, "--max-media-size", "1KiB") as service:
        assert service.chat(at(direct)).status == 413
    # Without private networks.
    with serving("--cache-size", "32MiB", "--frontends", 1, "--media-cache-dir", tmp_path) as service:
        assert service.chat(at(direct)).status == 400
        assert counted(service)["hits"] == 0


def test_hits_count_for_what_a_request_may_have(host, tmp_path):
    most = ("--max-request-media-size", 2 * len(CAT))
    urls = [f"{host.url}/{name}/cat.png" for name in "abc"]
    with serving(*SMALL, *most, "--media-cache-dir", tmp_path) as service:
        for number, url in enumerate(urls, 1):
            service.render(at(url))
            all_kept(service, number)
        asked = len(host.asked)
        parts = [part for url in urls for part in at(url)[0]["content"][1:]]
        assert service.chat(user(text("?"), *parts[:2])).status == 200
        answer = service.chat(user(text("?"), *parts))
        assert (answer.status, answer.error["type"]) == (413, "PayloadTooLargeError")
        assert "--max-request-media-size" in answer.error["message"]
        assert len(host.asked) == asked


def test_a_directory_that_cannot_be_is_a_miss(host):
    host.headers = NEVER_SHARED
    with caching(Path("/proc/no/such")) as service:
        for _ in range(2):
            service.render(at(f"{host.url}/cat.png"))
        assert host.asked == 2 * [("/cat.png", None)]
        assert (counted(service)["misses"], counted(service)["hits"]) == (2, 0)
        assert counted(service)["errors"] >= 3
        assert "/proc" not in "".join(line for line in service.lines if "media cache" in line)


@pytest.mark.parametrize("prefix", [READ_ONLY, FULL], ids=["read-only", "full"])
def test_a_disk_that_takes_nothing_is_a_miss(host, tmp_path, prefix):
    prefix = (*prefix, str(tmp_path))
    if mmprep("--version", prefix=prefix).returncode:
        pytest.skip("this machine does not let tests mount a file system")
    host.headers = NEVER_SHARED
    with caching(tmp_path, prefix=prefix) as service:
        for _ in range(3):
            service.render(at(f"{host.url}/cat.png"))
        assert host.asked == 3 * [("/cat.png", None)]
        eventually(lambda: counted(service)["errors"] >= 3, "errors in the metrics")
        assert (counted(service)["misses"], counted(service)["hits"]) == (3, 0)
