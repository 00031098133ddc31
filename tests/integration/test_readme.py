"""The README's examples run as they stand there."""

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from service import ROOT, Service, environment

from mmprep.remote.curve import make_pair

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
ANSWERS = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
DEFAULT_URL = "http://127.0.0.1:8790"


@pytest.fixture(scope="module")
def service():
    """Give a service in the default runtime directory of those who are told this ``XDG_RUNTIME_DIR``."""
    with tempfile.TemporaryDirectory(prefix="mmprep-", dir="/tmp") as directory:
        keys = Path(directory) / "keys"
        make_pair(keys, "service")
        make_pair(keys, "engine-2")
        remote = ("--remote-endpoint", "tcp://127.0.0.1:0", "--curve-key-file", keys / "service.key")
        remote += ("--curve-clients-dir", keys)
        running = Service(Path(directory) / "mmprep", "--cache-size", "64MiB", "--enable-injection", *remote)
        try:
            yield running.ready()
        finally:
            status = running.stop()
        shutil.rmtree(keys)
        assert (status, list(Path(directory).iterdir())) == (0, [])


def test_there_are_examples():
    assert len(EXAMPLES) == 11
    assert len(COMMANDS) == 1


def run_command(service, directory):
    """Run the first request as it is printed, in a directory that looks like the checkout, and return the answer."""
    (directory / "shared").symlink_to(ROOT / "shared")
    code = COMMANDS[0].replace(DEFAULT_URL, service.url)
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True, check=False, cwd=directory
    )
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="this machine has no curl")
def test_the_first_request_of_the_readme_gets_the_answer_that_stands_below_it(service, tmp_path):
    answer = run_command(service, tmp_path)
    shown = json.loads(ANSWERS[0])
    (digest,) = shown["features"]["mm_hashes"].pop("image")
    assert re.fullmatch("[0-9a-f]{64}", digest)  # another one for other versions of what decides over pixels
    (found,) = answer["features"]["mm_hashes"].pop("image")
    assert re.fullmatch("[0-9a-f]{64}", found)
    assert answer["features"] == shown["features"]
    assert answer["sampling_params"] == shown["sampling_params"]
    assert answer["model"] == shown["model"]
    assert answer["token_ids"][:2] == shown["token_ids"][:2]
    (place,) = answer["features"]["mm_placeholders"]["image"]
    start, end = place["offset"], place["offset"] + place["length"]
    assert set(answer["token_ids"][start:end]) == {6156}
    assert (answer["token_ids"][start - 1], answer["token_ids"][end]) == (6153, 6154)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_a_python_example_of_the_readme_runs(service, number, tmp_path):
    code = EXAMPLES[number].replace(DEFAULT_URL, service.url)
    code = code.replace("http://10.0.0.5:8790", service.url).replace(
        "/etc/mmprep", f"{service.runtime_dir.parent}/keys"
    )
    code = code.replace("tcp://10.0.0.5:7790", service.status()["remote"]["endpoint"])
    of_dynamo = "from dynamo" in code
    if of_dynamo and importlib.util.find_spec("dynamo") is None:
        pytest.skip("Dynamo's runtime is not installed: pip install mmprep[dynamo]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        code = code.replace("PORT = 8000", f"PORT = {probe.getsockname()[1]}")
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**environment({"HOME": str(tmp_path)}), "XDG_RUNTIME_DIR": str(service.runtime_dir.parent)},
    )
    assert result.returncode == 0, result.stderr
    assert of_dynamo or not result.stderr  # Dynamo writes its log there
    assert result.stdout
