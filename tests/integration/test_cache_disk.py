"""The disk cache's files and index: several processes, deaths in the middle, and everything that can be wrong with a disk."""

import contextlib
import hashlib
import os
import sqlite3
import subprocess
import sys

import pytest
from tests.integration.service import environment

from mmprep.digest import Hasher
from mmprep_frontend.media.cache_disk import CacheDisk, Damaged
from mmprep_frontend.media.cache_index import BLOCK, Kept
from mmprep_frontend.media.memory import MediaMemory
from mmprep_frontend.media.storing import Validators

TTL = 100.0
LARGEST = 1 << 20
MEMORY = MediaMemory(64 << 20)


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        self.now += 0.001
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def opened(tmp_path, clock):
    with contextlib.ExitStack() as stack:

        def make(max_bytes=LARGEST):
            disk = CacheDisk(tmp_path, max_bytes=max_bytes, ttl=TTL, clock=clock)
            stack.callback(disk.close)
            return disk

        yield make


def key_of(name):
    return hashlib.sha256(name.encode()).digest()


def medium(key, nbytes, digest, tag=""):
    return Kept(key, nbytes, "blake3", digest, ("http://a/",), bytes(32), True, Validators(tag), False)


def put(disk, name, data=None, tag='"a"'):
    data = name.encode() * 1000 if data is None else data
    digest = Hasher("blake3").content_digest(data)
    return disk.keep(medium(key_of(name), len(data), digest, tag), data, fetched=disk.now())


def find(disk, name, max_bytes=LARGEST):
    return disk.find(key_of(name), max_bytes=max_bytes, share=MEMORY.share())


def files(tmp_path):
    return sorted((tmp_path / "mmprep-media-1" / "bodies").iterdir())


def body(tmp_path):
    (path,) = files(tmp_path)
    return path


def damaged(disk, name):
    with pytest.raises(Damaged) as caught:
        find(disk, name)
    disk.drop(caught.value.name)
    assert find(disk, name) is None


def test_what_was_kept_is_found_by_another_and_after_a_restart(opened):
    first, second = opened(), opened()
    assert put(first, "a").kept
    assert find(second, "a").data == b"a" * 1000
    first.close()
    assert find(opened(), "a").data == b"a" * 1000
    assert find(second, "b") is None


def test_hits_do_not_prolong_the_ttl_and_a_renewal_does(opened, clock):
    disk = opened()
    put(disk, "a")
    for _ in range(9):
        clock.now += TTL / 10
        found = find(disk, "a")
        assert found.fresh
        disk.touch([found.kept.name])
    clock.now += TTL / 10
    stale = find(disk, "a")
    assert not stale.fresh
    disk.renew(stale.kept.name, Validators('"b"'), ask=False)
    assert find(disk, "a").fresh
    assert find(disk, "a").kept.validators == Validators('"b"')
    clock.now -= TTL / 2
    assert not find(disk, "a").fresh


def test_what_was_not_used_for_longest_goes_first(opened, tmp_path):
    disk = opened(3 * BLOCK)
    for name in "abc":
        put(disk, name)
    disk.touch([find(disk, "a").kept.name])
    assert put(disk, "d").evicted == 1
    assert [name for name in "abcd" if find(disk, name) is None] == ["b"]
    assert put(disk, "e", bytes(2 * BLOCK)).evicted == 2
    assert [name for name in "abcde" if find(disk, name)] == ["d", "e"]
    assert len(files(tmp_path)) == 2
    assert not put(disk, "f", bytes(4 * BLOCK)).kept
    assert len(files(tmp_path)) == 2


def test_keeping_and_making_room_do_not_look_through_the_directory(opened, tmp_path, monkeypatch):
    disk = opened(3 * BLOCK)
    put(disk, "a")

    def refuse(*_):
        raise AssertionError("the directory is looked through")

    with monkeypatch.context() as patched:
        for name in ("scandir", "listdir"):
            patched.setattr(os, name, refuse)
        assert [put(disk, name).evicted for name in "bcdef"] == [0, 0, 1, 1, 1]
        with pytest.raises(AssertionError, match="looked through"):
            disk.sweep()
    assert len(files(tmp_path)) == 3


def test_a_medium_above_the_present_limit_is_not_read(opened):
    disk = opened()
    put(disk, "a")
    assert find(disk, "a", max_bytes=999) is None
    assert find(disk, "a", max_bytes=1000).data


def test_a_later_medium_replaces_an_earlier_one_and_never_the_other_way_round(opened, tmp_path):
    disk = opened()
    put(disk, "a", b"one")
    put(disk, "a", b"two")
    assert find(disk, "a").data == b"two"
    digest = Hasher("blake3").content_digest(b"old")
    assert not disk.keep(medium(key_of("a"), 3, digest), b"old", fetched=disk.now() - 1).kept
    assert find(disk, "a").data == b"two"
    assert len(files(tmp_path)) == 1


def flip(path):
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def link(path):
    other = path.parent.parent / "other"
    other.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(other)


def folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [flip, pipe, link, folder, lambda p: p.unlink(), lambda p: os.truncate(p, 999)])
def test_a_body_that_is_not_what_was_written_is_dropped(opened, tmp_path, harm):
    disk = opened()
    put(disk, "a")
    harm(body(tmp_path))
    damaged(disk, "a")
    assert put(disk, "a").kept
    assert find(disk, "a").data == b"a" * 1000


@pytest.mark.parametrize("harm", ["garbage", "gone", "other tables", "all gone"])
def test_a_broken_index_is_begun_anew_by_all(opened, tmp_path, harm):
    first, second = opened(), opened()
    put(first, "a")
    assert find(second, "a")
    index = tmp_path / "mmprep-media-1" / "index.db"
    if harm == "garbage":
        # Closed first: what is open has the old pages in memory.
        first.close(), second.close()
        index.write_bytes(b"garbage" * 10_000)
    elif harm == "gone":
        for path in index.parent.glob("index.db*"):
            path.unlink()
    elif harm == "other tables":
        with contextlib.closing(sqlite3.connect(index)) as connection:
            connection.execute("DROP TABLE media")
            connection.commit()
    else:
        subprocess.run(["rm", "-rf", str(index.parent)], check=True)
    for disk in (first, second) * 3:
        with contextlib.suppress(OSError, sqlite3.Error):
            assert find(disk, "a") is None
    assert put(first, "b").kept
    assert find(second, "b").data == b"b" * 1000
    opened().sweep()
    assert [path.name[:64] for path in files(tmp_path)] == [key_of("b").hex()]


def test_strange_files_are_swept_and_what_is_beside_them_is_left_alone(opened, tmp_path):
    (tmp_path / "mine").write_text("of the operator")
    disk = opened()
    put(disk, "a")
    bodies = body(tmp_path).parent
    (bodies / f"{'0' * 64}-{'0' * 16}.part").write_bytes(b"partial")
    (bodies / f"{'0' * 64}-{'0' * 16}").write_bytes(b"in no index")
    (bodies / "link").symlink_to(tmp_path / "mine")
    os.mkfifo(bodies / "pipe")
    (bodies / "folder").mkdir()
    assert disk.sweep() == 4
    assert {path.name for path in files(tmp_path)} == {find(disk, "a").kept.name, "folder"}
    assert (tmp_path / "mine").read_text() == "of the operator"


def test_sweeping_forgets_vanished_bodies_and_what_is_stale_for_good(opened, tmp_path, clock):
    disk = opened()
    put(disk, "vanished")
    body(tmp_path).unlink()
    put(disk, "stale", tag="")
    put(disk, "to ask about")
    clock.now += TTL
    put(disk, "new", tag="")
    assert disk.sweep() == 0
    names = ("vanished", "stale", "to ask about", "new")
    assert [name for name in names if find(disk, name)] == ["to ask about", "new"]
    assert len(files(tmp_path)) == 2


def test_a_limit_that_was_lowered_holds_after_a_sweep(opened, tmp_path):
    disk = opened()
    for name in "abc":
        put(disk, name)
    opened(BLOCK).sweep()
    assert [path.name[:64] for path in files(tmp_path)] == [key_of("c").hex()]


def test_a_directory_that_others_may_change_is_made_the_users_own_and_a_link_is_refused(opened, tmp_path):
    home = tmp_path / "mmprep-media-1"
    home.mkdir()
    home.chmod(0o777)
    assert put(opened(), "a").kept
    assert home.stat().st_mode & 0o777 == 0o700
    other = tmp_path / "other"
    other.mkdir()
    (other / "mmprep-media-1").symlink_to(home)
    disk = CacheDisk(other, max_bytes=LARGEST, ttl=TTL)
    with pytest.raises(OSError):
        find(disk, "a")


# --- other processes --------------------------------------------------------------------------------------------------

PROLOGUE = """
import os, sys
from pathlib import Path
from mmprep.digest import Hasher
from mmprep_frontend.media.cache_disk import CacheDisk, Damaged
from mmprep_frontend.media.cache_index import Kept
from mmprep_frontend.media.memory import MediaMemory
from mmprep_frontend.media.storing import Validators
disk = CacheDisk(Path(sys.argv[1]), max_bytes=1 << 20, ttl=100.0)
def put(key, data):
    digest = Hasher("blake3").content_digest(data)
    kept = Kept(key, len(data), "blake3", digest, ("http://a/",), bytes(32), True, Validators(), False)
    return disk.keep(kept, data, fetched=disk.now())
"""
STOPPED = (
    PROLOGUE
    + """
def stop(*_):
    print("in the middle", flush=True)
    sys.stdin.read()
if sys.argv[2] == "partial":
    os.fsync = stop
else:
    disk._writing.use = lambda use=disk._writing.use, calls=[]: calls.append(1) or (stop() if len(calls) > 1 else use())
put(bytes(32), bytes(9000))
"""
)
RACING = (
    PROLOGUE
    + """
sys.stdin.readline()
key, odd = bytes(32), 0
mine = sys.argv[2].encode()
for turn in range(60):
    data = mine * (5000 + turn)
    try:
        put(key, data)
        found = disk.find(key, max_bytes=1 << 20, share=MediaMemory(1 << 20).share())
        assert found is None or len(set(found.data)) == 1
    except (Damaged, BlockingIOError):
        odd += 1
    except Exception as error:
        # Only waiting for the other may end early.
        assert "locked" in str(error), error
disk.close()
print("done")
"""
)


def child(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )


@pytest.mark.parametrize("moment", ["partial", "before the index knows"])
def test_what_a_killed_writer_left_is_swept_and_what_a_living_one_writes_is_not(opened, tmp_path, moment):
    disk = opened()
    put(disk, "a")
    with child(STOPPED, tmp_path, moment) as process:
        assert process.stdout.readline() == "in the middle\n"
        assert len(files(tmp_path)) == 2
        assert disk.sweep() == 0
        assert len(files(tmp_path)) == 2
        process.kill()
    assert disk.find(bytes(32), max_bytes=LARGEST, share=MEMORY.share()) is None
    assert disk.sweep() == 1
    assert body(tmp_path).name == find(disk, "a").kept.name


def test_two_processes_that_write_one_key_leave_one_whole_medium(tmp_path):
    processes = [child(RACING, tmp_path, name) for name in "ab"]
    with processes[0], processes[1]:
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.stdout.read() for process in processes] == ["done\n", "done\n"]
    assert [process.returncode for process in processes] == [0, 0]
    disk = CacheDisk(tmp_path, max_bytes=LARGEST, ttl=TTL)
    with contextlib.closing(disk):
        disk.sweep()
        found = disk.find(bytes(32), max_bytes=LARGEST, share=MEMORY.share())
        assert len(set(found.data)) == 1
        assert body(tmp_path).name == found.kept.name
