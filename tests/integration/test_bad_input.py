"""What is wrong with a request is said to its sender, in the promised form, and leaves nothing behind in the service."""

import base64
import http.client
import io
import json
import re
import socket
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from tests.integration.service import (
    DATA,
    Service,
    decode_item,
    eventually,
    image,
    photo,
    private_bytes,
    serving,
    text,
    user,
)
from tests.pictures import FOREIGN, chunk, drawn, samples, tiff

from mmprep import embedded

CHAT = "/v1/chat/completions/render"
COMPLETIONS = "/v1/completions/render"
PART = "messages[0].content[0].image_url"
JPEG = (DATA / "rocket.jpg").read_bytes()
PNG = (DATA / "cat.png").read_bytes()
MAX_LENGTH = 3000
#: Characters: so many tokens of the longest one of the embedded vocabulary, 69.
MOST_TEXT = MAX_LENGTH * 69
MOST_COUNTED = 1 << 20
MAX_BODY = 4 << 20
MAX_MEDIUM = 2 << 20
#: Of all media of a request: bytes, and pixels.
MAX_MEDIA = 5 << 19
MAX_PIXELS = 50_000_000

#: What no answer may hold: places on this machine, internals, addresses of objects and of hosts.
FORBIDDEN = re.compile(
    r"Traceback|/work|/tmp|/root|/home|/usr|/dev/shm|site-packages|\.py\b|\.sock\b|ipc://|127\.0\.0\.1|0x[0-9a-f]{6}|<class|object at"
)

#: Bytes by which the heap of one process may have grown after hundreds of bad requests of up to 4 MiB.
GROWTH = 96 << 20


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    own = (embedded.path() / "chat_template.jinja").read_text()
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text("{%- if without_media -%}none{%- else -%}" + own + "{%- endif -%}")
    limits = ("--limit-mm-per-prompt", "image=3", "--max-model-len", MAX_LENGTH)
    sizes = ("--max-body-size", MAX_BODY, "--max-media-size", MAX_MEDIUM, "--cache-size", "64MiB")
    sums = ("--max-request-media-size", MAX_MEDIA, "--max-request-image-pixels", MAX_PIXELS)
    with serving(*limits, *sizes, *sums, "--chat-template", template) as running:
        yield running


def encoded(picture, kind="PNG", **options):
    into = io.BytesIO()
    picture.save(into, kind, **options)
    return into.getvalue()


def png_header(width, height):
    """Return a PNG that announces a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def gif_header(width, height):
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + b"\x2c" + bytes(9) + b"\x08\x00;"


def bomb():
    """Return a PNG of a few kB whose pixels would take 1.2 GB, above the service's limit."""
    packer = zlib.compressobj(9)
    rows = bytes(1 + 20_000 * 3)
    data = b"".join(packer.compress(rows) for _ in range(200)) + packer.flush()
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def packed_text():
    """Return a PNG with a text of 60 MB that is packed into 60 kB."""
    text = b"a\0\0" + zlib.compress(bytes(60_000_000), 9)
    return PNG[:33] + chunk(b"zTXt", text) + PNG[33:]


def many_scans():
    """Return a JPEG with a hundred scans too many."""
    progressive = samples()["JPEG", "progressive grey"]
    start = progressive.rindex(b"\xff\xda")
    return progressive[:start] + progressive[start:-2] * 100 + b"\xff\xd9"


def grey(width, height):
    return encoded(Image.fromarray(np.full((height, width, 3), 127, np.uint8)))


def with_url(url):
    return user({"type": "image_url", "image_url": {"url": url}}, text("?"))


def nested(levels):
    """Return an object in an object, and so on."""
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


class Case(NamedTuple):
    """One bad request and the answer to it."""

    body: Any
    status: int
    type: str
    param: str | None
    words: str
    path: str = CHAT


HELLO = [{"role": "user", "content": "Hello"}]
BAD = "BadRequestError"


def chat(messages, **fields):
    return {"messages": messages, **fields}


CASES = {
    # what is no request
    "not JSON": Case(b"{", 400, BAD, None, "not valid JSON"),
    "no body": Case(b"", 400, BAD, None, "not valid JSON"),
    "not UTF-8": Case(b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, BAD, None, "not valid JSON"),
    "nested too deeply": Case(b'{"x":' + b"[" * 100_000, 400, BAD, None, "nested too deeply|not valid JSON"),
    "a schema just below the decoder's limit": Case(
        chat(HELLO, structured_outputs={"json": nested(900)}), 400, BAD, "structured_outputs", "128 levels"
    ),
    "a tool just below the decoder's limit": Case(
        chat(HELLO, tools=[{"type": "function", "function": nested(900)}]), 400, BAD, "tools", "128 levels"
    ),
    "a list": Case([], 400, BAD, None, "expected an object"),
    "no messages": Case({}, 400, BAD, "messages", "required"),
    "empty messages": Case(chat([]), 400, BAD, "messages", "at least one"),
    "messages is a text": Case(chat("hi"), 400, BAD, "messages", "expected a list"),
    "text is a number": Case(
        chat(user({"type": "text", "text": 5})), 400, BAD, "messages[0].content[0].text", "expected a string"
    ),
    "unknown role": Case(chat([{"role": "robot", "content": "x"}]), 400, BAD, "messages[0].role", "'robot'"),
    "null content": Case(chat([{"role": "user", "content": None}]), 400, BAD, "messages[0].content", "needs a content"),
    "unknown part": Case(chat(user({"type": "smell"})), 400, BAD, "messages[0].content[0].type", "'smell'"),
    "a recording": Case(
        chat(user({"type": "audio_url", "audio_url": {"url": "http://127.0.0.1/"}})),
        400,
        BAD,
        "messages[0].content[0].type",
        "'audio'",
    ),
    "part without URL": Case(chat(user({"type": "image_url", "image_url": {}})), 400, BAD, PART, "no data.*'uuid'"),
    "temperature below 0": Case(chat(HELLO, temperature=-1), 400, BAD, "temperature", ">= 0"),
    "deadline of 0": Case(chat(HELLO, deadline_ms=0), 400, BAD, "deadline_ms", ">= 1"),
    "unknown payload": Case(chat(HELLO, mm_payload="pigeon"), 400, BAD, "mm_payload", "'pigeon'"),
    "own template": Case(chat(HELLO, chat_template="{{ 1 }}"), 400, BAD, "chat_template", "leave it out"),
    "own processor": Case(chat(HELLO, mm_processor_kwargs={"a": 1}), 400, BAD, "mm_processor_kwargs", "leave it out"),
    "unknown model": Case(chat(HELLO, model="gpt-9"), 404, "NotFoundError", "model", "'gpt-9'.*'mmprep-demo'"),
    "prompt too long": Case(chat([{"role": "user", "content": "cat " * 4000}]), 400, BAD, None, str(MAX_LENGTH)),
    "text that cannot fit": Case(
        chat([{"role": "user", "content": "x" * MOST_TEXT}]),
        400,
        BAD,
        "messages",
        f"characters.*{MOST_TEXT} characters",
    ),
    # media that are none
    "not base64": Case(chat(with_url("data:image/png;base64,@@@@")), 400, BAD, PART, "not valid base64"),
    "base64 with line breaks": Case(chat(with_url("data:image/png;base64,AAAA\nAAAA")), 400, BAD, PART, "line breaks"),
    "data URL without base64": Case(chat(with_url("data:image/png,abc")), 400, BAD, PART, "not base64"),
    "data URL without comma": Case(chat(with_url("data:image/png;base64")), 400, BAD, PART, "malformed"),
    "0 bytes": Case(chat(with_url("data:image/png;base64,")), 400, BAD, PART, "empty"),
    "no URL": Case(chat(with_url("cat.png")), 400, BAD, PART, "no URL"),
    "not a picture": Case(chat(user(image(b"hello, this is text"))), 415, "UnsupportedMediaError", PART, "JPEG.*PNG"),
    "a PDF": Case(chat(user(image(b"%PDF-1.7\n1 0 obj"))), 415, "UnsupportedMediaError", PART, "not a picture"),
    "truncated JPEG": Case(chat(user(image(JPEG[:9000]))), 422, "UnprocessableEntityError", PART, "truncated"),
    "truncated PNG": Case(chat(user(image(PNG[:5000]))), 422, "UnprocessableEntityError", PART, "truncated"),
    "PNG of a header": Case(chat(user(image(PNG[:24]))), 422, "UnprocessableEntityError", PART, "broken"),
    "PNG without pixels": Case(
        chat(user(image(png_header(300, 200)))), 422, "UnprocessableEntityError", PART, "broken"
    ),
    "1 by 300": Case(chat(user(image(grey(1, 300)))), 400, BAD, PART, "1 by 300.*200 times"),
    "300 by 1": Case(chat(user(image(grey(300, 1)))), 400, BAD, PART, "300 by 1.*200 times"),
    "20,000 by 20,000": Case(
        chat(user(image(png_header(20_000, 20_000)))), 413, "PayloadTooLargeError", PART, "400000000 pixels.*limit"
    ),
    "a GIF of 4 gigapixels": Case(
        chat(user(image(gif_header(65_535, 65_535)))), 413, "PayloadTooLargeError", PART, "--max-image-pixels"
    ),
    "a bomb": Case(chat(user(image(bomb()))), 413, "PayloadTooLargeError", PART, "--max-image-pixels"),
    "a second picture that is broken": Case(
        chat(user(photo("cat.png"), text("and"), image(JPEG[:9000]))),
        422,
        "UnprocessableEntityError",
        "messages[0].content[2].image_url",
        "truncated",
    ),
    "above --max-media-size": Case(
        chat(user(image(bytes(MAX_MEDIUM + 1)))), 413, "PayloadTooLargeError", PART, "--max-media-size"
    ),
    "too many pictures": Case(
        chat(user(*[photo("cat.png")] * 4)), 400, BAD, "messages[0].content[3].image_url", "At most 3.*'image'"
    ),
    "a template without room for the pictures": Case(
        chat(user(photo("cat.png")), chat_template_kwargs={"without_media": True}), 400, BAD, "messages", "room for 0"
    ),
    "a uuid that nobody has sent": Case(
        chat(user({"type": "image_url", "uuid": "127.0.0.1"})),
        404,
        "NotFoundError",
        "messages[0].content[0].uuid",
        "'uuid'",
    ),
    "a uuid that is none": Case(
        chat(user({**photo("cat.png"), "uuid": {}})), 400, BAD, "messages[0].content[0].uuid", "string"
    ),
    "all media above --max-request-media-size": Case(
        chat(user(*[image(bytes(MAX_MEDIA // 2 + 1))] * 2)),
        413,
        "PayloadTooLargeError",
        "messages[0].content[1].image_url",
        "more than 2,621,440 bytes together.*--max-request-media-size",
    ),
    "all pictures above --max-request-image-pixels": Case(
        chat(user(photo("cat.png"), image(png_header(6000, 5000)), image(png_header(5000, 4000)))),
        413,
        "PayloadTooLargeError",
        "messages[0].content[2].image_url",
        "more than 50,000,000 pixels together.*--max-request-image-pixels",
    ),
    "the same to count tokens": Case(
        chat(user(*[image(png_header(6000, 5000))] * 2)),
        413,
        "PayloadTooLargeError",
        "messages[0].content[1].image_url",
        "--max-request-image-pixels",
        "/tokenize",
    ),
    **{
        f"no picture: {name}": Case(
            chat(user(image(data, "png"))), 415, "UnsupportedMediaError", PART, "send one of JPEG, PNG"
        )
        for name, data in FOREIGN.items()
        if data
    },
    **{
        f"{kind}, cut off": Case(
            chat(user(image(data[: len(data) * 3 // 5]))), 422, "UnprocessableEntityError", PART, "broken or truncated"
        )
        for kind, data in ((kind, samples()[kind, "RGB"]) for kind in ("PNG", "WEBP", "BMP", "TIFF", "AVIF"))
    },
    "GIF, cut off": Case(
        chat(user(image(samples()["GIF", "animated"][:1000]))), 422, "UnprocessableEntityError", PART, "broken"
    ),
    "a JPEG with too many scans": Case(
        chat(user(image(many_scans()))), 422, "UnprocessableEntityError", PART, "more than 64 scans"
    ),
    "a PNG with text that unpacks to much": Case(
        chat(user(image(packed_text()))), 422, "UnprocessableEntityError", PART, "too large"
    ),
    "a TIFF with an old compression": Case(
        chat(user(image(tiff(np.zeros((9, 9, 3), np.uint8), photometric=2, tags=[(259, "H", (6,))])))),
        415,
        "UnsupportedMediaError",
        PART,
        "compression 6",
    ),
    # places that are not read from
    "file": Case(chat(with_url("file:///etc/passwd")), 400, BAD, PART, "file: URLs are only read by a service that"),
    "ftp": Case(chat(with_url("ftp://example.com/a.png")), 400, BAD, PART, "ftp: URLs"),
    "attachment": Case(chat(with_url("attachment:0")), 400, BAD, PART, ""),
    "cloud metadata": Case(
        chat(with_url("http://169.254.169.254/latest")), 400, BAD, PART, "not on the public network"
    ),
    "an inner host": Case(chat(with_url("http://10.0.0.1/a.png")), 400, BAD, PART, "not on the public network"),
    "IPv6 loopback": Case(chat(with_url("http://[::1]/a.png")), 400, BAD, PART, "not on the public network"),
    "a disguised loopback": Case(chat(with_url("http://2130706433/a.png")), 400, BAD, PART, ""),
    "credentials": Case(chat(with_url("http://a:b@example.com/a.png")), 400, BAD, PART, ""),
    # tensors
    "unknown dtype": Case(chat(HELLO, mm_dtype="int4"), 400, BAD, "mm_dtype", "'int4'"),
    "addresses for nobody": Case(chat(user(photo("cat.png")), mm_payload="shm"), 400, BAD, "backend_id", "backend_id"),
    "addresses for an unknown backend": Case(
        chat(user(photo("cat.png")), mm_payload="shm", backend_id="ghost"),
        404,
        "NotFoundError",
        "backend_id",
        "'ghost'",
    ),
    # the other routes
    "ids above the vocabulary": Case({"prompt": [1, 999_999]}, 400, BAD, "prompt[1]", "999999", COMPLETIONS),
    "ids below 0": Case({"prompt": [[1], [1, -4]]}, 400, BAD, "prompt[1][1]", "-4", COMPLETIONS),
    "a text that cannot fit": Case(
        {"prompt": ["a", "x" * (MOST_TEXT + 1)]}, 400, BAD, "prompt[1]", str(MOST_TEXT), COMPLETIONS
    ),
    "too many prompts": Case({"prompt": ["a"] * 4097}, 400, BAD, "prompt", "4097 prompts; at most 4096", COMPLETIONS),
    "too much to count": Case({"prompt": "x" * (MOST_COUNTED + 1)}, 400, BAD, "prompt", str(MOST_COUNTED), "/tokenize"),
    "no prompts": Case({"prompt": []}, 400, BAD, "prompt", "not be empty", COMPLETIONS),
    "texts and ids": Case({"prompt": ["a", 1]}, 400, BAD, "prompt", "list of texts", COMPLETIONS),
    "empty ids": Case({"prompt": [[]]}, 400, BAD, "prompt[0]", "At least one", COMPLETIONS),
    "prompt and messages": Case({"prompt": "a", "messages": HELLO}, 400, BAD, "prompt", "either", "/tokenize"),
    "neither": Case({}, 400, BAD, "prompt", "either", "/tokenize"),
    "broken picture": Case(chat(user(image(PNG[:24]))), 422, "UnprocessableEntityError", PART, "", "/tokenize"),
    "unknown ids": Case({"tokens": [5, 10**9]}, 400, BAD, "tokens[1]", str(10**9), "/detokenize"),
    "tokens is a text": Case({"tokens": "abc"}, 400, BAD, "tokens", "list", "/detokenize"),
    "an empty prompt": Case({"prompt": ["a", ""]}, 400, BAD, "prompt[1]", "empty", COMPLETIONS),
    "a bias outside the vocabulary": Case(
        chat(HELLO, logit_bias={"5": 1, "999999": 1}), 400, BAD, "logit_bias", "999999 is no token id"
    ),
    "a stop outside the vocabulary": Case(
        {"prompt": "a", "stop_token_ids": [5, 999_999]}, 400, BAD, "stop_token_ids[1]", "0 to 6271", COMPLETIONS
    ),
    "a tool without a function": Case(
        chat(HELLO, tools=[{"type": "function"}]), 400, BAD, "tools[0].function.name", "function with a name"
    ),
    "a tool of another API": Case(
        {"messages": HELLO, "tools": [{"name": "f", "input_schema": {}}]},
        400,
        BAD,
        "tools[0].function.name",
        "function with a name",
        "/tokenize",
    ),
    "more answers than engines give": Case(chat(HELLO, n=16_385), 400, BAD, "n", "<= 16384"),
    "a constraint by its former name": Case(
        chat(HELLO, guided_json={"type": "object"}), 400, BAD, "guided_json", "'structured_outputs': {'json': …}"
    ),
    "a path that generates": Case(
        chat(HELLO), 404, "NotFoundError", None, "send it to /v1/chat/completions/render", "/v1/chat/completions"
    ),
    "a path of nothing": Case({"input": "a"}, 404, "NotFoundError", None, "no such path; /docs", "/v1/embeddings"),
    "a part without a type": Case(
        chat(user({"text": "Hello"})), 400, BAD, "messages[0].content[0].type", "required; send .*'image_url'"
    ),
    "a value that is not listed": Case(
        chat(HELLO, reasoning_effort="huge"), 400, BAD, "reasoning_effort", "'huge' is not allowed here; send .*'low'"
    ),
    "leases of nobody": Case(
        {"backend_id": "x", "leases": ["zz"]}, 400, BAD, "leases[0]", "32 hex digits", "/leases/renew"
    ),
    "leases without a name": Case({"leases": []}, 400, BAD, "backend_id", "required", "/leases/release"),
    "a name of no queue": Case(chat(user(text("?")), queue="a b"), 400, BAD, "queue", "1 to 64 letters, digits"),
}


def send(service: Service, case: Case):
    answer = service.post(case.path, case.body)
    assert not FORBIDDEN.search(answer.body.decode()), answer.body
    return answer


@pytest.mark.parametrize("name", CASES)
def test_a_bad_request_is_told_what_is_wrong_and_where(service, name):
    case = CASES[name]
    answer = send(service, case)
    error = answer.error
    assert (answer.status, error["type"]) == (case.status, case.type), error
    if case.param is not None:
        assert error["param"] == case.param, error
    assert re.search(case.words, error["message"], re.DOTALL), error
    assert answer.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x" * (MOST_TEXT - 1000)}]}),
        (COMPLETIONS, {"prompt": "x" * MOST_TEXT}),
        ("/tokenize", {"prompt": "x" * MOST_COUNTED}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * (MOST_COUNTED - 1000)}]}),
        ("/detokenize", {"tokens": [1] * 500_000}),
    ],
    ids=["chat", "completions", "tokenize text", "tokenize chat", "detokenize"],
)
def test_text_that_takes_longer_than_its_deadline_is_answered_in_time(service, path, body):
    answer = service.post(path, {**body, "deadline_ms": 1})
    assert (answer.status, answer.error["type"]) == (408, "TimeoutError")


def test_deep_arguments_of_a_tool_are_rendered_or_refused_and_never_a_fault(service):
    call = {"function": {"name": "f", "arguments": "DEEP"}}
    body = json.dumps(chat([*HELLO, {"role": "assistant", "tool_calls": [call]}])).encode()
    for levels in range(800, 1020, 4):
        answer = service.post(CHAT, body.replace(b'"DEEP"', b'{"a":' * levels + b"{}" + b"}" * levels))
        assert answer.status in {200, 400}, (levels, answer.body)


def test_a_text_longer_than_the_model_takes_can_be_counted(service):
    answer = service.post("/tokenize", {"prompt": "cat " * 10_000}).json
    assert answer["count"] > answer["max_model_len"] == MAX_LENGTH


def test_nothing_is_counted_as_no_tokens_and_is_the_text_of_none(service):
    counted = service.post("/tokenize", {"prompt": "", "return_token_strs": True}).json
    assert (counted["count"], counted["tokens"], counted["token_strs"]) == (0, [], [])
    assert service.post("/detokenize", {"tokens": []}).json == {"prompt": ""}


def test_many_prompts_are_answered_in_their_order_by_their_own_ids(service):
    texts = [f"{number} " * (number % 7 * 100 + 1) for number in range(300)]
    rendered = service.post(COMPLETIONS, {"prompt": texts}).json
    counted = [service.post("/tokenize", {"prompt": text}).json["tokens"] for text in texts[:7]]
    assert [answer["token_ids"] for answer in rendered[:7]] == counted
    assert [answer["request_id"].rpartition("-")[2] for answer in rendered] == [str(n) for n in range(300)]


def test_a_picture_of_one_pixel_is_a_picture(service):
    answer = service.render(user(image(grey(1, 1)), text("?")))
    assert decode_item(answer["features"]["kwargs_data"]["image"][0])["image_grid_thw"].array.tolist() == [1, 4, 4]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_picture_is_read_by_its_content_whatever_its_type_says(service, kind):
    data = encoded(drawn(320, 200), kind)
    answers = [service.render(user(image(data, named), text("?"))) for named in ("jpeg", "png", "svg+xml")]
    assert all(answer["features"] == answers[0]["features"] for answer in answers)


def test_a_picture_that_is_also_html_is_read_as_a_picture(service):
    page = b"<!-- --><html><script>alert(1)</script></html>"
    for data in (JPEG + page, encoded(drawn(64, 64), "JPEG", comment=page), PNG + page):
        assert service.render(user(image(data, "html"), text("?")))["features"]["mm_hashes"]["image"]


def test_the_limits_of_a_request_are_reached_and_not_passed(service):
    half = png_header(5000, 5000)
    answer = service.chat(user(image(half), image(half)))
    assert (answer.status, answer.error["type"]) == (422, "UnprocessableEntityError"), (
        "a lane says what is wrong with it"
    )
    filled = PNG + bytes(MAX_MEDIA // 2 - len(PNG))
    assert service.chat(user(image(filled), image(filled), text("?"))).status == 200


def test_a_wrong_method_and_an_unknown_path_are_answered_in_the_same_form(service):
    for method, path in (("GET", CHAT), ("DELETE", "/tokenize"), ("POST", "/health")):
        answer = service.request(method, path)
        assert (answer.status, answer.error["type"]) == (405, BAD)
        assert method not in answer.headers["Allow"]
    for path in ("/", "/v1/chat/completions", "/../../etc/passwd", "/v1/models/x", "/docs%00"):
        answer = service.get(path)
        assert (answer.status, answer.error["type"]) == (404, "NotFoundError")
        assert not FORBIDDEN.search(answer.body.decode())


def test_a_huge_body_is_refused_by_its_announced_length_before_it_is_sent(service):
    connection = service.connect()
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    response = connection.getresponse()
    body = json.loads(response.read())
    connection.close()
    assert (response.status, body["error"]["type"]) == (413, "PayloadTooLargeError")
    assert "4,194,304" in body["error"]["message"]


def test_a_huge_body_of_unknown_length_is_refused_at_the_limit(service):
    connection = service.connect()
    pieces = (b" " * 65536 for _ in range(MAX_BODY // 65536 + 2))
    try:
        connection.request("POST", CHAT, pieces, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["type"]) == (413, "PayloadTooLargeError")
    finally:
        connection.close()


def test_what_is_no_http_is_answered_and_the_service_goes_on(service):
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        response = http.client.HTTPResponse(raw)
        response.begin()
        assert response.status == 400
        assert json.loads(response.read())["error"]["type"] == BAD
    assert service.get("/ready").status == 200


def test_a_private_address_is_refused_without_dialling_it(service):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]"):
            answer = service.chat(with_url(f"http://{host}:{port}/a.png"))
            assert (answer.status, answer.error["param"]) == (400, PART)
            assert "public network" in answer.error["message"]
        with pytest.raises(BlockingIOError):
            server.accept()


def test_an_error_does_not_harm_the_next_request_on_the_same_connection(service):
    connection = service.connect()
    for case in (CASES["truncated JPEG"], CASES["not JSON"], CASES["a bomb"], CASES["unknown model"]):
        body = case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
        connection.request("POST", CHAT, body)
        response = connection.getresponse()
        assert response.status == case.status
        response.read()
        connection.request("POST", CHAT, json.dumps(chat(user(photo("cat.png")))).encode())
        response = connection.getresponse()
        assert response.status == 200
        response.read()
    connection.close()


def test_bad_requests_leave_nothing_pinned_leased_or_filling_and_no_memory_behind(service):
    for case in CASES.values():
        send(service, case)
    pids = service.pids()
    everyone = [pid for of_role in pids.values() for pid in of_role]
    before = {pid: private_bytes(pid) for pid in everyone}
    for _ in range(3):
        for case in CASES.values():
            send(service, case)
    service.quiet()
    assert service.pids() == pids, "a process of the service was replaced"
    grown = {pid: private_bytes(pid) - before[pid] for pid in everyone}
    assert max(grown.values()) < GROWTH, grown
    eventually(lambda: service.metrics()["mmprep_inflight"] == 0, "no request under way")


def test_leases_of_a_backend_that_does_not_exist_are_lost(service):
    answer = service.post("/leases/renew", {"backend_id": "ghost", "leases": ["0" * 32]})
    assert answer.json["lost"] == ["0" * 32]
    assert service.post("/leases/release", {"backend_id": "ghost", "leases": ["0" * 32]}).status == 200


def test_base64_without_padding_and_with_another_type_is_read(service):
    bare = base64.b64encode(PNG).decode().rstrip("=")
    answers = [service.render(with_url(f"data:{kind};base64,{bare}")) for kind in ("image/jpeg", "", "x/y;a=b")]
    assert all(answer["features"] == answers[0]["features"] for answer in answers)
