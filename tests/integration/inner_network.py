"""Real services in a network of their own, and servers at every address there that tell which ones were dialled.

:class:`InnerNetwork` is the test's side: it asks one of the services for a chat with a URL, and hears what the service
answered, which addresses were dialled at the ports of the web meanwhile, and which names were asked for. The other side is
this module as a process inside (:mod:`tests.isolation`): web servers on all addresses, a name server whose answers the test
gives, and two services: ``strict`` with the default policy, ``lifted`` with ``--allow-private-networks``.

Every web server gives the cat, but: ``/to?<url>`` redirects to that URL. It closes each connection, so that each request
asks for the name again.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote

from tests import isolation
from tests.integration.service import DATA, ROOT, environment, serving, text, user

#: An address that the policy lets pass; in the namespace it is this machine's, as every other.
PUBLIC, PUBLIC_V6 = "93.184.215.14", "2606:2800:21f:cb07::14"
_CAT = (DATA / "cat.png").read_bytes()
_HTTP, _HTTPS, _DNS = 80, 443, 53
_TYPES = {1: socket.AF_INET, 28: socket.AF_INET6}

#: What a name means: a list of addresses for the first question of each family, the next one for the next, the last for ever.
Names = Mapping[str, Sequence[Sequence[str]]]


class Outcome(NamedTuple):
    """What came of one chat.

    Attributes
    ----------
    status, error: of the answer; ``error`` is ``None`` where it is 200.
    dialled: the addresses that were connected to, in order.
    asked: the names that were asked for, once a family.
    """

    status: int
    error: dict[str, Any] | None
    dialled: list[str]
    asked: list[str]


class InnerNetwork:
    """The test's side; made by :func:`inner_network`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.has_ipv6: bool = self._hear()["ipv6"]

    def chat(self, service: str, url: str, names: Names | None = None) -> Outcome:
        """Let ``strict`` or ``lifted`` fetch a picture from ``url``; ``names`` are all that there are."""
        orders = {"service": service, "url": url, "names": dict(names or {})}
        self._process.stdin.write(json.dumps(orders) + "\n")
        self._process.stdin.flush()
        return Outcome(**self._hear())

    def _hear(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        assert line, "the process in the network of its own has ended; its reason stands above"
        return json.loads(line)


@contextmanager
def inner_network() -> Iterator[InnerNetwork]:
    """Give a network with servers and services; needs what :func:`tests.isolation.why_not` tests for."""
    packages = environment()["PYTHONPATH"]
    process = subprocess.Popen(
        isolation.command(sys.executable, "-m", "tests.integration.inner_network"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment({"PYTHONPATH": os.pathsep.join((str(ROOT), packages))}),
    )
    with process:
        try:
            yield InnerNetwork(process)
        finally:
            process.stdin.close()
    assert process.returncode == 0


# --- inside -----------------------------------------------------------------------------------------------------------


class _Web(ThreadingHTTPServer):
    """A web server on all addresses of one family; notes the address of each connection before anything is read."""

    daemon_threads = True

    def __init__(self, family: socket.AddressFamily, port: int, dialled: list[str]) -> None:
        self.address_family = family
        self._dialled = dialled
        super().__init__(("0.0.0.0" if family == socket.AF_INET else "::", port), _Answers)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # Not the parent's: it asks for the name of its address.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "web", self.server_address[1]

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, peer = super().get_request()
        self._dialled.append(connection.getsockname()[0])
        return connection, peer

    def handle_error(self, *_: Any) -> None:
        """Say nothing of clients that hang up."""


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.send_response(302 if path == "/to" else 200)
        if path == "/to":
            self.send_header("Location", unquote(query))
        body = b"" if path == "/to" else _CAT
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class _Directory(threading.Thread):
    """A name server on 127.0.0.1 that says what it is told to, of RFC 1035 no more than that."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", _DNS))
        self.names: Names = {}
        self.asked: list[str] = []
        self._times: dict[tuple[str, int], int] = {}

    def tell(self, names: Names) -> None:
        self.names, self.asked, self._times = names, [], {}

    def run(self) -> None:
        while True:
            question, peer = self._socket.recvfrom(4096)
            self._socket.sendto(self._answer(question), peer)

    def _answer(self, question: bytes) -> bytes:
        labels, place = [], 12
        while question[place]:
            labels.append(question[place + 1 : place + 1 + question[place]])
            place += 1 + question[place]
        (kind,) = struct.unpack(">H", question[place + 1 : place + 3])
        name = b".".join(labels).decode().lower()
        self.asked.append(name)
        addresses = self._addresses(name, kind)
        found = 0 if name in self.names else 3
        head = question[:2] + struct.pack(">HHHHH", 0x8180 | found, 1, len(addresses), 0, 0)
        # Each answer: a pointer to the question's name, type, class, no time to live, the address.
        answers = (struct.pack(">HHHIH", 0xC00C, kind, 1, 0, len(a)) + a for a in addresses)
        return head + question[12 : place + 5] + b"".join(answers)

    def _addresses(self, name: str, kind: int) -> list[bytes]:
        family, turns = _TYPES.get(kind), self.names.get(name, [[]])
        turn = self._times.get((name, kind), 0)
        self._times[name, kind] = turn + 1
        matching = (a for a in turns[min(turn, len(turns) - 1)] if (":" in a) == (family == socket.AF_INET6))
        return [socket.inet_pton(family, address) for address in matching] if family else []


def _main() -> None:
    dialled: list[str] = []
    ipv6 = isolation.has_ipv6()
    families = [socket.AF_INET, socket.AF_INET6] if ipv6 else [socket.AF_INET]
    for family in families:
        for port in (_HTTP, _HTTPS):
            threading.Thread(target=_Web(family, port, dialled).serve_forever, daemon=True).start()
    names = _Directory()
    names.start()
    with ExitStack() as stack:
        small = ("--cache-size", "16MiB", "--frontends", 1)
        lifted = (*small, "--allow-private-networks")
        services = {"strict": stack.enter_context(serving(*small)), "lifted": stack.enter_context(serving(*lifted))}
        _say({"ipv6": ipv6})
        for line in sys.stdin:
            orders = json.loads(line)
            names.tell(orders["names"])
            dialled.clear()
            part = {"type": "image_url", "image_url": {"url": orders["url"]}}
            answer = services[orders["service"]].chat(user(text("?"), part))
            error = None if answer.status == 200 else answer.error
            _say({"status": answer.status, "error": error, "dialled": dialled, "asked": names.asked})


def _say(told: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(told), flush=True)  # noqa: T201 -- the protocol with the test


if __name__ == "__main__":
    _main()
