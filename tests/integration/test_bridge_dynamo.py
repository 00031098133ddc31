"""The bridge to Dynamo with its real runtime: an HTTP chat at its frontend reaches a worker process, on loopback alone."""

import contextlib
import errno
import hashlib
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tests.integration.service import (
    PATIENCE,
    ROOT,
    Answer,
    decode_item,
    environment,
    eventually,
    photo,
    serving,
    text,
    user,
)

from mmprep import embedded

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("dynamo") is None, reason="Dynamo's runtime is not installed: pip install mmprep[dynamo]"
)
NODE = ROOT / "tests" / "integration" / "dynamo_node.py"
#: The text in between looks like a placeholder and is none.
PICTURES = (photo("cat.png"), text("and <|image_pad|>"), photo("rocket.jpg"))


class Dynamo:
    """A frontend and a worker of Dynamo: in one process, or in one each that find each other through files."""

    def __init__(self, service, discovery, directory):
        self.service = service
        self.gate = Path(directory) / "gate"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = Path(directory) / "log"
        env = {
            **environment(),
            "HOME": directory,
            "DYN_FILE_KV": f"{directory}/kv",
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_LOG": "warn",
            "DYN_SELF_HOST_METADATA": "0",
        }
        roles = ("frontend+worker",) if discovery == "mem" else ("worker", "frontend")
        self.processes = []
        with self.log.open("wb") as log:
            for role in roles:
                command = [sys.executable, NODE, discovery, role, service.endpoint, embedded.path(), self.port]
                self.processes.append(
                    subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
                )

    def ready(self):
        eventually(self._serves, "a model at the frontend")
        return self

    def _serves(self):
        assert all(process.poll() is None for process in self.processes), self.log.read_text()
        with contextlib.suppress(OSError, http.client.HTTPException):
            return b"served" in self.request("GET", "/v1/models").body
        return False

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def request(self, method, path, body=None, **headers):
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def chat(self, *parts, **fields):
        return self.request("POST", "/v1/chat/completions", body(*parts, **fields))

    @contextlib.contextmanager
    def streaming(self, *parts, **fields):
        """Give the lines of a stream; leaving hangs up."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(
                "POST",
                "/v1/chat/completions",
                body(*parts, stream=True, **fields),
                {"Content-Type": "application/json"},
            )
            yield connection.getresponse()

    def told(self, *parts, **fields):
        """Return what the worker tells of a request, by way of the answer's text."""
        answer = self.chat(*parts, **fields)
        assert answer.status == 200, (answer.body, self.log.read_text())
        (choice,) = answer.json["choices"]
        assert choice["finish_reason"] == "stop"
        return json.loads(choice["message"]["content"])

    def stop(self):
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        return [process.poll() for process in self.processes]


def body(*parts, **fields):
    return json.dumps({"model": "served", "messages": user(*parts), **fields})


@pytest.fixture(scope="module")
def service():
    with serving("--cache-size", "64MiB") as running:
        yield running


@contextlib.contextmanager
def running(service, discovery):
    with tempfile.TemporaryDirectory(prefix="dynamo-", dir="/tmp") as directory:
        started = Dynamo(service, discovery, directory)
        try:
            yield started.ready()
        finally:
            statuses = started.stop()
            for process in started.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        assert set(statuses) == {0}, started.log.read_text()


@pytest.fixture(scope="module")
def dynamo(service):
    with running(service, "file") as started:
        yield started


def test_frontend_and_worker_in_one_process_need_no_discovery(service):
    with running(service, "mem") as started:
        (found,) = started.told(photo("cat.png"))["items"]["image"]
        assert found["shared"]
        (element,) = service.render(user(photo("cat.png")))["features"]["kwargs_data"]["image"]
        assert found["fields"] == digests(element)


def digests(element):
    """Return what the worker tells of an element of ``kwargs_data``."""
    return {
        name: [field.dtype, list(field.array.shape), hashlib.sha256(field.array.tobytes()).hexdigest()]
        for name, field in decode_item(element).items()
    }


def test_a_worker_reads_the_pixels_of_a_chat_where_they_lie(service, dynamo):
    reference = service.render(user(*PICTURES))
    features = reference["features"]
    told = dynamo.told(*PICTURES, temperature=0.25, max_tokens=77, stop=["\n\n"])
    assert told["token_ids"] == reference["token_ids"]
    for found, element in zip(told["items"]["image"], features["kwargs_data"]["image"], strict=True):
        assert found["shared"]
        assert found["fields"] == digests(element)
    extra = told["extra"]
    assert extra["mm_hashes"] == features["mm_hashes"]["image"]
    assert extra["mm_placeholders"] == features["mm_placeholders"]["image"]
    assert extra["mm_hashes_by_modality"] == features["mm_hashes"]
    assert extra["mm_placeholders_by_modality"] == features["mm_placeholders"]
    routed = list(reference["token_ids"])
    for digest, place in zip(features["mm_hashes"]["image"], features["mm_placeholders"]["image"], strict=True):
        pad = 1_000_000 + (int(digest[:16], 16) & 0x3FFFFFFF)
        routed[place["offset"] : place["offset"] + place["length"]] = [pad] * place["length"]
    assert told["routed"] == routed
    assert (told["sampling"]["temperature"], told["stops"]["max_tokens"]) == (0.25, 77)
    assert told["stops"]["stop"] == ["\n\n"]
    assert told["eos"] == [6146, 6144]
    service.quiet()


def test_a_chat_without_pictures_is_answered(service, dynamo):
    told = dynamo.told(text("hello"))
    assert (told["items"], told["routed"], told["extra"]) == ({}, None, {})
    assert told["token_ids"] == service.render(user(text("hello")))["token_ids"]


def test_the_same_picture_is_processed_once_for_all_who_ask(service, dynamo):
    dynamo.told(photo("coffee.webp"))
    name = 'mmprep_mm_cache_hits_total{modality="image"}'
    before = service.metrics()[name]
    dynamo.told(text("again"), photo("coffee.webp"))
    assert service.metrics()[name] == before + 1


def test_an_answer_streams_with_its_usage(dynamo):
    with dynamo.streaming(photo("cat.png"), stream_options={"include_usage": True}) as response:
        lines = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    words = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    prompt = len(json.loads(words)["token_ids"])
    (usage,) = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert usage["prompt_tokens"] == prompt
    assert usage["total_tokens"] == prompt + usage["completion_tokens"]
    assert len(chunks) >= 2


def test_a_caller_can_have_a_trace_and_a_name_for_the_request(dynamo):
    headers = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "tracestate": "a=b", "x-request-id": "mine"}
    answer = dynamo.request("POST", "/v1/chat/completions", body(photo("cat.png")), **headers)
    assert answer.status == 200, answer.body


def test_a_stop_string_ends_a_stream_after_its_last_words(service, dynamo):
    with dynamo.streaming(text("do:stop"), photo("cat.png"), stop=["STOP"]) as response:
        lines = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    (choice,) = json.loads(lines[-2])["choices"]
    assert choice["finish_reason"] == "stop"
    service.quiet()


def test_a_stop_string_ends_the_answer_and_the_worker(service, dynamo):
    answer = dynamo.chat(text("do:stop"), photo("cat.png"), stop=["STOP"])
    (choice,) = answer.json["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("alpha ", "stop")
    service.quiet()


# --- hanging up -------------------------------------------------------------------------------------------------------


def leases(service):
    return service.metrics()["mmprep_leases"]


def test_a_caller_who_hangs_up_before_an_answer_ends_all_leases(service, dynamo):
    with dynamo.streaming(text("do:hang"), photo("cat.png")):
        eventually(lambda: leases(service) == 2, "a lease of the frontend and one of the worker")
    service.quiet()
    assert leases(service) == 0


def test_a_caller_who_hangs_up_while_a_worker_takes_the_request_ends_all_leases(service, dynamo):
    os.mkfifo(dynamo.gate)
    with dynamo.streaming(text("do:late"), photo("cat.png")):
        gate = eventually(lambda: writer_of(dynamo.gate), "a worker that has the request")
    eventually(lambda: leases(service) == 0, "no lease of the frontend")
    os.close(gate)
    eventually(lambda: "late was told" in dynamo.log.read_text(), "the end of the worker's part")
    service.quiet()


def writer_of(pipe):
    """Return a descriptor that writes into a pipe, ``None`` where nobody reads it."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def test_leases_end_with_the_first_tokens_and_a_caller_can_hang_up_then(service, dynamo):
    with dynamo.streaming(text("do:drip"), photo("cat.png")) as response:
        assert b"drip" in response.readline()
        service.quiet()
        assert leases(service) == 0
    assert dynamo.told(text("hello"))


def test_a_caller_who_hangs_up_while_the_chat_is_rendered_ends_its_work(service, dynamo):
    service.post("/reset_mm_cache", b"")
    lane = service.pids()["lane"]
    for pid in lane:
        os.kill(pid, signal.SIGSTOP)
    try:
        with contextlib.closing(dynamo.connect()) as connection:
            connection.request(
                "POST", "/v1/chat/completions", body(photo("galaxies.jpg")), {"Content-Type": "application/json"}
            )
            eventually(lambda: service.metrics()["mmprep_inflight"] >= 1, "a request under way")
        eventually(lambda: service.metrics()["mmprep_inflight"] == 0, "no request under way")
    finally:
        for pid in lane:
            os.kill(pid, signal.SIGCONT)
    service.quiet()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "fields", "message"),
    [
        (
            (text("a"), {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
            {},
            r"content\[1\]",
        ),
        ((text("a"),), {"logprobs": True}, "logprobs"),
        ((text("a"),), {"n": 2}, "'n'"),
        ((text("a"),), {"logit_bias": {"5": 1}}, "logit_bias"),
        ((text("a"), {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), {}, "file"),
    ],
)
def test_errors_of_a_request_are_answered_with_their_words(service, dynamo, parts, fields, message):
    answer = dynamo.chat(*parts, **fields)
    assert answer.status == 400, answer.body
    assert re.search(message, answer.json["message"])
    assert leases(service) == 0


@pytest.mark.parametrize(("what", "status"), [("stale", 503), ("fail", 500), ("end", 500), ("refuse", 400)])
def test_errors_of_a_worker_are_answered_and_leave_no_lease(service, dynamo, what, status):
    answer = dynamo.chat(text(f"do:{what}"), photo("cat.png"))
    assert answer.status == status, answer.body
    service.quiet()
    assert dynamo.told(photo("cat.png"))["items"]["image"][0]["shared"]
