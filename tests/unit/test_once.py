"""Requests that their clients send again, one rule a test."""

import pytest

from mmprep.errors import Conflict
from mmprep_worker.scheduling.once import Requests

KEY, BODY, OTHER = b"k" * 32, b"b" * 32, b"o" * 32


def test_the_same_request_is_the_same_job_and_another_body_is_an_error():
    requests = Requests()
    assert requests.find(KEY, BODY, 0.0) is None
    requests.note(KEY, BODY, "job-1", 0.0)
    assert requests.find(KEY, BODY, 1.0) == "job-1"
    assert requests.find(OTHER, BODY, 1.0) is None
    with pytest.raises(Conflict) as caught:
        requests.find(KEY, OTHER, 1.0)
    assert (caught.value.code, caught.value.retryable) == (409, False)


def test_a_key_is_forgotten_after_its_time_and_the_oldest_when_there_are_too_many():
    requests = Requests(most=2, seconds=10.0)
    for number in range(3):
        requests.note(bytes([number]) * 32, BODY, f"job-{number}", float(number))
        requests.validate()
    assert len(requests) == 2
    assert requests.find(bytes(32), BODY, 2.0) is None
    assert requests.find(bytes([1]) * 32, BODY, 2.0) == "job-1"
    assert requests.find(bytes([1]) * 32, OTHER, 11.0) is None
    assert requests.find(bytes([2]) * 32, BODY, 11.0) == "job-2"


def test_the_requests_of_jobs_that_are_gone_are_new_again():
    requests = Requests()
    requests.note(KEY, BODY, "job-1", 0.0)
    requests.note(OTHER, BODY, "job-2", 0.0)
    requests.forget({"job-1"})
    assert requests.find(KEY, BODY, 1.0) is None
    assert requests.find(OTHER, BODY, 1.0) == "job-2"
    requests.validate()
