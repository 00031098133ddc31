"""What every test runs under: budgets, guards against leftovers and against the network, and a watchdog.

- Hypothesis: the profile ``normal`` (few examples, no deadline); ``long`` with ``HYPOTHESIS_PROFILE=long`` or ``--slow``.
- After every test, the test process has no new children, no new shared-memory segment exists, and the runtime
  directories given out hold no sockets. What a test left is removed, so that only the test that left it fails.
- Nothing in the test process may connect to, send to, or look up a host that is not this machine. Sockets below Python
  (ZeroMQ's, uvloop's) are not seen by this guard, nor are child processes.
- Where files of tests run side by side, each process of them has a /dev/shm of its own.
- The test process has no torch, as the service's processes have none: what transformers computes is what it computes for them.
  The tests of what needs torch use :mod:`tests.torch_too`.
- A test may take as long as it needs. One that stands still for :data:`WATCHDOG_MINUTES` ends the run with all stacks.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import ipaddress
import os
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mmprep.without_torch import leave_torch_out

WATCHDOG_MINUTES = 10
SLOW_WATCHDOG_MINUTES = 60

#: Seconds that processes, sockets and segments which are on their way out get to be gone after a test. A generous bound
#: on a wait for an event, and no statement about speed.
SETTLE = 10.0

SHM = Path("/dev/shm")
PR_SET_CHILD_SUBREAPER = 36

# too_slow measures the machine, and this one may be shared.
settings.register_profile("normal", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("normal"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "normal"))

watchdog_output = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the long tests too, with more examples for each property")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        _take_own_shared_memory()
    else:
        _make_own_caches(config)
    leave_torch_out()
    if config.getoption("--slow"):
        settings.load_profile("long")
    # Output is not captured yet; the watchdog must be heard while it is.
    config.stash[watchdog_output] = os.dup(2)
    # Grandchildren whose parent dies become children of this process, where nothing_left sees them.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sys.addaudithook(_refuse_network)


def _make_own_caches(config: pytest.Config) -> None:
    """Keep what services cache for this user where pytest keeps its own, if it does; all processes of a run share it."""
    if config.pluginmanager.has_plugin("cacheprovider"):
        os.environ["XDG_CACHE_HOME"] = str(config.cache.mkdir("mmprep"))


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[watchdog_output])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # `-m slow` asks for them, too.
    if not config.getoption("--slow") and "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes long; give --slow, or -m slow for nothing else"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    minutes = SLOW_WATCHDOG_MINUTES if item.get_closest_marker("slow") else WATCHDOG_MINUTES
    faulthandler.dump_traceback_later(minutes * 60, exit=True, file=item.config.stash[watchdog_output])
    try:
        with _turn(item):
            return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def _turn(item: pytest.Item) -> Iterator[None]:
    """Let a test that is marked ``alone`` run while no other does, where tests run side by side."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    with Path(__file__).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        yield


CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000


def _take_own_shared_memory() -> None:
    """Put this thread, and whatever it starts, into a mount namespace with an empty /dev/shm.

    So no test sees the segments of one that runs beside it. ``scripts/test`` runs tests side by side only where this works.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(b"tmpfs", str(SHM).encode(), b"tmpfs", 0, None),
    ):
        if failed:
            raise OSError(
                ctypes.get_errno(), "tests that run side by side need a mount namespace each; run them with -n 0"
            )


# --- the network ---------------------------------------------------------------------------------------------------

off_machine: list[str] = []


def _refuse_network(event: str, arguments: tuple[object, ...]) -> None:
    if not event.startswith("socket."):
        return
    if event in {"socket.connect", "socket.sendto", "socket.sendmsg"}:
        address = arguments[1]
        refused = isinstance(address, tuple) and not _is_here(address[0])
    elif event in {"socket.getaddrinfo", "socket.gethostbyname"}:
        address = arguments[0]
        refused = not _is_here(address) and not _is_literal(address)
    else:
        return
    if refused:
        off_machine.append(f"{event} {address!r}")
        raise RuntimeError(f"tests stay on this machine: {event} {address!r}")


def _is_here(host: object) -> bool:
    if host is None or host in {"", b"", "localhost", b"localhost"}:
        return True
    if not _is_literal(host):
        return False
    address = ipaddress.ip_address(_text(host))
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


def _is_literal(host: object) -> bool:
    try:
        ipaddress.ip_address(_text(host))
    except ValueError:
        return False
    return True


def _text(host: object) -> str:
    return host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)


# --- leftovers -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail the test that leaves a process or a segment behind, or that tried to leave this machine."""
    children, segments = _children(), _segments()
    off_machine.clear()
    yield
    left = [f"process {what}" for what in _end_new_children(children)]
    left += [f"segment {name}" for name in _remove_new_segments(segments)]
    left += [f"call off this machine: {call}" for call in off_machine]
    assert not left, "the test left behind: " + ", ".join(left)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """Give an empty directory with a path short enough for sockets; it must hold no socket when the test is over."""
    path = Path(tempfile.mkdtemp(prefix="mmprep-", dir="/tmp"))
    yield path
    _wait_until(lambda: not _sockets(path))
    left = _sockets(path)
    shutil.rmtree(path, ignore_errors=True)
    assert not left, "the test left sockets: " + ", ".join(left)


def _wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that sends no event, at most :data:`SETTLE` seconds."""
    deadline = time.monotonic() + SETTLE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


def _sockets(path: Path) -> list[str]:
    return [entry.name for entry in path.rglob("*") if stat.S_ISSOCK(entry.lstat().st_mode)]


def _children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            found.update(map(int, (task / "children").read_text().split()))
    return found


def _end_new_children(known: set[int]) -> list[str]:
    """Wait for the processes that are new since ``known``, kill those that stay, and return their command lines."""
    deadline = time.monotonic() + SETTLE
    left = []
    # Ending one process may hand its children to this one.
    while new := {pid for pid in _children() - known if not _is_tracker(pid)}:
        for pid in new:
            if not _wait_for_exit(pid, deadline):
                left.append(f"{pid} ({_command(pid)})")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    return left


def _wait_for_exit(pid: int, deadline: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(max(0, deadline - time.monotonic()) * 1000))
    finally:
        os.close(pidfd)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _is_tracker(pid: int) -> bool:
    # multiprocessing starts it once, for the life of the test process.
    return "multiprocessing.resource_tracker" in _command(pid)


def _segments() -> set[str]:
    return {entry.name for entry in SHM.glob(f"mmprep-{os.geteuid()}-*")}


def _remove_new_segments(known: set[str]) -> list[str]:
    """Remove the segments that are new since ``known`` and of no living service, and return their names.

    Where another process maps a segment, it and the others of its runtime directory, which nobody may be reading, belong
    to a service that outlives the test, or to another test run on this machine.
    """
    if _segments() <= known:
        return []
    _wait_until(lambda: _segments() - known <= _mapped_elsewhere(_segments() - known))
    new = _segments() - known
    left = sorted(new - _mapped_elsewhere(new))
    for name in left:
        (SHM / name).unlink(missing_ok=True)
    return left


def _mapped_elsewhere(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):  # ended, or another user's
                maps = (process / "maps").read_text()
                found.update(name for name in names if f"/dev/shm/{name.rpartition('-')[0]}-" in maps)
    return found
