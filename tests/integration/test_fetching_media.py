"""Media at URLs and in files: what the media's host does decides the answer. That private addresses are refused: test_bad_input."""

import base64
import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.integration.service import DATA, photo, serving, text, user

MAX_MEDIUM = 1 << 20
#: Of all media of a request.
MAX_MEDIA = 1_500_000
PART = "messages[0].content[1].image_url"
SECONDS = 3


class Host(BaseHTTPRequestHandler):
    """A host of media, which does what the path says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/status/"):
            self._answer(int(name), b"what the host says is not for our client")
        elif self.path.startswith("/redirect/"):
            self.send_response(302)
            self.send_header("Location", f"/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/silence":
            self.server.over.wait()
        elif self.path == "/announced":
            self.send_response(200)
            self.send_header("Content-Length", str(MAX_MEDIUM + 1))
            self.end_headers()
            self.server.over.wait()
        elif self.path == "/endless":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            with contextlib.suppress(OSError):
                while not self.server.over.is_set():
                    self.wfile.write(bytes(65536))
        elif self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(bytes(1000))
            self.close_connection = True
        elif self.path.startswith("/announced/"):
            self.send_response(200)
            self.send_header("Content-Length", name)
            self.end_headers()
            self.server.over.wait()
        elif self.path == "/text":
            self._answer(200, b"no picture")
        else:
            self._answer(200, (DATA / name).read_bytes())

    def _answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def host():
    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        server.asked, server.over = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def service(host):
    local = ("--allowed-local-media-path", DATA)
    options = (*local, "--allow-private-networks", "--max-media-size", MAX_MEDIUM, "--request-timeout", f"{SECONDS}s")
    options += ("--max-request-media-size", MAX_MEDIA)
    # After the host in the order of fixtures, so before it in the order of ends.
    with serving(*options, "--frontends", 1, "--cache-size", "32MiB") as running:
        assert host.asked == []
        yield running


def at(url):
    return user(text("What is this?"), {"type": "image_url", "image_url": {"url": url}})


def test_a_picture_at_a_url_equals_the_same_picture_in_the_request(service, host):
    for path in ("/cat.png", "/redirect/cat.png"):
        fetched = service.render(at(host.url + path))
        assert fetched["features"] == service.render(user(text("What is this?"), photo("cat.png")))["features"]


def test_what_was_fetched_is_had_by_its_uuid_without_its_host_also_beside_what_is_fetched(service, host):
    def named(path):
        return {"type": "image_url", "image_url": {"url": host.url + path}, "uuid": host.url}

    first = service.render(user(named("/cat.png")))["features"]["mm_hashes"]["image"]
    asked = len(host.asked)
    alone = {"type": "image_url", "uuid": host.url}
    assert service.render(user(alone))["features"]["mm_hashes"]["image"] == first
    assert len(host.asked) == asked
    assert service.chat(user(named("/status/404"))).status == 422
    other = {"type": "image_url", "image_url": {"url": host.url + "/rocket.jpg"}}
    answer = service.render(user(other, alone, text("A new question, so that there is a prompt to render.")))
    assert answer["features"]["mm_hashes"]["image"][1:] == first
    assert host.asked[asked:] == ["/status/404", "/rocket.jpg"]


def test_a_picture_in_a_local_file_equals_the_same_picture_in_the_request(service):
    read = service.render(at(f"file://{DATA}/cat.png"))
    assert read["features"] == service.render(user(text("What is this?"), photo("cat.png")))["features"]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        (f"{DATA}/absent.png", 422, "no file"),
        (f"{DATA}/LICENSES.md", 415, "not a picture"),
        (f"{DATA}/../conftest.py", 400, "'..'"),
        ("/etc/passwd", 400, "--allowed-local-media-path"),
    ],
)
def test_a_local_file_that_is_no_medium_is_an_error_that_names_its_part(service, path, status, words):
    answer = service.chat(at(f"file://{path}"))
    assert (answer.status, answer.error["param"]) == (status, PART), answer.error
    assert words in answer.error["message"]
    assert str(DATA) not in answer.error["message"]


def test_fetching_is_counted_for_what_is_fetched(service, host):
    name = 'mmprep_stage_seconds_count{stage="fetch"}'
    before = service.metrics().get(name, 0)
    service.render(user(*at(f"{host.url}/cat.png")[0]["content"], photo("cat.png")))
    assert service.metrics()[name] - before == 1


def test_pictures_from_several_places_keep_their_order(service, host):
    def parts(*pictures):
        return user(text("?"), *pictures)

    urls = [
        {"type": "image_url", "image_url": {"url": f"{host.url}/{name}"}}
        for name in ("rocket.jpg", "cat.png", "coffee.webp")
    ]
    mixed = [urls[0], photo("cat.png"), urls[2]]
    expected = service.render(parts(*(photo(name) for name in ("rocket.jpg", "cat.png", "coffee.webp"))))
    for pictures in (urls, mixed):
        assert service.render(parts(*pictures))["features"] == expected["features"]


def test_tokenize_fetches_too(service, host):
    tokens = service.post("/tokenize", {"messages": at(f"{host.url}/cat.png")}).json["tokens"]
    assert tokens == service.render(at(f"{host.url}/cat.png"))["token_ids"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/status/404", (422, "UnprocessableEntityError", "404")),
        ("/status/403", (422, "UnprocessableEntityError", "403")),
        ("/status/500", (502, "BadGatewayError", "500")),
        ("/status/503", (502, "BadGatewayError", "503")),
        ("/cut", (502, "BadGatewayError", "broke")),
        ("/announced", (413, "PayloadTooLargeError", "--max-media-size")),
        ("/endless", (413, "PayloadTooLargeError", "--max-media-size")),
        ("/text", (415, "UnsupportedMediaError", "not a picture")),
        ("/silence", (504, "TimeoutError", "in time")),
    ],
)
def test_what_the_host_does_decides_the_answer(service, host, path, expected):
    status, kind, words = expected
    answer = service.chat(at(host.url + path))
    error = answer.error
    assert (answer.status, error["type"], error["param"]) == (status, kind, PART), error
    assert words in error["message"]
    for secret in ("127.0.0.1", str(host.server_port), "what the host says"):
        assert secret not in error["message"]


def both(*urls):
    return user(*({"type": "image_url", "image_url": {"url": url}} for url in urls), text("?"))


def test_media_that_are_announced_with_too_much_together_are_refused_before_they_come(service, host):
    answer = service.chat(both(f"{host.url}/announced/800000", f"{host.url}/announced/800001"))
    error = answer.error
    assert (answer.status, error["type"]) == (413, "PayloadTooLargeError"), error
    assert error["param"] in {f"messages[0].content[{number}].image_url" for number in (0, 1)}
    assert "more than 1,500,000 bytes together" in error["message"]
    assert "--max-request-media-size" in error["message"]


def test_media_of_all_sources_count_together(service, host):
    cat = (DATA / "cat.png").read_bytes()
    filled = base64.b64encode(cat + bytes(1_000_000 - len(cat))).decode()
    sent, file = f"data:image/png;base64,{filled}", f"file://{DATA}/cat.png"
    assert service.chat(both(sent, f"{host.url}/announced/400000"), deadline_ms=500).status in {408, 504}
    for url in (f"{host.url}/announced/600000", f"{host.url}/endless"):
        answer = service.chat(both(sent, url))
        assert (answer.status, answer.error["param"]) == (413, "messages[0].content[1].image_url")
        assert "--max-request-media-size" in answer.error["message"]
    most = (MAX_MEDIA - 1_000_000) // len(cat)
    assert service.chat(both(sent, *[file] * most)).status == 200
    answer = service.chat(both(sent, *[file] * (most + 1)))
    assert (answer.status, answer.error["type"]) == (413, "PayloadTooLargeError")


def test_a_host_that_refuses_connections_is_a_bad_gateway(service):
    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as closed:
        port = closed.server_port
    answer = service.chat(at(f"http://127.0.0.1:{port}/a.png"))
    assert (answer.status, answer.error["type"], answer.error["param"]) == (502, "BadGatewayError", PART)


def test_the_deadline_of_a_request_ends_its_fetch(service, host):
    answer = service.chat(at(f"{host.url}/silence"), deadline_ms=500)
    assert (answer.status, answer.error["type"], answer.error["param"]) == (504, "TimeoutError", PART)


def test_nothing_is_left_of_failed_fetches(service, host):
    assert host.asked
    service.quiet()
