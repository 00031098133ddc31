"""The guards of ``conftest.py`` catch what they are there for: a test run of its own, with tests that misbehave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def run(tmp_path, tests, *arguments, adapt=str):
    """Run ``tests`` under the guards; ``adapt`` may change the text of the conftest. Returns the closed process."""
    (tmp_path / "conftest.py").write_text(adapt(CONFTEST.read_text()))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -rA\nmarkers =\n    slow: long\n")
    (tmp_path / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


def soon(conftest):
    """Do not wait long for what will not go by itself."""
    assert "SETTLE = 10.0" in conftest
    return conftest.replace("SETTLE = 10.0", "SETTLE = 0.2")


def test_what_a_test_leaves_is_named_removed_and_held_against_that_test_only(tmp_path):
    segment = f"mmprep-{os.geteuid()}-harness-{os.getpid()}"
    result = run(
        tmp_path,
        f"""
import os, socket, subprocess, sys
from pathlib import Path

def test_child():
    global process
    process = subprocess.Popen([sys.executable, "-c", "input('sleepy')"], stdin=subprocess.PIPE)

def test_grandchild():
    sleeper = "import time; time.sleep(1000)"
    subprocess.run([sys.executable, "-c", f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {{sleeper!r}}])"])

def test_segment():
    Path("/dev/shm/{segment}").touch()

def test_socket(runtime_dir):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime_dir / "a.sock"))

def test_clean(runtime_dir):
    subprocess.run(["true"])
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(runtime_dir / "a.sock"))
    listener.close()
    (runtime_dir / "a.sock").unlink()
""",
        adapt=soon,
    )
    assert not (Path("/dev/shm") / segment).exists()
    lines = result.stdout.splitlines()
    errors = sorted(line for line in lines if line.startswith("ERROR test_it"))
    assert [line.split("::")[1].split()[0] for line in errors] == [
        "test_child",
        "test_grandchild",
        "test_segment",
        "test_socket",
    ]
    assert f"segment {segment}" in result.stdout
    assert "a.sock" in result.stdout
    assert "5 passed, 4 errors" in lines[-1]


def test_a_grandchild_that_ends_a_moment_after_its_parent_is_no_leftover(tmp_path):
    tests = """
import subprocess

def test_it():
    subprocess.run(["sh", "-c", "(head -c 10000000 /dev/zero | cat >/dev/null) & exit 0"])
"""
    assert "1 passed in" in run(tmp_path, tests).stdout


def test_nothing_in_the_test_process_reaches_beyond_this_machine(tmp_path):
    # 192.0.2.0/24 and 2001:db8::/32 are for documentation: there is nothing, even if the guard failed.
    result = run(
        tmp_path,
        """
import asyncio, socket, pytest

@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid", "::ffff:192.0.2.1", "2001:db8::1"])
def test_dial(host):
    with pytest.raises(RuntimeError, match="this machine"):
        socket.create_connection((host, 9), timeout=1)

def test_datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, pytest.raises(RuntimeError):
        sock.sendto(b"", ("192.0.2.1", 9))

def test_asyncio():
    with pytest.raises(RuntimeError, match="this machine"):
        asyncio.run(asyncio.open_connection("192.0.2.1", 9))

@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_here(host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection((host, server.getsockname()[1])).close()
""",
    )
    # Each call was refused inside the test, and counts against the test although it caught the refusal.
    assert "8 passed, 6 errors" in result.stdout
    assert "call off this machine: socket.connect ('192.0.2.1', 9)" in result.stdout
    assert "call off this machine: socket.getaddrinfo 'example.invalid'" in result.stdout


def test_a_test_that_stands_still_ends_the_run_with_all_stacks(tmp_path):
    result = run(
        tmp_path,
        """
import threading

def test_that_never_ends():
    threading.Event().wait()
""",
        adapt=lambda conftest: conftest.replace("WATCHDOG_MINUTES = 10", "WATCHDOG_MINUTES = 0.01"),
    )
    assert result.returncode == 1
    assert "Timeout" in result.stderr
    assert "test_that_never_ends" in result.stderr


@pytest.mark.parametrize(("argument", "outcome"), [("--color=no", "1 skipped"), ("--slow", "1 passed")])
def test_slow_tests_run_only_when_asked_for(tmp_path, argument, outcome):
    tests = """
import pytest
from hypothesis import settings

@pytest.mark.slow
def test_slow():
    assert settings.default.max_examples == 5000
"""
    assert outcome in run(tmp_path, tests, argument).stdout
