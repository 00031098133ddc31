import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from mmprep.process_lock import ProcessLock, holder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "backend-a.lock"


@contextlib.contextmanager
def child(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run ``code`` in a new interpreter; it prints a line when it is ready and ends when its input ends."""
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


HOLD = """
import os, sys
from mmprep.process_lock import ProcessLock
lock = ProcessLock(sys.argv[1])
print(lock.acquire(), flush=True)
sys.stdin.read()
"""


def test_a_free_lock_is_granted_and_a_held_one_is_refused_to_others(path):
    with child(HOLD, path) as process:
        assert process.stdout.readline() == "True\n"
        lock = ProcessLock(path)
        assert not lock.acquire()
        assert not lock.held


def test_the_holder_is_named_by_its_pid(path):
    with child(HOLD, path) as process:
        process.stdout.readline()
        assert holder(path) == process.pid


def test_asking_for_the_holder_does_not_take_the_lock(path):
    path.touch()
    assert holder(path) is None
    with child(HOLD, path) as process:
        assert process.stdout.readline() == "True\n"


def test_a_missing_file_has_no_holder_and_is_not_made(path):
    assert holder(path) is None
    assert not path.exists()


def test_a_killed_holder_has_lost_the_lock(path):
    with child(HOLD, path) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert holder(path) is None
        with ProcessLock(path) as lock:
            assert lock.acquire()


def test_a_stopped_holder_keeps_the_lock(path):
    with child(HOLD, path) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert holder(path) == process.pid


FORK = """
import os, sys
from mmprep.process_lock import ProcessLock, holder
lock = ProcessLock(sys.argv[1])
assert lock.acquire()
if os.fork() == 0:
    print(os.getpid(), lock.held, holder(sys.argv[1]) == os.getppid(), flush=True)
sys.stdin.read()
"""


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(path):
    with child(FORK, path) as process:
        forked, held, sees_parent = process.stdout.readline().split()
        assert (held, sees_parent) == ("False", "True")
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(int(forked), 0)  # still lives, with a descriptor of the file's directory entry at most
        assert holder(path) is None


RELEASE_IN_FORK = """
import os, sys
from mmprep.process_lock import ProcessLock
lock = ProcessLock(sys.argv[1])
assert lock.acquire()
if os.fork() == 0:
    lock.release()
    os._exit(0)
os.wait()
print(lock.held, flush=True)
sys.stdin.read()
"""


def test_a_release_in_a_forked_child_leaves_the_parents_lock_alone(path):
    with child(RELEASE_IN_FORK, path) as process:
        assert process.stdout.readline() == "True\n"
        assert holder(path) == process.pid


def test_a_released_lock_is_free_and_can_be_taken_again(path):
    lock = ProcessLock(path)
    for _ in range(2):
        assert lock.acquire()
        assert lock.held
        assert holder(path) == os.getpid()
        lock.release()
        lock.release()
        assert not lock.held
        assert holder(path) is None


def test_taking_a_held_lock_again_changes_nothing(path):
    with ProcessLock(path) as lock:
        assert lock.acquire()
        assert lock.acquire()
        assert lock.held


def test_a_second_lock_object_of_the_holder_is_refused_and_costs_nothing(path):
    with ProcessLock(path) as lock:
        assert lock.acquire()
        second = ProcessLock(path)
        assert not second.acquire()
        second.release()
        assert seen_from_outside(path) == os.getpid()


ASK = "import sys; from mmprep.process_lock import holder; print(holder(sys.argv[1]))"


def seen_from_outside(path, *, prefix=()):
    with child(ASK, path, prefix=prefix) as process:
        answer = process.stdout.readline().strip()
    return None if answer == "None" else int(answer)


def test_asking_for_its_own_lock_does_not_drop_it(path):
    # The trap: F_GETLK is silent about own locks, and closing the descriptor it was asked on would drop them.
    with ProcessLock(path) as lock:
        assert lock.acquire()
        assert holder(path) == os.getpid()
        assert seen_from_outside(path) == os.getpid()


def test_two_threads_are_granted_one_lock_once(path):
    barrier = threading.Barrier(8)
    granted = []
    locks = [ProcessLock(path) for _ in range(8)]

    def take(lock):
        barrier.wait()
        if lock.acquire():
            granted.append(lock)

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(granted) == 1
    assert seen_from_outside(path) == os.getpid()
    granted[0].release()


def test_the_holder_removes_the_file_and_the_next_one_starts_a_new_one(path):
    lock, other = ProcessLock(path), ProcessLock(path)
    assert lock.acquire()
    lock.remove()
    assert not path.exists()
    assert other.acquire()
    assert path.exists()
    other.release()


def test_only_the_holder_removes_the_file(path):
    with child(HOLD, path) as process:
        process.stdout.readline()
        with pytest.raises(RuntimeError, match="holder"):
            ProcessLock(path).remove()
        assert holder(path) == process.pid


def test_a_lock_on_a_removed_file_is_not_a_lock(path, monkeypatch):
    # The file is removed, as by a service that cleans up, after it was opened and before it was locked.
    import fcntl

    take = fcntl.lockf
    inodes = []

    def remove_first(fd, *arguments):
        inodes.append(os.fstat(fd).st_ino)
        if len(inodes) == 1:
            path.unlink()
            path.with_name("keeps-the-inode-in-use").touch()
        return take(fd, *arguments)

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    with ProcessLock(path) as lock:
        assert lock.acquire()
        assert len(inodes) == 2
        assert path.stat().st_ino == inodes[1]
        assert seen_from_outside(path) == os.getpid()


def test_a_link_in_place_of_the_file_is_not_followed(path, tmp_path):
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        ProcessLock(path).acquire()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to make a pid namespace")
def test_a_holder_in_another_pid_namespace_is_seen_without_a_number(path):
    with ProcessLock(path) as lock:
        assert lock.acquire()
        assert seen_from_outside(path, prefix=("unshare", "--pid", "--fork", "--kill-child")) == 0


def test_the_lock_file_is_private(path):
    with ProcessLock(path) as lock:
        lock.acquire()
        assert path.stat().st_mode & 0o777 == 0o600
