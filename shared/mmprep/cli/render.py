"""``mmprep render FILE``: one chat request from a file to its GenerateRequest, with a service of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from mmprep.cli.attended import attended
from mmprep.cli.extra import require_server
from mmprep.cli.options import parser, resolve
from mmprep.cli.ready import unwind_on_sigterm, url_when_ready
from mmprep.errors import InvalidRequest


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    made = parser("render", "Render one chat request; the answer goes to standard output as JSON.")
    made.add_argument("file", help="JSON file with a chat completion request; -: standard input")
    made.add_argument("--model", help="model directory or hub id; none: the embedded demonstration model")
    parsed = made.parse_args(arguments)
    body = _read(parsed.file)
    require_server()
    resolve(parsed, parsed.model)
    unwind_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="mmprep-") as directory:
        passed = _passed_on(arguments, parsed.file)
        command = attended("serve", *passed)
        command += ["--runtime-dir", directory, "--port", "0", "--frontends", "1"]
        command += ["--api-key-file", "", "--admin-key-file", ""]  # nobody else can reach it, and we have no key
        if parsed.model:
            command.append(parsed.model)
        service = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert service.stderr is not None
            url = url_when_ready(service.stderr)
            answer, status = _post(url, body)
        finally:
            service.terminate()
            service.communicate()
    print(json.dumps(answer))
    return status


def _read(name: str) -> bytes:
    try:
        body = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{name} cannot be read: {error.strerror}") from None
    return body


def _passed_on(arguments: list[str], file: str) -> list[str]:
    """Return the options for ``serve``: all but the file and the model."""
    passed = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--model":
            skip = True
        elif argument != file and not argument.startswith("--model="):
            passed.append(argument)
    return passed


def _post(url: str, body: bytes) -> tuple[Any, int]:
    request = urllib.request.Request(  # noqa: S310 -- our own service on loopback
        f"{url}/v1/chat/completions/render", data=body, headers={"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request) as response:
            return json.load(response), 0
    except urllib.error.HTTPError as error:
        with error:
            return json.load(error), 1
