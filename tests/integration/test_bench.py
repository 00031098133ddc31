"""The benchmark's quick mode, run for real: what it measures and says, never how fast it was."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    kernel, output = directory / "kernel.json", directory / "bench.json"
    python = [sys.executable, "-m"]
    subprocess.run([*python, "mmprep_worker.bench", "--quick", "--output", kernel], check=True)
    command = [*python, "mmprep.bench", "--quick", "--kernel", kernel, "--output", output]
    tables = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.read_text()), tables


def test_the_quick_mode_measures_every_part_and_names_the_machine(run):
    result, _ = run
    assert result["quick"] is True
    parts = {"kernel", "throughput", "handover", "answers", "memory", "startup", "fetch", "requests", "queues"}
    parts.add("remote")
    assert set(result["parts"]) == parts
    machine = result["machine"]
    assert machine["cores"] >= 1
    assert len(machine["load_average"]) == len(machine["load_average_after"]) == 3
    assert machine["versions"]["numpy"]


def test_the_kernel_is_compared_from_bytes_and_pixels_in_both_dtypes_and_equals_the_reference(run):
    kernel = run[0]["parts"]["kernel"]
    assert kernel["equal_to_the_bit"] is True
    assert {(row["dtype"], row["source"]) for row in kernel["runs"]} == {
        (dtype, source) for dtype in ("float32", "uint8") for source in ("bytes", "pixels")
    }
    assert all(row[name] > 0 for row in kernel["runs"] for name in ("ours_ms", "theirs_ms", "ratio", "cpu_ratio"))


def test_cold_requests_never_hit_and_cached_ones_always_do(run):
    part = run[0]["parts"]["throughput"]
    assert {(row["mode"], row["in_flight"]) for row in part["runs"]} == {
        (mode, in_flight) for mode in ("cold", "cached", "by uuid") for in_flight in (1, 8)
    }
    for row in part["runs"]:
        assert row["requests"] > 0
        assert row["hits"] == (0 if row["mode"] == "cold" else row["requests"])
        assert row["latency_ms"]["p50"] <= row["latency_ms"]["p95"] <= row["latency_ms"]["p99"]
        assert {"frontends", "writer", "lanes", "client"} <= set(row["cpu_ms_per_request"])
        assert row["health_ms"]["questions"] > 0
    (size,) = part["cached_by_size"]
    assert min(size["bytes"], size["latency_ms"]) > 0
    assert size["moved_and_hashed_ms"] >= 0, "a difference of medians, and as little as none where others disturb"


def test_tensors_are_handed_over_by_address_and_inline(run):
    (row,) = run[0]["parts"]["handover"]
    assert 900_000 < row["bytes"] < 1_200_000
    for way in ("view", "copy", "inline"):
        assert 0 < row[way]["ready_ms"] <= row[way]["read_ms"]
    assert min(row["client"].values()) > 0


def test_answers_are_measured_in_both_encodings_by_turns(run):
    json_row, packed = run[0]["parts"]["answers"]
    assert (json_row["encoding"], packed["encoding"]) == ("json", "msgpack")
    # base64 is four bytes for three, and nearly all of it is tensors.
    assert 0.7 < packed["bytes"] / json_row["bytes"] < 0.8
    for row in (json_row, packed):
        assert row["requests"] == 6
        assert row["cpu_ms"] >= 0
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p99"]
    assert json_row["latency_to_json"] == 1


def test_memory_is_told_for_every_process_with_and_without_the_ring(run):
    (service,) = run[0]["parts"]["memory"]
    roles = [process["role"] for process in service["processes"]]
    assert sorted(roles) == ["frontends", "lanes", "lanes", "supervisor", "writer"]
    assert all(process["private"] > 0 and process["rss"] > 0 for process in service["processes"])
    (writer,) = (process for process in service["processes"] if process["role"] == "writer")
    assert writer["shared"] >= service["ring_bytes"]


def test_start_up_is_measured_with_an_empty_and_a_filled_cache_of_compiled_code(run):
    startup = run[0]["parts"]["startup"]
    assert set(startup) == {"empty", "filled"}
    for start in (start for starts in startup.values() for start in starts):
        assert min(start["seconds"], start["cpu_seconds"], start["first_ms"], start["later_ms"]) > 0
        assert start["first_by_later"] == pytest.approx(start["first_ms"] / start["later_ms"], rel=0.01, abs=0.01)


def test_fetching_is_measured_with_what_the_media_host_was_asked(run):
    part = run[0]["parts"]["fetch"]
    (distinct,) = part["distinct"]
    assert distinct["downloads"] == distinct["urls"] > 0
    assert min(distinct["per_second"], distinct["frontend_cpu_ms"], distinct["rss_peak"]) > 0
    # Fetching is a part of the request around it.
    assert 0 < distinct["in_loop_cpu_ms"] < distinct["frontend_cpu_ms"]
    assert distinct["in_loop_per_second"] > 0
    assert [row["frontends"] for row in part["same"]] == [1, 2]
    assert all(0 < row["downloads"] <= row["requests"] for row in part["same"])
    hits = part["hits"]
    assert 0 < hits["in_loop_ms"]["p50"] <= hits["in_loop_ms"]["p99"]
    assert all(row["health_ms"]["questions"] > 0 for row in (distinct, *part["same"], hits))


def test_requests_over_http_are_measured_by_what_they_cost_each_role(run):
    part = run[0]["parts"]["requests"]
    assert [row["run"].split()[0] for row in part] == ["cached", "text", "turns"]
    for row in part:
        assert min(row["requests"], row["answer_bytes"], row["latency_ms"]["p50"]) > 0
        assert set(row["cpu_ms_by_role"]) == {"frontends", "writer", "lanes", "supervisor"}
        assert row["cpu_ms"] == pytest.approx(sum(row["cpu_ms_by_role"].values()), abs=0.01)


def test_jobs_through_a_queue_are_counted_against_the_writer(run):
    part = run[0]["parts"]["queues"]
    assert part["jobs"] > part["handed_over"] > 0
    assert part["waited"]["jobs"] == part["jobs"]
    for stream in (part, part["waited"]):
        assert min(stream["jobs_per_second"], stream["jobs_per_writer_second"]) > 0
    assert 0 < part["next_job_ms"]["p50"] <= part["next_job_ms"]["p99"]


def test_targets_are_judged_and_the_tables_show_them(run):
    result, tables = run
    assert result["targets"]
    for target in result["targets"]:
        sign, limit = target["limit"].split()
        assert target["met"] == (
            target["reached"] <= float(limit) if sign == "<=" else target["reached"] >= float(limit)
        )
        assert target["target"] in tables


def test_an_unknown_part_is_refused(tmp_path):
    command = [sys.executable, "-m", "mmprep.bench", "--output", tmp_path / "x", "--parts", "speed"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--parts: known are" in result.stderr


def test_tensors_over_tcp_are_measured_against_raw_zeromq_with_and_without_keys(run):
    part = run[0]["parts"]["remote"]
    assert [(row["tensor"], row["curve"]) for row in part] == [("1 MB", True), ("1 MB", False)]
    for row in part:
        assert min(row["raw_ms"], row["pull_ms"]) > 0
        assert row["pull_to_raw"] == pytest.approx(row["raw_ms"] / row["pull_ms"], rel=0.01, abs=0.001)
