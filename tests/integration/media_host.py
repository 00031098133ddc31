"""A host of pictures that tells what it was asked, with the headers that a test wants."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.integration.service import DATA

CAT = (DATA / "cat.png").read_bytes()


class _Handler(BaseHTTPRequestHandler):
    """Gives the cat at every path but those with ``text`` in them; 304 to who has its tag; ``/moved/`` leads elsewhere."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("If-None-Match")))
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", f"http://{self.server.elsewhere}/{self.path.rpartition('/')[2]}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = b"no picture" if "text" in self.path else CAT
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        unchanged = self.headers.get("If-None-Match") == tag
        self.send_response(304 if unchanged else 200)
        self.send_header("ETag", tag)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        if not unchanged:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not unchanged:
            self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


class MediaHost(ThreadingHTTPServer):
    """The server.

    Attributes
    ----------
    url: without a path.
    elsewhere: the same host and port under another name, to which ``/moved/…`` redirects.
    asked: paths and ``If-None-Match`` of all requests.
    headers: of every answer.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str | None]] = []
        self.headers: dict[str, str] = {}
        self.elsewhere = f"localhost:{self.server_port}"
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def media_host() -> Iterator[MediaHost]:
    """Give a running host."""
    with MediaHost() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
