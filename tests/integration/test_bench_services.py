"""The services that the benchmark starts for itself."""

from mmprep import embedded
from mmprep.bench.running import service


def test_options_in_the_environment_do_not_change_what_is_measured(monkeypatch):
    monkeypatch.setenv("MMPREP_HASH", "of the user's own")
    with service(embedded.path(), frontends=1, lanes=2, cache_size="16MiB") as running:
        assert len(running.pids()["lanes"]) == 2


def test_what_a_service_says_after_it_is_ready_is_passed_on(capfd):
    with service(embedded.path(), frontends=1, lanes=2, cache_size="16MiB", environment={"PYTHONVERBOSE": "1"}):
        capfd.readouterr()
    # Python's own words at the end of each process: more than a pipe holds.
    assert len(capfd.readouterr().err) > 1 << 16
