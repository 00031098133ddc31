"""Claims on what is downloaded: one process at a time has one, and none is left behind."""

import os
import signal
import subprocess
import sys
from concurrent.futures import thread

import pytest
from tests.integration.service import eventually

from mmprep_frontend.media.claims import Claims

KEY, OTHER = bytes(range(32)), bytes(reversed(range(32)))

HOLDER = """
import sys
from pathlib import Path
from mmprep_frontend.media.claims import Claims
claims = Claims(Path(sys.argv[1]))
claim = claims.claim(bytes(range(32)))
print(claim is not None, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def claims(tmp_path):
    made = Claims(tmp_path)
    yield made
    made.close()


def test_a_process_shares_its_claim_until_nothing_refers_to_it(claims, tmp_path):
    other = Claims(tmp_path)
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
    eventually(lambda: other.claim(KEY) is not None, "the end of the claim")
    other.close()


def test_a_claim_that_was_made_again_before_its_end_was_worked_off_stays(tmp_path):
    claims, other = Claims(tmp_path), Claims(tmp_path)
    claims.claim(KEY)  # ends at once
    again = claims.claim(KEY)
    claims.claim(OTHER)  # so does this one, and is worked off after the first
    eventually(lambda: other.claim(OTHER) is not None, "the end of the last claim")
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


def test_a_claim_may_end_while_a_thread_pool_takes_work(claims):
    """As within the collection of garbage, which may come at any place: there its end waits for no lock."""
    with thread._global_shutdown_lock:
        claim = claims.claim(KEY)
        del claim
    assert claims.held(KEY) is None
