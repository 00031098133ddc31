"""The README's Python examples run as they stand there."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from service import ROOT, Service, environment

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
DEFAULT_URL = "http://127.0.0.1:8790"


@pytest.fixture(scope="module")
def service():
    """Give a service in the default runtime directory of those who are told this ``XDG_RUNTIME_DIR``."""
    with tempfile.TemporaryDirectory(prefix="mmprep-", dir="/tmp") as directory:
        running = Service(Path(directory) / "mmprep", "--cache-size", "64MiB")
        try:
            yield running.ready()
        finally:
            status = running.stop()
        assert (status, list(Path(directory).iterdir())) == (0, [])


def test_there_are_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_a_python_example_of_the_readme_runs(service, number):
    code = EXAMPLES[number].replace(DEFAULT_URL, service.url)
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**environment(), "XDG_RUNTIME_DIR": str(service.runtime_dir.parent)},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout
