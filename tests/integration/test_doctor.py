"""The doctor as a whole is run few times (it imports all that the server needs), its checks one by one where they can be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.service import Service, mmprep
from tests.models import write_qwen2_audio

from mmprep.cli import doctor
from mmprep.process_lock import ProcessLock
from mmprep.runtime import RuntimeDir

DOCTOR = "import sys; from mmprep.cli.doctor import run; sys.exit(run(sys.argv[1:]))"

MODEL_FILES = {
    "config.json": '{"model_type": "qwen2_vl"}',
    "tokenizer.json": "{}",
    "preprocessor_config.json": '{"image_processor_type": "Qwen2VLImageProcessor"}',
    "chat_template.jinja": "",
}


@pytest.fixture
def model(tmp_path):
    for name, content in MODEL_FILES.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def run(*arguments, prepare=""):
    command = [sys.executable, "-c", f"{prepare}\n{DOCTOR}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def by_subject(findings):
    found = {finding.what: finding for finding in findings}
    assert all(finding.advice for finding in found.values() if finding.status != "ok")
    return found


def check_in_child(call, *prefix):
    """Run one check behind the command ``prefix`` and return its findings."""
    code = f"import json; from mmprep.cli.doctor import *; print(json.dumps([f._asdict() for f in {call}]))"
    result = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return by_subject(doctor.Finding(**finding) for finding in json.loads(result.stdout))


def test_the_processor_of_a_model_that_hears_is_named(tmp_path):
    directory = write_qwen2_audio(tmp_path)
    found = by_subject(doctor.check_model(str(directory)))
    assert found["processor"].detail == "preprocessor_config.json (WhisperFeatureExtractor)"
    assert {finding.status for finding in found.values()} == {"ok"}
    section = '{"feature_extractor": {"feature_extractor_type": "Gemma3nAudioFeatureExtractor"}}'
    (directory / "processor_config.json").write_text(section)
    found = by_subject(doctor.check_model(str(directory)))
    assert found["processor"].detail == "processor_config.json (Gemma3nAudioFeatureExtractor)"


def test_a_machine_and_a_model_that_are_fit_are_told_so_and_nothing_is_made(runtime_dir, model):
    result = run(model, "--cache-size", "1MiB", "--runtime-dir", runtime_dir / "mm", "--json")
    assert result.stderr == ""
    report = json.loads(result.stdout)
    status = {finding["what"]: finding["status"] for finding in report["findings"]}
    assert {
        status[what]
        for what in (
            "python",
            "runtime directory",
            "shared memory",
            "server extra",
            "codecs",
            "video codecs",
            "kernel",
            "model",
        )
    } == {"ok"}
    assert (result.returncode, report["ok"]) == (0, True)
    assert list(runtime_dir.iterdir()) == []


def test_the_report_for_people_has_a_line_for_each_finding_and_fails_as_a_whole(runtime_dir):
    hidden = "import sys; sys.modules['aiohttp'] = sys.modules['numba'] = None"
    result = run("--runtime-dir", runtime_dir, "--cache-size", "1000TiB", prepare=hidden)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert all(line.split()[0] in {"ok", "warn", "fail"} for line in lines)
    for start, advice in {
        "fail  shared memory": " — give serve a --cache-size",
        "fail  server extra       aiohttp: is not installed": "pip install 'mmprep[server]'",
        "warn  kernel             Pillow's resampling (numba: is not installed)": "pip install 'mmprep[server]'",
    }.items():
        assert [line for line in lines if line.startswith(start) and advice in line], start


def test_a_wrong_size_is_an_error_that_names_the_option():
    result = run("--cache-size", "lots")
    assert result.returncode == 2
    assert "--cache-size: 'lots' is not a size" in result.stderr


SMALL_SHM = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=8m none /dev/shm && exec "$@"', "sh")


@pytest.mark.skipif(
    subprocess.run([*SMALL_SHM, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs the right to mount a file system of its own",
)
def test_shared_memory_that_is_too_small_is_a_failure_that_says_how_much_fits():
    found = check_in_child("[check_shared_memory(16 * 2**20, False)]", *SMALL_SHM)["shared memory"]
    assert found.status == "fail"
    assert found.detail == "/dev/shm has 8 MiB free of 8 MiB, the ring needs 16 MiB"
    assert "at most 7MiB" in found.advice
    tight = check_in_child("[check_shared_memory(8 * 2**20, False)]", *SMALL_SHM)["shared memory"]
    assert (tight.status, "spills" in tight.detail) == ("warn", True)
    assert check_in_child("[check_shared_memory(5 * 2**20, False)]", *SMALL_SHM)["shared memory"].status == "ok"


@pytest.mark.skipif(
    subprocess.run([*SMALL_SHM, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs the right to mount a file system of its own",
)
def test_the_doctor_and_the_service_agree_on_what_fits(runtime_dir):
    for size, fits in (("7MiB", True), ("8MiB", False)):
        arguments = ("--cache-size", size, "--runtime-dir", runtime_dir)
        report = json.loads(mmprep("doctor", "--json", *arguments, prefix=SMALL_SHM).stdout)
        found = {finding["what"]: finding["status"] for finding in report["findings"]}
        assert found["shared memory"] == ("warn" if fits else "fail")
        served = Service(runtime_dir, *arguments, prefix=SMALL_SHM)
        if fits:
            served.ready()
            assert served.stop() == 0
        else:
            assert served.wait() == 1
            assert "/dev/shm" in served.stderr


def test_the_ring_of_a_running_service_has_its_memory_already():
    assert doctor.check_shared_memory(2**60, runs_here=True).status == "ok"
    assert doctor.check_memory(2**60, runs_here=True).status == "ok"
    assert doctor.check_memory(2**60, runs_here=False).status == "fail"


@pytest.mark.parametrize(
    ("limit", "what", "status", "advice"),
    [("-Sn 300", "open files", "warn", "ulimit -n"), ("-Sf 1024", "file size", "fail", "ulimit -f unlimited")],
)
def test_a_limit_that_is_too_low_is_found(limit, what, status, advice):
    found = check_in_child("check_limits(2**30)", "bash", "-c", f'ulimit {limit} && exec "$@"', "bash")
    assert found[what].status == status
    assert advice in found[what].advice


def test_a_runtime_directory_that_others_can_write_is_a_failure(runtime_dir):
    runtime_dir.chmod(0o777)
    found = by_subject(doctor.check_runtime_dir(RuntimeDir(runtime_dir)))
    assert found["runtime directory"].status == "fail"
    assert "chmod 700" in found["runtime directory"].advice


def test_a_path_too_long_for_sockets_is_a_failure(runtime_dir):
    found = by_subject(doctor.check_runtime_dir(RuntimeDir(runtime_dir / ("x" * 100))))
    assert found["runtime directory"].status == "fail"
    assert "too long for the sockets" in found["runtime directory"].detail


def test_a_running_service_is_named_and_keeps_its_lock(runtime_dir):
    runtime = RuntimeDir.prepare(runtime_dir)
    runtime.take()
    for found in (
        by_subject(doctor.check_runtime_dir(RuntimeDir(runtime_dir))),
        check_in_child(f"check_runtime_dir(RuntimeDir({str(runtime_dir)!r}))"),
    ):
        assert found["service"].detail == f"runs in this directory, pid {os.getpid()}"
    assert not ProcessLock(runtime_dir / "service.lock").acquire()
    runtime.clean()


def test_segments_of_other_runtime_directories_are_reported(runtime_dir):
    stray = Path(f"/dev/shm/mmprep-{os.geteuid()}-{os.getpid():08x}-00000000")
    stray.write_bytes(bytes(8192))
    try:
        found = by_subject(doctor.check_stray_segments(RuntimeDir(runtime_dir)))
    finally:
        stray.unlink()
    assert found["other segments"].status == "warn"


def test_a_complete_model_directory_is_described(model):
    found = by_subject(doctor.check_model(str(model)))
    assert found["model"].detail == "model_type qwen2_vl"
    assert found["processor"].detail == "preprocessor_config.json (Qwen2VLImageProcessor)"
    assert {finding.status for finding in found.values()} == {"ok"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", None, ("model", "fail")),
        ("config.json", "{", ("model", "fail")),
        ("config.json", "[]", ("model", "fail")),
        ("config.json", "{}", ("model", "fail")),
        ("tokenizer.json", None, ("tokenizer", "fail")),
        ("tokenizer.json", "\0", ("tokenizer", "fail")),
        ("preprocessor_config.json", None, ("processor", "fail")),
        ("preprocessor_config.json", "[", ("processor", "fail")),
        ("chat_template.jinja", None, ("chat template", "warn")),
    ],
)
def test_a_file_that_a_model_needs_and_that_is_missing_or_broken_is_found(model, name, content, expected):
    (model / name).unlink()
    if content is not None:
        (model / name).write_text(content)
    found = by_subject(doctor.check_model(str(model)))
    assert [(what, finding.status) for what, finding in found.items() if finding.status != "ok"] == [expected]


def test_other_layouts_of_the_same_files_are_known(model):
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
        (model / name).unlink()
    (model / "vocab.json").write_text("{}")
    (model / "processor_config.json").write_text(
        '{"image_processor": {"image_processor_type": "Gemma3ImageProcessor"}}'
    )
    (model / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    found = by_subject(doctor.check_model(str(model)))
    assert found["tokenizer"].status == "warn"
    assert found["processor"].detail == "processor_config.json (Gemma3ImageProcessor)"
    assert found["chat template"].detail == "in tokenizer_config.json"


def test_a_path_that_is_no_directory_is_a_failure_and_a_hub_id_is_not(model):
    for wrong in (model / "nothing", model / "config.json"):
        assert by_subject(doctor.check_model(str(wrong)))["model"].status == "fail"
    assert by_subject(doctor.check_model("someone/some-model"))["model"].status == "warn"
