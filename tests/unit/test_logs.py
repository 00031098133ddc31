"""Lines of a log: whole, on one line, with the request's id, and JSON where that is asked for."""

import json
import logging

import pytest

from mmprep import logs


@pytest.fixture
def line(capsys):
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def written(form, log, level="info"):
        logs.LogSettings(level, form).apply()
        log(logging.getLogger("mmprep.test"))
        return capsys.readouterr().err

    yield written
    root.handlers[:], level = before
    root.setLevel(level)


def failing(logger):
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("it failed")


def test_a_json_line_is_one_object_with_the_events_fields(line):
    written = line("json", lambda logger: logs.event(logger, logging.INFO, "request", path="/x", ms=1.5, none=None))
    assert written.count("\n") == 1
    found = json.loads(written)
    assert found["time"].endswith("+00:00")
    assert {name: found[name] for name in ("level", "logger", "message", "path", "ms")} == {
        "level": "info",
        "logger": "mmprep.test",
        "message": "request",
        "path": "/x",
        "ms": 1.5,
    }
    assert "none" not in found


def test_an_exception_is_in_the_same_object(line):
    written = line("json", failing)
    assert written.count("\n") == 1
    assert "ValueError: why" in json.loads(written)["exception"]


def test_a_text_line_has_the_fields_behind_its_message(line):
    written = line("text", lambda logger: logs.event(logger, logging.INFO, "request", path="/x"))
    assert written.endswith("INFO mmprep.test: request path=/x\n")


@pytest.mark.parametrize("form", ["json", "text"])
def test_lines_of_a_request_carry_its_id_and_others_none(line, form):
    token = logs.request_id.set("abc")
    try:
        assert "abc" in line(form, lambda logger: logger.info("hello"))
    finally:
        logs.request_id.reset(token)
    assert "request_id" not in line(form, lambda logger: logger.info("hello"))


def test_what_is_below_the_level_is_not_written(line):
    assert line("text", lambda logger: logger.info("hello"), "warning") == ""
