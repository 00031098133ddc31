"""The demonstration as people start it. What any of these runs leaves behind fails the test (``nothing_left``)."""

import signal
import socket
import subprocess
import sys

import pytest


def command(runtime_dir, *arguments):
    return [sys.executable, "-m", "mmprep.demo", "--runtime-dir", str(runtime_dir), *arguments]


@pytest.fixture
def started(runtime_dir):
    process = subprocess.Popen(
        command(runtime_dir, "--port", "0"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process:
        yield process
        if process.poll() is None:
            process.kill()


def read_until(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the demonstration ended before it printed {text!r}")


def test_once_shows_every_step_and_ends_with_status_0(runtime_dir):
    result = subprocess.run(command(runtime_dir, "--port", "0", "--once"), capture_output=True, text=True, check=False)
    assert "FAILED" not in result.stdout
    assert "Every step was right." in result.stdout
    for subject in ("same places", "cache", "mapping", "cat.jpg", "rocket.jpg", "released"):
        assert f"  ok    {subject} " in result.stdout
    assert "equal to Qwen2VLImageProcessorPil's to the bit" in result.stdout
    assert (result.returncode, result.stderr) == (0, "")
    assert list(runtime_dir.iterdir()) == []


def test_a_service_that_cannot_start_is_quoted_and_the_status_is_1(runtime_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = subprocess.run(
            command(runtime_dir, "--port", port, "--once"), capture_output=True, text=True, check=False
        )
    assert f"--port {port}: cannot listen there" in result.stdout
    assert "the service has ended with status 1" in result.stdout
    assert (result.returncode, result.stderr) == (1, "")


def test_it_serves_until_it_is_interrupted_and_then_stops_with_status_0(started):
    read_until(started, "Serving, until Ctrl-C")
    started.send_signal(signal.SIGINT)
    rest = started.stdout.read()
    assert started.wait() == 0
    assert "Stopping the service." in rest
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param("The service", signal.SIGINT, marks=pytest.mark.slow),
        ("lanes warm", signal.SIGTERM),
        pytest.param("A second process", signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_the_middle_stops_everything(started, moment, number):
    read_until(started, moment)
    started.send_signal(number)
    rest = started.stdout.read()
    assert started.wait() == 128 + number
    assert rest.splitlines()[-1] == "Stopped."
    assert "Traceback" not in rest
