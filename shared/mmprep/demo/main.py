"""The course of the demonstration, from the first process to the last."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mmprep import embedded
from mmprep.cli.desk import DeskClient
from mmprep.demo import steps
from mmprep.demo.interrupts import Interrupted, Interrupts
from mmprep.demo.page import Check, Page
from mmprep.demo.processes import (
    HOST,
    BackendProcess,
    Service,
    choose_cache_size,
    choose_port,
    runtime_directory,
)
from mmprep.demo.requests import QUESTION, HttpClient, chat
from mmprep.errors import MmprepError, ServiceUnavailable
from mmprep.sizes import format_duration, format_size

_PORT = 8790
#: Seconds between two looks at a service that starts, and for leases to be gone that were released.
_LOOK = 0.5
_RELEASE_SECONDS = 10.0


def main(argv: list[str]) -> int:
    """Run the demonstration; returns the exit status.

    Parameters
    ----------
    argv:
        ``--once``, ``--port``, ``--runtime-dir``.
    """
    parser = argparse.ArgumentParser(
        prog="run", description="Start the service on the embedded model and show its work."
    )
    parser.add_argument(
        "--once", action="store_true", help="stop after the demonstration; status 0: every step was right"
    )
    parser.add_argument("--port", type=int, default=_PORT, help="of the service; 0: a free one (default: %(default)s)")
    parser.add_argument("--runtime-dir", metavar="DIR", help="for sockets and locks (default: the one of mmprep serve)")
    options = parser.parse_args(argv)
    if not 0 <= options.port < 65536:
        parser.error("--port: a number from 0 to 65535")
    page = Page()
    interrupts = Interrupts()
    try:
        with ExitStack() as stack:
            Demonstration(page, interrupts, stack).run(options)
        return int(page.failed > 0)
    except Interrupted as interrupted:
        page.heading("Stopped.")
        return 128 + interrupted.number
    except MmprepError as error:
        page.checks([Check(False, "stopped", error.message)])
        return 1
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class Demonstration:
    """One run; the service that it starts is ended by ``stack``."""

    def __init__(self, page: Page, interrupts: Interrupts, stack: ExitStack) -> None:
        self._page = page
        self._interrupts = interrupts
        self._stack = stack
        self._photos = embedded.photos()
        self._names = [photo.name for photo in self._photos]

    def run(self, options: argparse.Namespace) -> None:
        """Start, demonstrate, and keep serving unless told ``--once`` or a check failed."""
        # The reader leaves before the service stops, which then finds its runtime directory empty.
        with ExitStack() as readers:
            with self._interrupts.held():
                backend = readers.enter_context(BackendProcess())
            pictures = [str(photo) for photo in self._photos]
            backend.send(do="prepare", model=str(embedded.path()), pictures=pictures)
            service = self._start_service(options)
            http = readers.enter_context(HttpClient(HOST, service.port))
            self._demonstrate(service, backend, http)
        failed = self._page.failed
        self._page.heading(f"{failed} of the checks above FAILED." if failed else "Every step was right.")
        if not options.once and not failed:
            self._keep_serving(service)

    # --- the service ----------------------------------------------------------------------------------------------

    def _start_service(self, options: argparse.Namespace) -> Service:
        page = self._page
        page.heading("The service")
        with self._interrupts.held():
            directory, why_directory = self._stack.enter_context(runtime_directory(options.runtime_dir))
        port, why_port = choose_port(options.port) if options.port == _PORT else (options.port, None)
        size, why_size = choose_cache_size()
        for why in (why_directory, why_port, why_size):
            if why is not None:
                page.note("note", why)
        with self._interrupts.held():
            service = self._stack.enter_context(Service(directory, port, size))
        started = time.monotonic()
        told = ""
        while not service.port:
            line = service.line(_LOOK)
            if line is not None:
                page.note("", line)
                continue
            progress = _progress(directory)
            if progress != told:
                page.note(f"after {format_duration(round(time.monotonic() - started, 1))}", progress)
                told = progress
        return service

    def _keep_serving(self, service: Service) -> None:
        try:
            self._tell_how_to_use(service)
            while True:
                line = service.line(3600)
                if line is not None:
                    self._page.note("", line)
        except Interrupted:
            self._page.heading("Stopping the service.")

    def _tell_how_to_use(self, service: Service) -> None:
        page = self._page
        url = f"http://{HOST}:{service.port}"
        page.heading("Serving, until Ctrl-C")
        page.note("HTTP", f"{url}  (/health, /ready, /metrics, /v1/models)")
        page.note("native", f"ipc://{service.runtime_dir}")
        page.note("status", f"{_command('mmprep')} status --runtime-dir {shlex.quote(service.runtime_dir)}")
        page.heading("A request of your own; this one asks for hashes and ranges alone:")
        page.heading(_curl(url, self._photos[0]))

    # --- the steps ------------------------------------------------------------------------------------------------

    def _demonstrate(self, service: Service, backend: BackendProcess, http: HttpClient) -> None:
        page = self._page
        page.heading("A second process, in the role of an engine")
        processor = backend.receive()["processor"]
        page.note("reference", f"it has processed the photographs with transformers' {processor}, to compare with")
        registered = backend.call(do="register", endpoint=f"ipc://{service.runtime_dir}", id=f"demo-{os.getpid()}")
        page.note("registered", f"process {registered['pid']} as backend {registered['id']!r}")

        page.heading(f"A chat with {len(self._photos)} photographs over HTTP, twice ({QUESTION!r})")
        before = http.metrics()
        body = chat(self._photos, registered["id"])
        first, first_seconds = http.render(body)
        second, second_seconds = http.render(body)
        for number, name in enumerate(self._names):
            for subject, text in steps.describe(name, first, number):
                page.note(subject, text)
        for subject, text in steps.times(first_seconds, second_seconds):
            page.note(subject, text)
        page.checks(steps.prompt(first, len(self._photos), _image_token_id()))
        page.checks(steps.same_answer(first, second))
        page.checks(steps.counters(before, http.metrics(), len(self._photos)))

        page.heading("What the backend process read at those addresses")
        page.checks([steps.mapping(Path(f"/proc/{backend.pid}/maps").read_text(encoding="utf-8"), _segment(first))])
        for answer, which in ((first, ""), (second, " again")):
            found = backend.call(do="compare", addresses=answer["features"]["mm_addresses"]["image"])["items"]
            page.checks(steps.tensors([name + which for name in self._names], answer, found, processor))
        page.checks([self._release(backend, http)])

    def _release(self, backend: BackendProcess, http: HttpClient) -> Check:
        held = steps.leases(http.metrics())
        released = backend.call(do="release")["released"]
        deadline = time.monotonic() + _RELEASE_SECONDS
        # Releases are collected for a moment and sent together, so the leases end soon, not at once.
        while (left := steps.leases(http.metrics())) and time.monotonic() < deadline:
            time.sleep(0.02)
        return Check(held == released and not left, "released", f"{released} of {held} leases; {left} hold now")


def _progress(runtime_dir: str) -> str:
    """Return how far a service has come that is starting."""
    try:
        with DeskClient(runtime_dir) as desk:
            status: dict[str, Any] = desk.status()
    except (ServiceUnavailable, KeyError):
        return "starting"
    lanes, frontends = status.get("lanes", []), status["frontends"]
    if "ring" not in status:
        return "making the ring"
    warm = sum(lane["state"] != "starting" for lane in lanes)
    ready = sum(frontend["ready"] for frontend in frontends)
    return (
        f"ring of {format_size(status['ring']['capacity'])}, {warm} of {len(lanes)} lanes warm, "
        f"{ready} of {len(frontends)} frontends ready"
    )


def _segment(answer: dict[str, Any]) -> str:
    name: str = answer["features"]["mm_addresses"]["image"][0]["segment"]
    return name


def _image_token_id() -> int:
    config = json.loads((embedded.path() / "config.json").read_bytes())
    number: int = config["image_token_id"]
    return number


def _command(name: str) -> str:
    """Return how a command of this environment is called from here."""
    path = Path(sys.executable).with_name(name)
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))


def _curl(url: str, photo: Path) -> str:
    """Return a shell command that sends a picture."""
    return f"""{{ printf '{{"mm_payload": "none", "messages": [{{"role": "user", "content": ['
  printf '{{"type": "image_url", "image_url": {{"url": "data:image/jpeg;base64,%s"}}}}, ' "$(base64 -w0 {shlex.quote(str(photo))})"
  printf '{{"type": "text", "text": "What is this?"}}]}}]}}'
}} | curl -s {url}/v1/chat/completions/render -H 'Content-Type: application/json' --data-binary @-"""
