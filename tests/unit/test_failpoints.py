"""Failpoints: what the variable can say, what happens then, and that nothing but the variable arms one."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmprep.failpoints import POINTS, VARIABLE

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for part in ("shared", "frontend", "worker") for path in (ROOT / part).rglob("*.py")]
POINT = "lane.granted"


def run(code, armed=None, **extra):
    """Run Python code that has ``failpoints`` in a process of its own and return it."""
    env = {name: value for name, value in os.environ.items() if name != VARIABLE}
    env |= {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("shared", "frontend", "worker"))} | extra
    if armed is not None:
        env[VARIABLE] = armed
    code = f"import os, sys\nfrom mmprep import failpoints\n{code}"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def reaching(times=1, point=POINT):
    return f"for n in range({times}):\n print(n, failpoints.reach({point!r}), flush=True)"


# --- what happens -----------------------------------------------------------------------------------------------------


def test_without_the_variable_every_point_is_passed():
    done = run("assert not failpoints.check()\nfor p in failpoints.POINTS: assert failpoints.reach(p) is None")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("action", "status"),
    [("kill", -signal.SIGKILL), ("segv", -signal.SIGSEGV), ("exit", 1)],
    ids=str,
)
def test_a_process_ends_at_an_armed_point_as_it_was_told(action, status):
    done = run(reaching(), f"{POINT}={action}")
    assert (done.returncode, done.stdout) == (status, "")
    assert run(reaching(point="lane.fill.middle"), f"{POINT}={action}").returncode == 0, "and at no other"


def test_a_point_raises_what_no_code_expects():
    done = run(reaching(), f"{POINT}=raise")
    assert done.returncode == 1
    assert "FailpointError: at lane.granted" in done.stderr


def test_a_point_gives_the_kind_of_garbage_to_its_code():
    assert run(reaching(2), f"{POINT}=garbage:frames@2").stdout.split() == ["0", "None", "1", "frames"]


def test_the_nth_time_is_the_one_that_counts():
    done = run(reaching(9), f"{POINT}=kill@3")
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["0", "None", "1", "None"]


def test_a_stopped_process_goes_on_when_it_is_told_to(tmp_path):
    touched = tmp_path / "touched"
    env = os.environ | {VARIABLE: f"{POINT}=touch:{touched},stop"}
    code = f"from mmprep import failpoints\n{reaching()}"
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert touched.exists()
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 0


def test_a_hanging_process_has_said_so(tmp_path):
    os.mkfifo(tmp_path / "said")
    code = (
        "import threading, time\n"
        f"threading.Thread(target=lambda: failpoints.reach({POINT!r}), daemon=True).start()\n"
        f"while not os.path.exists({str(tmp_path / 'reached')!r}): time.sleep(0.001)\n"
        "print(threading.active_count())"
    )
    assert run(code, f"{POINT}=touch:{tmp_path / 'reached'},hang").stdout.split() == ["2"]


def test_only_what_is_named_counts():
    code = (
        "from mmprep.wire import messages\n"
        f"for m in (messages.Cancel(1), messages.Unpin(1)): print(failpoints.reach({POINT!r}, m))"
    )
    assert run(code, f"{POINT}[Unpin]=garbage:x@1").stdout.split() == ["None", "x"]


def test_one_process_takes_what_happens_once_and_its_successor_lives(tmp_path):
    gate = tmp_path / "gate"
    armed = f"{POINT}=once:{gate},kill"
    assert run(reaching(), armed).returncode == -signal.SIGKILL
    assert gate.exists()
    assert run(reaching(5), armed).returncode == 0
    gate.unlink()
    assert run(reaching(), armed).returncode == -signal.SIGKILL


def test_what_was_passed_while_the_file_was_there_does_not_count(tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    code = f"{reaching(5)}\nos.unlink({str(gate)!r})\n{reaching(5)}"
    done = run(code, f"{POINT}=once:{gate},kill@2")
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split()[::2] == ["0", "1", "2", "3", "4", "0"]


def test_two_entries_of_one_point_are_taken_one_after_the_other(tmp_path):
    armed = ";".join(f"{POINT}=once:{tmp_path / name},garbage:{name}" for name in ("a", "b"))
    assert run(reaching(3), armed).stdout.split()[1::2] == ["a", "b", "None"]
    (tmp_path / "b").unlink()
    assert run(reaching(2), armed).stdout.split()[1::2] == ["b", "None"]


# --- what arms one ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "nowhere=kill",
        "lane.granted",
        "lane.granted=",
        "lane.granted=explode",
        "lane.granted=kill@0",
        "lane.granted=kill,once:/tmp/x",
        "lane.granted=once:/tmp/x",
        "lane.granted=touch:",
        "lane.granted=garbage",
        "lane.granted=kill;nowhere=kill",
    ],
)
def test_a_wrong_variable_is_an_error_at_the_start_and_at_every_point(text):
    assert f"StartupError: {VARIABLE}: " in run("failpoints.check()", text).stderr
    done = run(reaching(point="writer.put.received"), text)
    assert f"StartupError: {VARIABLE}: " in done.stderr
    assert done.stdout == ""


def test_an_unknown_point_is_answered_with_those_that_there_are(runtime_dir):
    env = os.environ | {VARIABLE: "lane.grunted=kill"}
    command = [sys.executable, "-m", "mmprep.cli", "serve", "--port", "0", "--runtime-dir", str(runtime_dir)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mmprep serve: {VARIABLE}: there is no point 'lane.grunted'")
    assert all(point in line for point in POINTS)


def test_the_variable_is_read_once_so_that_nothing_arms_a_process_that_runs():
    done = run(f"os.environ[{VARIABLE!r}] = '{POINT}=kill'\n{reaching(3)}")
    assert (done.returncode, done.stdout.split()[1::2]) == (0, ["None"] * 3)


def calls():
    """Return (path, call) of every use of the module's names in the packages."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "failpoints":
                yield path, node.attr
            if isinstance(node, ast.ImportFrom) and node.module == "mmprep.failpoints":
                yield path, "import"


def test_nothing_but_the_module_itself_touches_what_is_armed():
    used = {(path.name, name) for path, name in calls()}
    assert {name for _, name in used} == {"reach", "check", "VARIABLE"}
    assert {path for path, name in used if name != "reach"} == {"serve.py"}
    tree = ast.parse((ROOT / "shared/mmprep/failpoints.py").read_text())
    readers = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "environ"]
    inside = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f) if n in readers]
    assert len(readers) == 1
    assert not inside, "the environment is read when the module is imported, and never again"


def test_the_table_of_points_and_the_code_agree():
    reached = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            function = node.func if isinstance(node, ast.Call) else None
            if isinstance(function, ast.Attribute) and function.attr == "reach":
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: the point's name is not literal"
                reached.append(node.args[0].value)
    assert set(reached) == set(POINTS)
    assert all(text.endswith(".") for text in POINTS.values())
