"""Load tests of a real service, over HTTP and by the native client: what they count, show and compare."""

import json
import signal
import subprocess
import sys

import pytest
from tests.integration.service import environment, mmprep, serving

QUICK = ("--seconds", 1, "--warm-up", 0.2, "--words", 5, "--seed", 3)


@pytest.fixture(scope="module")
def service():
    with serving("--cache-size", "64MiB") as running:
        yield running


def answered(service):
    return sum(value for name, value in service.metrics().items() if name.startswith("mmprep_requests_total{"))


def result(tmp_path, *arguments):
    path = tmp_path / "result.json"
    done = mmprep("bench", *arguments, "--output", path)
    assert done.returncode == 0, done.stderr
    assert "throughput" in done.stdout
    return json.loads(path.read_text())


def test_an_open_loop_over_http_sends_what_is_due_and_tells_what_it_cost(service, tmp_path):
    before = answered(service)
    told = result(
        tmp_path,
        service.url,
        "--runtime-dir",
        service.runtime_dir,
        *QUICK,
        "--rate",
        20,
        "--population",
        3,
        "--payload",
        "none",
    )
    assert told["outcomes"] == {"ok": told["requests"]}
    assert told["latency"]["count"] == told["requests"]
    assert told["requests"] == sum(second["due"] for second in told["seconds"])
    assert 0 <= told["hit_rate"] <= 1
    assert told["cpu_seconds"] > 0
    assert told["load_cpu_seconds"] > 0
    sent = answered(service) - before
    assert sent >= told["requests"]


@pytest.mark.parametrize("workload", ["distinct", "multi-turn", "text"])
def test_users_of_the_native_client_ask_for_every_workload(service, tmp_path, workload):
    named = ("--runtime-dir", service.runtime_dir) if workload == "text" else (service.endpoint,)
    told = result(tmp_path, *named, *QUICK, "--users", 3, "--workload", workload)
    assert told["settings"]["workload"] == workload
    assert told["outcomes"] == {"ok": told["requests"]}
    assert told["cpu_ms_per_request"] > 0
    if workload == "distinct":
        assert told["hit_rate"] == 0
    if workload == "text":
        assert told["hit_rate"] is None
    service.quiet()


@pytest.mark.parametrize("payload", ["shm", "none"])
def test_jobs_go_through_a_queue_of_the_tests_own_and_leave_nothing(service, tmp_path, payload):
    told = result(tmp_path, service.endpoint, *QUICK, "--rate", 20, "--queued", "--payload", payload)
    assert told["settings"]["target"] == "a queue"
    assert told["outcomes"] == {"ok": told["requests"]}
    assert told["latency"]["count"] == told["requests"] > 0
    assert told["cpu_ms_per_request"] > 0
    queues = {name: queue for name, queue in service.status()["queues"].items() if name.startswith("bench-")}
    assert all(queue["depth"] == 0 and not queue["backends"] for queue in queues.values())
    assert sum(queue["jobs"]["acked"] for queue in queues.values()) >= told["requests"]
    service.quiet()


def test_a_trace_is_replayed_and_two_results_are_compared(service, tmp_path):
    trace = tmp_path / "trace.jsonl"
    entries = [{"timestamp": n / 10, "prompt_length": 4, "media": [{"id": n % 2, "size": 1000}]} for n in range(6)]
    trace.write_text("\n".join(map(json.dumps, entries)))
    told = result(tmp_path, service.url, "--workload", "trace", "--trace", trace, "--speed", 2, "--name", "trace")
    assert told["requests"] == 6
    page = tmp_path / "page.html"
    files = (tmp_path / "result.json",) * 2
    done = mmprep("bench", "--compare", *files, "--html", page)
    assert done.returncode == 0, done.stderr
    assert "answers a second" in done.stdout
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_what_a_server_refuses_is_counted_by_its_kind(service, tmp_path):
    done = mmprep(
        "bench", service.url, *QUICK, "--users", 1, "--field", 'model="none"', "--output", tmp_path / "x.json"
    )
    assert done.returncode == 1, "nothing was answered"
    assert set(json.loads((tmp_path / "x.json").read_text())["outcomes"]) == {"404 NotFoundError"}
    assert "404 NotFoundError" in done.stdout


def test_a_run_that_is_interrupted_tells_what_it_has_seen(service):
    command = [sys.executable, "-m", "mmprep.cli", "bench", service.endpoint, "--users", "2", "--seconds", "1000"]
    with subprocess.Popen(
        [*command, "--warm-up", "0", "--words", "5"],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as running:
        assert "second" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate()
    assert running.returncode == 0
    assert "throughput" in said
    service.quiet()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rate", 1, "--users", 1), "--rate is an open loop"),
        (("--to-rate", 5), "--arrivals ramp and --to-rate"),
        (("--size", "1x1"), "--size must be one of 640x480"),
        (("--workload", "trace"), "--trace FILE"),
        (("--field", "model=name"), "NAME=JSON"),
        (("http://127.0.0.1:1/x",), "--path names the path"),
        (("--rate", 0), "must be above 0"),
        (("--compare", "/none", "/none"), "cannot be read"),
        (("ipc:///tmp/no-such-service",), "no service"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_sent(arguments, words):
    done = mmprep("bench", *arguments)
    assert done.returncode in {1, 2}
    assert words in done.stderr
    assert "Traceback" not in done.stderr
