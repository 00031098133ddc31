"""``mmprep cache``: what it tells of the ring and of the disk cache, that it empties them, and that it shows no URL."""

import json
import re
import shutil
from dataclasses import replace

import msgspec
import pytest
from tests.integration.media_host import media_host
from tests.integration.service import eventually, mmprep, serving, text, user

from mmprep import Backend
from mmprep.settings import CacheOrders
from mmprep_frontend.media.cache_desk import served
from mmprep_frontend.media.cache_index import Kept
from mmprep_frontend.media.policy import UrlPolicy
from mmprep_frontend.media.storing import Validators

SECRET = "signature-of-somebody"


@pytest.fixture
def host():
    with media_host() as server:
        yield server


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "media"


def at(url):
    return user(text("What is this?"), {"type": "image_url", "image_url": {"url": url}})


def asked(action, *options, env=None):
    """Return what the command says in JSON; it must succeed."""
    done = mmprep("cache", action, "--json", *options, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def refused(action, *options, env=None):
    done = mmprep("cache", action, *options, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("mmprep cache: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def filled(host, directory, *paths, options=()):
    """Give a directory with a disk cache of these paths' pictures, of a service that has ended."""
    every = ("--allow-private-networks", "--cache-size", "32MiB", "--frontends", 1, "--media-cache-dir", directory)
    with serving(*every, *options) as service:
        for path in paths:
            service.render(at(host.url + path))
        here = ("--runtime-dir", service.runtime_dir)
        eventually(lambda: asked("stats", *here)["disk"]["entries"] == len(paths), "media on the disk")


def test_a_running_service_tells_and_empties_both_caches(host, directory):
    options = ("--allow-private-networks", "--cache-size", "32MiB", "--frontends", 1, "--media-cache-dir", directory)
    url = f"{host.url}/cat.png?{SECRET}"
    with serving(*options) as service, Backend(service.endpoint, id="engine-0") as backend:
        here = ("--runtime-dir", service.runtime_dir)
        answer = service.render(at(url), mm_payload="shm", backend_id=backend.id)
        item = backend.open(answer["features"]["mm_addresses"]["image"][0])
        eventually(lambda: asked("stats", *here)["disk"]["entries"], "a medium on the disk")
        service.render(at(url))

        told = asked("stats", *here)
        assert (told["ring"]["entries"], told["ring"]["hits"], told["ring"]["queries"]) == (1, 1, 2)
        disk = told["disk"]
        assert (disk["entries"], disk["hits"], disk["misses"], disk["evictions"], disk["errors"]) == (1, 1, 1, 0, 0)
        assert (disk["directory"], disk["max_bytes"], disk["ttl_seconds"]) == (str(directory), 5 << 30, 86400)
        assert disk["bytes"] % 4096 == 0

        listed = asked("inspect", *here)
        (entry,), (medium,) = listed["ring"], listed["disk"]
        assert entry["key"] == answer["features"]["mm_hashes"]["image"][0]
        assert (entry["state"], entry["leases"], entry["spill"]) == ("ready", 1, False)
        assert entry["bytes"] == told["ring"]["capacity"] - told["ring"]["free"]
        assert (medium["served"], re.fullmatch("[0-9a-f]{64}", medium["key"]) is not None) == ("yes", True)
        assert 0 <= medium["used_seconds"] <= medium["age_seconds"] < 86400 - medium["left_seconds"] + 1

        for action in ("stats", "inspect"):
            shown = mmprep("cache", action, *here).stdout
            assert {"ring", "disk"} <= set(re.findall(r"^\w+", shown, re.MULTILINE))
            for hidden in (SECRET, "cat.png", "http", "127.0.0.1"):
                assert hidden not in shown
                assert hidden not in json.dumps(listed)

        cleared = asked("clear", *here)
        assert cleared == {"ring": {"entries": 1, "bytes": 0}, "disk": {"entries": 1, "bytes": disk["bytes"]}}
        (left,) = asked("inspect", *here)["ring"]
        assert (left["state"], left["generation"]) == ("removed", entry["generation"])
        assert asked("inspect", *here)["disk"] == []
        assert item.materialize()["pixel_values"].size
        item.release()
        eventually(lambda: asked("inspect", *here)["ring"] == [], "an empty ring")

        before = len(host.asked)
        assert service.render(at(url))["features"]["mm_hashes"] == answer["features"]["mm_hashes"]
        assert len(host.asked) == before + 1
        eventually(lambda: asked("stats", *here)["disk"]["entries"] == 1, "a medium on the disk")
        assert asked("clear", "--only", "ring", *here)["disk"] is None
        assert asked("stats", *here)["disk"]["entries"] == 1
        assert asked("clear", "--only", "disk", *here)["ring"] is None
        assert asked("stats", *here)["disk"]["entries"] == 0


def test_the_disk_cache_is_told_and_emptied_without_a_service(host, directory, runtime_dir, tmp_path):
    filled(host, directory, "/a", "/b")
    here = ("--runtime-dir", runtime_dir)
    config = tmp_path / "mmprep.toml"
    config.write_text(f'media-cache-dir = "{directory}"\nmedia-cache-ttl = "1h"\n')
    named = (
        {"options": ("--media-cache-dir", directory)},
        {"options": (), "env": {"VLLM_MEDIA_CACHE": str(directory)}},
        {"options": ("--config", config)},
    )
    for given in named:
        told = asked("stats", *here, *given["options"], env=given.get("env"))
        assert told["ring"] is None
        assert (told["disk"]["entries"], told["disk"]["directory"]) == (2, str(directory))
        assert "hits" not in told["disk"]
    assert told["disk"]["ttl_seconds"] == 3600
    disk = ("--media-cache-dir", directory)
    shown = mmprep("cache", "stats", *here, *disk).stdout
    assert "no service runs" in shown
    assert [m["served"] for m in asked("inspect", *here, *disk, "--allow-private-networks")["disk"]] == ["yes", "yes"]
    assert [m["served"] for m in asked("inspect", *here, *disk)["disk"]] == ["forbidden", "forbidden"]
    (directory / "mine").write_text("of the operator")
    assert mmprep("cache", "clear", *here, *disk).stdout.splitlines()[-1].startswith("disk  2 media dropped")
    assert asked("stats", *here, *disk)["disk"]["entries"] == 0
    assert list((directory / "mmprep-media-1" / "bodies").iterdir()) == []
    assert (directory / "mine").read_text() == "of the operator"


def test_who_names_nothing_or_the_wrong_thing_is_told_what_to_do(directory, runtime_dir, tmp_path):
    here = ("--runtime-dir", runtime_dir)
    for action in ("stats", "inspect", "clear"):
        assert "mmprep serve" in refused(action, *here)
        assert "mmprep serve" in refused(action, *here, "--only", "ring", "--media-cache-dir", directory)
        assert "--media-cache-dir" in refused(action, *here, "--only", "disk")
        assert f"no media cache in {directory}" in refused(action, *here, "--media-cache-dir", directory)
    assert not directory.exists()
    directory.write_text("a file")
    assert "no media cache in" in refused("clear", *here, "--media-cache-dir", directory)
    assert "--media-cache-ttl" in refused("stats", *here, "--media-cache-dir", tmp_path, "--media-cache-ttl", "soon")
    assert mmprep("cache").returncode == mmprep("cache", "polish").returncode == 2


def test_a_broken_index_is_told_looking_does_not_touch_it_and_clearing_begins_it_anew(host, directory, runtime_dir):
    filled(host, directory, "/a")
    here = ("--runtime-dir", runtime_dir, "--media-cache-dir", directory)
    index = directory / "mmprep-media-1" / "index.db"
    for path in index.parent.glob("index.db-*"):
        path.unlink()
    index.write_bytes(b"garbage" * 1000)
    for action in ("stats", "inspect"):
        assert "index of the media cache" in refused(action, *here)
    assert index.read_bytes() == b"garbage" * 1000
    assert asked("clear", *here)["disk"] == {"entries": 0, "bytes": 0}
    assert asked("stats", *here)["disk"]["entries"] == 0
    assert list((index.parent / "bodies").iterdir()) == []
    shutil.rmtree(index.parent / "bodies")
    index.unlink()
    assert asked("inspect", *here)["disk"] == []


ORDERS = CacheOrders("inspect", "/cache", 1 << 20, 100.0, 1000, (), False)
KEPT = Kept(bytes(32), 500, "blake3", bytes(32), ("https://a.example/",), bytes(32), False, Validators(), False)


@pytest.mark.parametrize(
    ("kept", "nbytes", "orders", "verdict"),
    [
        ({}, 500, {}, "yes"),
        ({}, None, {}, "damaged"),
        ({}, 499, {}, "damaged"),
        ({}, 500, {"max_media_size": 499}, "too large"),
        ({}, 500, {"allowed_media_domains": ("b.example",)}, "forbidden"),
        ({}, 500, {"allowed_media_domains": ("a.example:443",)}, "yes"),
        ({}, 500, {"allow_private_networks": True}, "forbidden"),
        ({"private": True}, 500, {}, "forbidden"),
        ({"private": True}, 500, {"allow_private_networks": True}, "yes"),
        ({"origins": ("https://a.example/", "http://10.0.0.1/")}, 500, {}, "forbidden"),
        ({"written": -100.0}, 500, {}, "stale"),
        ({"written": -100.0, "validators": Validators('"a"')}, 500, {}, "after asking"),
        ({"ask": True, "validators": Validators('"a"')}, 500, {}, "after asking"),
        ({"written": 1.0}, 500, {}, "stale"),
    ],
)
def test_what_a_request_would_get_of_a_medium_is_judged_by_the_settings_of_today(kept, nbytes, orders, verdict):
    orders = msgspec.structs.replace(ORDERS, **orders)
    policy = UrlPolicy(orders.allowed_media_domains, orders.allow_private_networks)
    assert served(replace(KEPT, **kept), nbytes, orders, policy, 0.0) == verdict
