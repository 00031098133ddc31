"""A service that logs as JSON says of every request what it was and how it ended, and nothing of its content."""

import json

from tests.integration.service import eventually, photo, serving, text, user

SECRET = "a-word-that-is-nowhere-else"


def test_every_request_has_a_line_with_its_id_and_no_content():
    with serving("--frontends", 1, "--cache-size", "64MiB", "--log-level", "info", "--log-format", "json") as service:
        chat = {"messages": user(text(SECRET), photo("cat.png"))}
        service.post("/v1/chat/completions/render", chat, X_Request_Id="first")
        service.post("/tokenize", {"prompt": SECRET, "model": SECRET}, X_Request_Id="second")

        def lines():
            parsed = [json.loads(line) for line in service.stderr.splitlines() if line.startswith("{")]
            return {line["request_id"]: line for line in parsed if line["logger"] == "mmprep.requests"}

        found = eventually(lambda: len(lines()) == 2 and lines(), "a line for each request")
        assert (found["first"]["path"], found["first"]["outcome"]) == ("/v1/chat/completions/render", "ok")
        assert (found["second"]["path"], found["second"]["outcome"]) == ("/tokenize", "NotFoundError")
        assert found["first"]["ms"] > 0
        assert SECRET not in service.stderr
