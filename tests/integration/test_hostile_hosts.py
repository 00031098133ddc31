"""A real service and hosts that are slow, endless, lying, broken or hostile: what each costs, and what the client is told."""

import contextlib
import gzip
import re
import socket
import socketserver
import ssl
import struct
import threading
import zlib
from functools import cache
from typing import NamedTuple

import pytest
from tests.bombs import HUGE, avif_of, frames, jpeg_of, tiff_of, tiled, webp_canvas
from tests.integration.service import DATA, eventually, photo, private_bytes, serving, text, user
from tests.pictures import bmp, drawn, encoded, gif_of_a_frame
from tests.videos import animated, edited, filmed

MAX_MEDIUM = 1 << 20
SECONDS = 3
PART = "messages[0].content[1].image_url"
CAT = (DATA / "cat.png").read_bytes()
TLS = DATA / "tls"

BAD, GATEWAY = "BadRequestError", "BadGatewayError"
BROKEN, LARGE = "UnprocessableEntityError", "PayloadTooLargeError"


def whole(body, *headers):
    lines = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def redirect(location):
    return b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n"


def enormous_png():
    """Return a PNG whose header promises 60,000 times 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b""))
    framed = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def gzipped(times):
    """Return zeros, as often compressed as told."""
    data = bytes(64 << 20)
    for _ in range(times):
        data = gzip.compress(data)
    return data


TLS_HELLO = b"\x16\x03"
HEAD = b"HTTP/1.1 200 OK\r\n"
HTML = b"<!doctype html><html><head><title>404</title></head><body>Not here</body></html>"
#: What is sent in one piece, and then the connection closes.
SAYS = {
    "nothing": whole(b""),
    "html": whole(HTML, b"Content-Type: text/html"),
    "html that says it is a picture": whole(HTML, b"Content-Type: image/png"),
    "not found": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "only a part": b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\n\r\nhello",
    "an error": b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n",
    "less than announced": HEAD + b"Content-Length: 100000\r\n\r\n" + CAT[:1000],
    "more than announced": HEAD + b"Content-Length: 100\r\n\r\n" + CAT,
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a negative length": HEAD + b"Content-Length: -5\r\n\r\nhello",
    "a broken chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    "no end of chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "no HTTP": b"SSH-2.0-server\r\n",
    "a huge header": HEAD + b"X: " + b"x" * 200_000 + b"\r\n\r\n",
    "a thousand headers": HEAD + b"X: x\r\n" * 1000 + b"\r\n",
    "nothing at all": b"",
    "a gzip bomb": whole(gzipped(1), b"Content-Encoding: gzip"),
    "a gzip bomb in a gzip bomb": whole(gzipped(2), b"Content-Encoding: gzip"),
    "two codings": whole(gzipped(2), b"Content-Encoding: gzip, gzip"),
    "broken gzip": whole(gzip.compress(CAT)[:-20], b"Content-Encoding: gzip"),
    "too large by its length": HEAD + b"Content-Length: %d\r\n\r\n" % (MAX_MEDIUM + 1),
    "half a picture": whole(CAT[: len(CAT) // 2]),
    "a picture's first bytes": whole(CAT[:10]),
    "a decompression bomb": whole(enormous_png()),
    "back again": redirect(b"/back again".replace(b" ", b"%20")),
    "to a file": redirect(b"file:///etc/passwd"),
    "to gopher": redirect(b"gopher://127.0.0.1:6379/"),
    "to a data URL": redirect(b"data:image/png;base64,AA=="),
    "nowhere": b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
}
EXPECTED = {
    "nothing": (422, BROKEN, "without content"),
    "html": (415, "UnsupportedMediaError", "not a picture"),
    "html that says it is a picture": (415, "UnsupportedMediaError", "not a picture"),
    "not found": (422, BROKEN, "404"),
    "only a part": (422, BROKEN, "206"),
    "an error": (502, GATEWAY, "500"),
    "less than announced": (502, GATEWAY, "broke"),
    "more than announced": (502, GATEWAY, ""),
    "two lengths": (502, GATEWAY, "valid HTTP"),
    "a negative length": (502, GATEWAY, "valid HTTP"),
    "a broken chunk": (502, GATEWAY, ""),
    "no end of chunks": (502, GATEWAY, "broke"),
    "no HTTP": (502, GATEWAY, "valid HTTP"),
    "a huge header": (502, GATEWAY, "valid HTTP"),
    "a thousand headers": (502, GATEWAY, "valid HTTP"),
    "nothing at all": (502, GATEWAY, "broke"),
    "a gzip bomb": (413, LARGE, "--max-media-size"),
    "a gzip bomb in a gzip bomb": (415, "UnsupportedMediaError", "not a picture"),
    "two codings": (422, BROKEN, "content coding"),
    "broken gzip": (422, BROKEN, "compressed"),
    "too large by its length": (413, LARGE, "--max-media-size"),
    "half a picture": (422, BROKEN, ""),
    "a picture's first bytes": (422, "UnprocessableEntityError", "truncated"),
    "a decompression bomb": (413, LARGE, "--max-image-pixels"),
    "back again": (422, BROKEN, "redirects more than"),
    "to a file": (422, BROKEN, "http or https"),
    "to gopher": (422, BROKEN, "http or https"),
    "to a data URL": (422, BROKEN, "http or https"),
    "nowhere": (422, BROKEN, "http or https"),
    "silence": (504, "TimeoutError", "in time"),
    "silence behind the head": (504, "TimeoutError", "in time"),
    "a slow drip": (504, "TimeoutError", "in time"),
    "a slow head": (504, "TimeoutError", "in time"),
    "for ever continue": (504, "TimeoutError", "in time"),
    "without end": (413, LARGE, "--max-media-size"),
    "chunks without end": (413, LARGE, "--max-media-size"),
    "reset": (502, GATEWAY, ""),
}


class Medium(NamedTuple):
    """What a host sends whole, and what a client is told of it."""

    data: bytes
    status: int
    words: str = ""
    kind: str = "image_url"


def half(data, kind="image_url"):
    return Medium(data[: len(data) // 2], 422, "truncated|broken", kind)


@cache
def media():
    """Return bombs, lies and halves, by name."""
    pixels = "--max-image-pixels"
    film, picture = filmed(20), drawn(300, 200)
    lies = {f"a film that lies in its {kind.decode()}": (kind, 4) for kind in (b"stts", b"stsc", b"stco")}
    return {
        "a JPEG of huge sides": Medium(jpeg_of(HUGE), 413, pixels),
        "a GIF with a huge screen": Medium(gif_of_a_frame((HUGE, HUGE), (0, 0, 9, 9)), 413, pixels),
        "a GIF with a huge frame": Medium(gif_of_a_frame((9, 9), (60_000, 60_000, 9, 9)), 413, pixels),
        "a GIF of many frames": Medium(frames(100), 200),
        "a WebP with a huge canvas": Medium(webp_canvas(1 << 24), 413, pixels),
        "a TIFF of huge sides": Medium(tiff_of(HUGE), 413, pixels),
        "a TIFF with a huge tile": Medium(tiled(1 << 30), 413, "memory"),
        "an AVIF of huge sides": Medium(avif_of((HUGE, HUGE)), 413, pixels),
        "a BMP of huge sides": Medium(bmp(24, b"", size=(HUGE, HUGE)), 413, pixels),
        "an animation with a huge screen": Medium(webp_canvas(1 << 24), 413, pixels, "video_url"),
        "a film that lies about its time": Medium(edited(film, b"mdhd", 16, 0x7FFFFFFF), 200, kind="video_url"),
        **{name: Medium(edited(film, *at, 0x00FFFFFF), 422, "broken", "video_url") for name, at in lies.items()},
        **{f"half a {kind}": half(encoded(picture, kind)) for kind in ("JPEG", "WEBP", "BMP", "TIFF", "AVIF", "GIF")},
        "half a film": half(film, "video_url"),
        "half a WebM": half(filmed(20, encoder="libvpx"), "video_url"),
        "half an animation": half(animated(5), "video_url"),
    }


class Hostile(socketserver.BaseRequestHandler):
    """Does what the path says, for as long as somebody listens and the server is up."""

    def handle(self):
        request = b""
        while b"\r\n\r\n" not in request:
            received = self.request.recv(65536)
            if not received:
                return
            request += received
            if request.startswith(TLS_HELLO):
                self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                return
        what = request.split()[1].decode()[1:].replace("%20", " ").replace("%27", "'")
        with contextlib.suppress(OSError):
            if what in SAYS:
                self.request.sendall(SAYS[what])
            elif what in media():
                self.request.sendall(whole(media()[what].data))
            else:
                self._go_on(what)

    def _go_on(self, what):
        match what:
            case "silence":
                self.server.over.wait()
            case "silence behind the head":
                self.request.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
                self.server.over.wait()
            case "a slow drip":
                self._repeat(b"x", HEAD + b"Content-Length: 100000\r\n\r\n", pause=0.02)
            case "a slow head":
                self._repeat(b"x", HEAD + b"X: ", pause=0.02)
            case "for ever continue":
                self._repeat(b"HTTP/1.1 100 Continue\r\n\r\n", b"", pause=0.02)
            case "without end":
                self._repeat(bytes(65536), HEAD + b"Connection: close\r\n\r\n")
            case "chunks without end":
                self._repeat(b"10000\r\n" + bytes(65536) + b"\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            case "reset":
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _repeat(self, piece, head, *, pause=0.0):
        self.request.sendall(head)
        while not self.server.over.wait(pause):
            self.request.sendall(piece)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    over = threading.Event()


@pytest.fixture(scope="module")
def host():
    with Server(("127.0.0.1", 0), Hostile) as server:
        server.over = threading.Event()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def service(host, tmp_path_factory):
    assert host  # before the service in the order of fixtures, so after it in the order of ends
    trusted = tmp_path_factory.mktemp("tls") / "trusted.pem"
    trusted.write_bytes((TLS / "trusted.pem").read_bytes() + (TLS / "expired.pem").read_bytes())
    options = ("--allow-private-networks", "--max-media-size", MAX_MEDIUM, "--request-timeout", f"{SECONDS}s")
    env = {"SSL_CERT_FILE": str(trusted)}
    with serving(*options, "--frontends", 1, "--cache-size", "32MiB", env=env) as running:
        yield running


def at(url, kind="image_url"):
    return user(text("What is this?"), {"type": kind, kind: {"url": url}})


def test_every_way_has_an_expected_answer():
    assert set(SAYS) < set(EXPECTED)


@pytest.mark.parametrize("what", EXPECTED)
def test_what_a_host_does_is_told_with_the_place_and_costs_no_more_than_the_limits(service, host, what):
    status, kind, words = EXPECTED[what]
    answer = service.chat(at(f"{host}/{what.replace(' ', '%20')}"))
    error = answer.error
    assert (answer.status, error["type"], error["param"]) == (status, kind, PART), error
    assert words in error["message"]
    for secret in ("127.0.0.1", host.rpartition(":")[2], "Not here", "SSH"):
        assert secret not in error["message"]


@pytest.mark.parametrize("what", media())
def test_a_bomb_a_lie_or_a_half_that_a_host_sends_is_told_with_the_place_and_costs_no_process(service, host, what):
    medium, pids = media()[what], service.pids()
    assert len(medium.data) < MAX_MEDIUM
    answer = service.chat(at(f"{host}/{what.replace(' ', '%20')}", medium.kind))
    assert answer.status == medium.status, answer.body[:500]
    if medium.status != 200:
        assert answer.error["param"] == f"messages[0].content[1].{medium.kind}"
        assert re.search(medium.words, answer.error["message"]), answer.error
    assert service.pids() == pids


def test_nothing_is_left_of_all_that(service, host):
    (frontend,) = service.pids()["frontend"]
    bombs = [what for what, (status, _, _) in EXPECTED.items() if status == 413]
    before = private_bytes(frontend)
    for what in bombs * 3:
        assert service.chat(at(f"{host}/{what.replace(' ', '%20')}")).status == 413
    assert private_bytes(frontend) - before < 32 << 20
    service.quiet()
    eventually(lambda: service.metrics()["mmprep_media_bytes"] == 0, "no bytes of media held")
    expected = service.render(user(text("What is this?"), photo("cat.png")))["features"]
    assert expected["mm_hashes"]["image"]


@contextlib.contextmanager
def tls_host(certificate):
    """Serve the cat over TLS with a certificate of ``tests/data/tls``; give the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / f"{certificate}.pem")

    class Handler(Hostile):
        def setup(self):
            self.request = context.wrap_socket(self.request, server_side=True)

        def handle(self):
            self.request.recv(65536)
            self.request.sendall(whole(CAT))

        def finish(self):
            self.request.close()

    class Quiet(Server):
        def handle_error(self, *_):
            """Say nothing of those who do not trust us."""

    with Quiet(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("certificate", "name", "trusted"),
    [
        ("trusted", "localhost", True),
        ("trusted", "127.0.0.1", False),
        ("untrusted", "localhost", False),
        ("expired", "localhost", False),
    ],
    ids=["right", "of another name", "signed by nobody known", "expired"],
)
def test_a_host_with_a_certificate_that_does_not_prove_it_is_not_trusted(service, certificate, name, trusted):
    with tls_host(certificate) as port:
        answer = service.chat(at(f"https://{name}:{port}/cat.png"))
    if trusted:
        assert answer.status == 200
    else:
        error = answer.error
        assert (answer.status, error["type"], error["param"]) == (502, GATEWAY, PART)
        assert "TLS" in error["message"]


def test_a_host_that_speaks_no_tls_is_not_trusted(service, host):
    answer = service.chat(at(f"https://{host.removeprefix('http://')}/cat.png"))
    assert (answer.status, answer.error["type"], answer.error["param"]) == (502, GATEWAY, PART)
    assert "TLS" in answer.error["message"]
