"""Memory that was used once is there for the next request."""

import json
import subprocess
import sys

import pytest

#: Fills and frees four buffers of 8 MiB twice, and prints how many pages the second time had to be brought in.
FILL = """
import json, resource, sys, threading
from mmprep.allocator import keep_memory

if sys.argv[1] == "keep":
    keep_memory(64 << 20, arenas=1)

def fill():
    return [b"x" * (8 << 20) for _ in range(4)]

def twice():
    fill()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults = []
twice()
thread = threading.Thread(target=twice)
thread.start()
thread.join()
print(json.dumps(faults))
"""


@pytest.mark.parametrize(("how", "few"), [("keep", True), ("as it is", False)])
def test_buffers_that_were_freed_bring_in_no_page_again_where_memory_is_kept(how, few):
    done = subprocess.run([sys.executable, "-c", FILL, how], capture_output=True, text=True, check=True)
    assert [faults < 64 for faults in json.loads(done.stdout)] == [few, few]
