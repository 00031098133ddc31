"""The line that says that a service is ready."""

from mmprep.cli.ready import ready_line, url_in


def test_what_is_written_is_read():
    assert url_in(ready_line(1.25, "http://[::1]:8790", "/run/user/0/mmprep") + "\n") == "http://[::1]:8790"
    for line in ("", "mmprep 0.1.0: starting", "2026 ERROR x: after 1 s: http://a and ipc://b"):
        assert url_in(line) is None
