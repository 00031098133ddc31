"""The commands beside ``serve``, as a person or a script runs them."""

import json
import signal
import subprocess
import sys

import pytest
from tests.integration.service import decode_item, environment, image, mmprep, photo, serving, text, user

from mmprep import Backend, embedded
from mmprep.runtime import RuntimeDir


@pytest.fixture(scope="module")
def service():
    with serving("--cache-size", "32MiB", "--frontends", 2, "--lanes", 2) as running:
        yield running


def test_render_writes_the_answer_to_a_request_from_a_file(service, tmp_path):
    messages = user(photo("cat.png"), text("What is it?"))
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"messages": messages, "mm_dtype": "float32"}))
    done = mmprep("render", file, "--cache-size", "32MiB")
    assert done.returncode == 0, done.stderr
    answer, expected = json.loads(done.stdout), service.render(messages, mm_dtype="float32")
    assert answer["token_ids"] == expected["token_ids"]
    assert answer["features"] == expected["features"]
    assert decode_item(answer["features"]["kwargs_data"]["image"][0])["pixel_values"].dtype == "float32"


def test_render_reads_standard_input_takes_a_model_and_tells_an_error_by_its_exit_status():
    request = json.dumps({"messages": user(image(b"no picture"))}).encode()
    done = mmprep("render", "-", "--model", embedded.path(), "--cache-size", "32MiB", stdin=request)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == 415
    assert "Traceback" not in done.stderr


def test_render_that_is_terminated_ends_its_service(tmp_path):
    request = tmp_path / "request.json"
    request.write_text("{}")
    command = [sys.executable, "-m", "mmprep", "render", str(request), "--cache-size", "1MiB"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment()) as rendering:
        assert "starting" in rendering.stderr.readline()
        rendering.terminate()
        assert rendering.stdout.read() == ""  # it is the service's, too, and ends with the last who has it
    assert rendering.returncode == 128 + signal.SIGTERM


def test_render_that_is_killed_leaves_no_service(tmp_path):
    request = tmp_path / "request.json"
    request.write_text("{}")
    command = [sys.executable, "-m", "mmprep", "render", str(request), "--cache-size", "1MiB"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    own = environment() | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, **pipes, text=True, env=own) as rendering:
        assert "starting" in rendering.stderr.readline()
        rendering.kill()
        assert rendering.stdout.read() == ""  # it is the service's, too, and ends with the last who has it
    (directory,) = tmp_path.glob("mmprep-*")
    assert list(directory.iterdir()) == []


def test_render_tells_of_a_file_that_is_not_there_before_it_starts_anything(tmp_path):
    done = mmprep("render", tmp_path / "none.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot be read" in done.stderr
    done = mmprep("render", "-", "--cache-size", "nothing", stdin=b"{}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--cache-size" in done.stderr


def test_status_in_json_has_the_keys_of_the_interface(service):
    with Backend(service.endpoint, id="engine-0") as backend:
        answer = service.render(user(photo("cat.png")), mm_payload="shm", backend_id=backend.id)
        done = mmprep("status", "--json", "--runtime-dir", service.runtime_dir)
        status = json.loads(done.stdout)
        assert set(status) == set(service.status())
        (address,) = answer["features"]["mm_addresses"]["image"]
        item = backend.open(address)
        item.release()
    assert status["supervisor"] == {"pid": service.process.pid}
    assert len(status["frontends"]) == 2
    assert all({"pid", "inflight"} <= set(frontend) for frontend in status["frontends"])
    assert {"pid", "incarnation"} <= set(status["worker"])
    assert len(status["lanes"]) == 2
    assert all({"pid", "state"} <= set(lane) for lane in status["lanes"])
    (told,) = status["backends"]
    assert {"id", "pid", "leases"} <= set(told)
    assert (told["id"], told["leases"]) == ("engine-0", 1)
    ring = status["ring"]
    assert {"capacity", "free", "ready", "leased", "filling", "entries", "evictions"} <= set(ring)
    assert ring["free"] + ring["ready"] + ring["leased"] + ring["filling"] == ring["capacity"]
    assert ring["leased"] >= address["length"]
    assert ring["entries"] >= 1
    assert status["segment"] == address["segment"]
    assert isinstance(status["queues"], dict)


def test_status_for_people_names_every_process(service):
    status = service.status()
    done = mmprep("status", "--runtime-dir", service.runtime_dir)
    assert done.returncode == 0
    pids = [status["supervisor"]["pid"], status["worker"]["pid"]]
    pids += [process["pid"] for kind in ("frontends", "lanes") for process in status[kind]]
    assert all(f"pid {pid}" in done.stdout for pid in pids)
    assert {"ring", "cache hits", "queue"} <= {line[:10].strip() for line in done.stdout.splitlines()}
    assert "\x1b" not in done.stdout


def test_status_without_a_service_says_how_to_start_one(tmp_path):
    for directory in (tmp_path, tmp_path / "none"):
        done = mmprep("status", "--json", "--runtime-dir", directory)
        assert (done.returncode, done.stdout) == (1, "")
        assert "mmprep serve" in done.stderr


def test_status_of_a_service_that_does_not_answer_is_told_as_such(runtime_dir):
    """It starts, stops, or is suspended: its lock is held, and nobody listens."""
    runtime = RuntimeDir.prepare(runtime_dir)
    runtime.take()
    try:
        done = mmprep("status", "--json", "--runtime-dir", runtime_dir)
    finally:
        runtime.clean()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mmprep status: the service does not answer; is it stopped or overloaded?\n"


def test_every_command_explains_itself():
    usage = mmprep("--help")
    assert usage.returncode == 0
    assert mmprep().returncode == 2
    assert mmprep("fly").returncode == 2
    commands = [line.split()[0] for line in usage.stdout.splitlines() if line.startswith("  ")]
    assert {"serve", "render", "status", "doctor"} <= set(commands)
    for command in commands:
        done = mmprep(command, "--help")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: mmprep {command}")
    assert "--lease-seconds" in mmprep("serve", "--help").stdout
    assert mmprep("serve", "--no-such-option").returncode == 2


def test_help_needs_nothing_of_what_the_extra_installs():
    code = """
import sys
from mmprep.cli import _COMMANDS, main
from mmprep.cli.extra import SERVER_MODULES

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {module for module, _ in SERVER_MODULES}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
for command in _COMMANDS:
    sys.argv = ["mmprep", command, "--help"]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 0, command
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: mmprep bench" in done.stdout


def test_ctrl_c_is_not_lost_where_it_comes_in_a_callback_of_an_import():
    code = """
import importlib, os, signal, sys

class Interrupts:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)  # what is raised here is printed and forgotten

imported = importlib.import_module
importlib.import_module = lambda name: (Interrupts(), imported(name))[1]
sys.argv = ["mmprep", "serve", "--help"]
from mmprep.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_package_runs_as_the_command_does():
    done = subprocess.run(
        [sys.executable, "-m", "mmprep", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, mmprep("--version").stdout)


def test_doctor_exits_by_what_it_finds(runtime_dir, tmp_path):
    fit = mmprep("doctor", embedded.path(), "--cache-size", "1MiB", "--runtime-dir", runtime_dir)
    assert fit.returncode == 0, fit.stdout
    unfit = mmprep("doctor", tmp_path, "--cache-size", "1MiB", "--runtime-dir", runtime_dir)
    assert unfit.returncode == 1
    assert "fail" in unfit.stdout
    assert "Traceback" not in unfit.stderr
