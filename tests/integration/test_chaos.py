"""One short chaos run with a fixed seed: every process is killed and stopped, and nothing is wrong, lost or left."""

import json
import socket
import subprocess
import sys

import pytest
from tests.integration.service import environment

from mmprep.chaos.service import left_behind
from mmprep.runtime import RuntimeDir
from mmprep.segment import Segment, segment_name


@pytest.mark.alone
def test_a_minute_of_faults_breaks_no_byte_no_call_and_leaves_nothing(tmp_path):
    output = tmp_path / "chaos.json"
    command = [sys.executable, "-m", "mmprep.chaos", "--minutes", "0.8", "--seed", "1", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    report = json.loads(output.read_text())
    assert report["passed"] is True
    assert report["wrong_bytes"] == report["leaks"] == report["unanswered"] == report["unexpected_errors"] == 0
    # It did what it says: each role was killed and stopped, under every kind of call, and held items were read.
    for role in ("writer", "lane", "frontend", "backend", "client"):
        assert report["faults_by_kind"][f"kill {role}"] > 0
        assert report["faults_by_kind"][f"stop {role}"] > 0
    assert report["faults_by_kind"]["garbage"] > 0
    for door in ("http", "native"):
        for payload in ("shm", "tensors", "none"):
            assert report["calls_by_kind"][f"{door} {payload}"]["ok"] > 0
    assert min(report["reads_by_way"].values()) > 0
    assert report["after_writer_kill"]["any_answer"]["kills"] > 0
    assert "passed" in done.stdout


def test_a_process_a_segment_and_a_socket_that_are_left_are_found(runtime_dir):
    runtime_id, mark = RuntimeDir(runtime_dir).runtime_id, "LEFT_BY_A_TEST=1"
    assert list(left_behind(runtime_dir, runtime_id, mark)) == []
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environment({"LEFT_BY_A_TEST": "1"})
    )
    with (
        sleeper,
        Segment.create(segment_name(runtime_id, b"left"), 4096) as segment,
        socket.socket(socket.AF_UNIX) as left,
    ):
        left.bind(str(runtime_dir / "writer.sock"))
        found = list(left_behind(runtime_dir, runtime_id, mark))
        segment.unlink()
        sleeper.communicate(b"\n")
    (runtime_dir / "writer.sock").unlink()
    assert [what.split()[0] for what in found] == ["process", "segment", "socket"]
    assert f"process {sleeper.pid} " in found[0]
    assert list(left_behind(runtime_dir, runtime_id, mark)) == []


def test_a_wrong_option_is_refused(tmp_path):
    command = [sys.executable, "-m", "mmprep.chaos", "--every", "0", "--output", tmp_path / "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 2
    assert "--every" in done.stderr
