"""The line that says that a service is ready."""

import pytest

from mmprep.cli.ready import ready_line, url_in, url_when_ready
from mmprep.errors import ServiceUnavailable


def test_what_is_written_is_read():
    assert url_in(ready_line(1.25, "http://[::1]:8790", "/run/user/0/mmprep") + "\n") == "http://[::1]:8790"
    for line in ("", "mmprep 0.1.0: starting", "2026 ERROR x: after 1 s: http://a and ipc://b"):
        assert url_in(line) is None


def test_what_a_service_says_before_it_is_ready_is_passed_on_and_its_end_is_an_error(capsys):
    line = ready_line(1.5, "http://127.0.0.1:1", "/run/x") + "\n"
    lines = iter(["a warning\n", line, "later\n"])
    assert url_when_ready(lines) == "http://127.0.0.1:1"
    assert next(lines) == "later\n"
    with pytest.raises(ServiceUnavailable, match="did not start"):
        url_when_ready(["what is wrong\n"])
    assert capsys.readouterr().err == "a warning\nwhat is wrong\n"
