import os
import secrets
import shlex
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mmprep.errors import InvalidRequest, ServiceUnavailable, StartupError
from mmprep.process_lock import ProcessLock
from mmprep.runtime import MAX_SOCKET_PATH, Holder, RuntimeDir, default_path, parse_endpoint
from mmprep.segment import segment_name, unlink

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make another user's directory")


@pytest.fixture
def runtime(runtime_dir):
    runtime = RuntimeDir.prepare(runtime_dir)
    yield runtime
    runtime.leave()


def leave_socket(endpoint):
    """Leave a socket file that nobody listens on, as a killed process does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(endpoint.removeprefix("ipc://"))


def leave_segment(runtime_id):
    name = segment_name(runtime_id, secrets.token_bytes(16))
    (Path("/dev/shm") / name[1:]).touch()
    return name


def segment_exists(name):
    return (Path("/dev/shm") / name[1:]).exists()


HOLD = """
import sys
from mmprep.process_lock import ProcessLock
lock = ProcessLock(sys.argv[1])
print(lock.acquire(), flush=True)
sys.stdin.read()
"""


class Elsewhere:
    """Another process that holds a lock."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        command = [sys.executable, "-c", HOLD, str(self.path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "True\n"
        return self.process

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def test_the_default_is_the_users_runtime_directory(tmp_path):
    assert default_path({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "mmprep"


@pytest.mark.parametrize("unusable", ["", "relative/path", "/does/not/exist"])
def test_the_default_passes_over_a_runtime_directory_that_cannot_be_used(unusable):
    uid = os.geteuid()
    assert default_path({"XDG_RUNTIME_DIR": unusable}) in {Path(f"/run/user/{uid}/mmprep"), Path(f"/tmp/mmprep-{uid}")}


def test_a_directory_that_is_missing_is_made_for_this_user_alone(runtime_dir):
    runtime = RuntimeDir.prepare(runtime_dir / "a" / "b")
    for path in (runtime.path, runtime.path / "locks"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_relative_path_becomes_absolute(runtime_dir, monkeypatch):
    monkeypatch.chdir(runtime_dir)
    assert RuntimeDir.prepare("mm").path == runtime_dir / "mm"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_directory_that_others_can_write_is_refused(runtime_dir, mode):
    runtime_dir.chmod(mode)
    with pytest.raises(StartupError, match=r"chmod 700"):
        RuntimeDir.prepare(runtime_dir)
    assert not (runtime_dir / "locks").exists()


@as_root
def test_a_directory_of_another_user_is_refused_and_not_touched(runtime_dir):
    os.chown(runtime_dir, 12345, 12345)
    with pytest.raises(StartupError, match="belongs to user 12345"):
        RuntimeDir.prepare(runtime_dir)
    assert list(runtime_dir.iterdir()) == []


def test_a_file_or_a_link_in_place_of_the_directory_is_refused(runtime_dir):
    (runtime_dir / "file").touch()
    (runtime_dir / "real").mkdir()
    (runtime_dir / "link").symlink_to(runtime_dir / "real")
    for name in ("file", "link", "file/below"):
        with pytest.raises(StartupError, match="--runtime-dir"):
            RuntimeDir.prepare(runtime_dir / name)


def test_a_path_is_refused_one_byte_above_what_sockets_take(runtime_dir):
    room = MAX_SOCKET_PATH - len(os.fsencode(runtime_dir)) - len("//frontend-9999.sock")
    longest = RuntimeDir.prepare(runtime_dir / ("x" * room))
    assert len(longest.frontend(9999)) == len("ipc://") + MAX_SOCKET_PATH
    leave_socket(longest.frontend(9999))
    Path(longest.frontend(9999).removeprefix("ipc://")).unlink()
    with pytest.raises(StartupError, match=r"--runtime-dir: the path is 1 bytes too long"):
        RuntimeDir.prepare(runtime_dir / ("x" * (room + 1)))


def test_each_socket_has_a_name_of_its_own(runtime):
    endpoints = [
        runtime.writer,
        runtime.writer_bulk,
        runtime.tensors,
        runtime.lanes,
        runtime.lanes_bulk,
        runtime.supervisor,
        runtime.frontend(0),
        runtime.frontend(12),
    ]
    assert endpoints == [
        f"ipc://{runtime.path}/{name}.sock"
        for name in (
            "writer",
            "writer-bulk",
            "tensors",
            "lanes",
            "lanes-bulk",
            "supervisor",
            "frontend-0",
            "frontend-12",
        )
    ]


@pytest.mark.parametrize("number", [-1, 10_000])
def test_there_is_no_frontend_beyond_the_bound_of_the_names(runtime, number):
    with pytest.raises(ValueError, match="no frontend"):
        runtime.frontend(number)


def test_a_lock_path_is_made_of_role_and_id(runtime):
    assert runtime.lock_path("backend", "engine-0.A_b") == runtime.path / "locks" / "backend-engine-0.A_b.lock"


@pytest.mark.parametrize("identifier", ["", "a/b", "../x", "a b", "ä", "x" * 65, "a\n", "a\0"])
def test_an_id_that_could_be_something_else_than_a_name_is_refused(runtime, identifier):
    with pytest.raises(InvalidRequest, match="backend id"):
        runtime.lock_path("backend", identifier)


def test_a_second_service_on_the_directory_is_told_who_runs_there(runtime):
    with Elsewhere(runtime.path / "service.lock") as process:
        with pytest.raises(StartupError, match=rf"--runtime-dir: .*pid {process.pid}.*kill {process.pid}"):
            runtime.take()
        assert runtime.service_pid() == process.pid


def test_the_directory_of_a_killed_service_can_be_taken(runtime):
    with Elsewhere(runtime.path / "service.lock") as process:
        process.kill()
        process.wait()
        runtime.take()
    assert runtime.service_pid() == os.getpid()


def test_holders_names_the_living_processes(runtime):
    runtime.lock_path("backend", "dead").touch()
    (runtime.path / "locks" / "something else").touch()
    with Elsewhere(runtime.lock_path("lane", "3")) as lane, Elsewhere(runtime.lock_path("backend", "a-b.c")) as backend:
        assert runtime.holders() == [Holder("backend", "a-b.c", backend.pid), Holder("lane", "3", lane.pid)]


def test_leftovers_of_a_dead_service_are_removed_and_nothing_else(runtime, runtime_dir):
    other = RuntimeDir.prepare(runtime_dir / "other")
    leave_socket(runtime.writer)
    leave_socket(runtime.frontend(3))
    strangers = [
        runtime.path / "notes.txt",
        runtime.path / "other" / "data",
        runtime.path / "locks" / "notes",
        runtime.path / "lanes.sock",
    ]
    for stranger in strangers:
        stranger.touch()
    leave_socket(f"ipc://{runtime.path}/mine.sock")
    runtime.lock_path("lane", "0").touch()
    ours, theirs = leave_segment(runtime.runtime_id), leave_segment(other.runtime_id)
    runtime.take()
    try:
        with Elsewhere(runtime.lock_path("backend", "alive")):
            removed = runtime.remove_leftovers()
        assert sorted(removed) == sorted(["writer.sock", "frontend-3.sock", "lane-0.lock", ours])
        assert not segment_exists(ours)
        assert segment_exists(theirs)
        assert runtime.lock_path("backend", "alive").exists()
        assert all(stranger.exists() for stranger in strangers)
        assert (runtime.path / "mine.sock").exists()
    finally:
        (runtime.path / "mine.sock").unlink()
        unlink(theirs)


def test_without_the_service_lock_nothing_is_removed(runtime):
    runtime.lock_path("lane", "0").touch()
    for remove in (runtime.remove_leftovers, runtime.clean):
        with pytest.raises(RuntimeError, match="service lock"):
            remove()
    assert runtime.lock_path("lane", "0").exists()


def test_a_clean_stop_leaves_nothing(runtime_dir):
    runtime = RuntimeDir.prepare(runtime_dir / "mm")
    runtime.take()
    leave_socket(runtime.writer)
    leave_socket(runtime.supervisor)
    name = leave_segment(runtime.runtime_id)
    with ProcessLock(runtime.lock_path("writer", "0")) as lock:
        assert lock.acquire()
    runtime.clean()
    assert list(runtime_dir.iterdir()) == []
    assert not segment_exists(name)


def test_a_clean_stop_keeps_a_directory_that_was_there_before(runtime_dir):
    runtime = RuntimeDir.prepare(runtime_dir)
    runtime.take()
    runtime.clean()
    assert list(runtime_dir.iterdir()) == []


def test_a_clean_stop_leaves_the_lock_of_a_living_backend(runtime_dir):
    runtime = RuntimeDir.prepare(runtime_dir / "mm")
    runtime.take()
    with Elsewhere(runtime.lock_path("backend", "engine")) as backend:
        runtime.clean()
        again = RuntimeDir.prepare(runtime_dir / "mm")
        assert again.holders() == [Holder("backend", "engine", backend.pid)]
        assert again.service_pid() is None


def test_two_directories_have_two_ids_and_each_keeps_its_own(runtime_dir):
    first, second = RuntimeDir.prepare(runtime_dir / "1"), RuntimeDir.prepare(runtime_dir / "2")
    assert first.runtime_id != second.runtime_id
    assert first.runtime_id == RuntimeDir(first.path).runtime_id
    assert len(first.runtime_id) == 8


def test_an_endpoint_is_a_path_with_or_without_its_scheme(runtime):
    assert parse_endpoint(str(runtime.path)).path == runtime.path
    assert parse_endpoint(f"ipc://{runtime.path}").path == runtime.path


def test_an_endpoint_without_a_service_names_the_command_that_starts_one(runtime_dir):
    missing = runtime_dir / "not there"
    with pytest.raises(ServiceUnavailable) as caught:
        parse_endpoint(f"ipc://{missing}")
    assert caught.value.message.endswith(f"mmprep serve --runtime-dir {shlex.quote(str(missing))}")
    assert not missing.exists()


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5555", "relative", "ipc://relative", ""])
def test_what_is_no_runtime_directory_is_refused(endpoint):
    with pytest.raises(InvalidRequest, match="ipc://"):
        parse_endpoint(endpoint)
