"""Claims on what is downloaded: one process at a time has one, and none is left behind."""

import os
import signal
import subprocess
import sys

import pytest

from mmprep_frontend.media.claims import Claims

KEY, OTHER = bytes(range(32)), bytes(reversed(range(32)))

HOLDER = """
import sys
from pathlib import Path
from mmprep_frontend.media.claims import Claims
claims = Claims(Path(sys.argv[1]), lambda work: work())
claim = claims.claim(bytes(range(32)))
print(claim is not None, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def claims(tmp_path):
    made = Claims(tmp_path, lambda work: work())
    yield made
    made.close()


def test_a_process_shares_its_claim_until_nothing_refers_to_it(claims, tmp_path):
    other = Claims(tmp_path, lambda work: work())
    first = claims.claim(KEY)
    second = claims.claim(KEY)
    assert first is second is claims.held(KEY)
    assert other.claim(KEY) is None
    assert other.held(KEY) is None
    assert other.claim(OTHER) is not None
    del first
    assert other.claim(KEY) is None
    del second
    assert claims.held(KEY) is None
    assert other.claim(KEY) is not None
    other.close()


def test_a_claim_that_was_made_again_before_its_end_was_worked_off_stays(tmp_path):
    later = []
    claims, other = Claims(tmp_path, later.append), Claims(tmp_path, later.append)
    claims.claim(KEY)  # ends at once
    again = claims.claim(KEY)
    for work in later:
        work()
    assert other.claim(KEY) is None
    assert again is claims.held(KEY)
    claims.close()
    other.close()


def test_a_claim_falls_with_its_process(claims, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "True\n"
        assert claims.claim(KEY) is None
        os.kill(holder.pid, signal.SIGKILL)
    assert claims.claim(KEY) is not None


def test_a_link_in_place_of_the_file_is_not_followed(claims, tmp_path):
    (tmp_path / "claims").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="claims"):
        claims.claim(KEY)
    assert not (tmp_path / "elsewhere").exists()
