"""A bridge costs nothing until it is used."""

import subprocess
import sys

from tests.integration.service import environment

IMPORT = """
import sys
import mmprep.bridges.dynamo, mmprep.bridges.dynamo.factory, mmprep.bridges.vllm, mmprep.bridges.vllm.plugin
from mmprep.bridges.vllm.plugin import register
register()  # as in a vLLM process that was told of no service
print(*sorted({"dynamo", "pydantic_core", "tokenizers", "torch", "transformers", "vllm"} & sys.modules.keys()))
"""


def test_no_engine_is_imported_before_its_bridge_is_used():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False, env=environment()
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
