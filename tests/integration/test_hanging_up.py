"""HTTP callers that hang up after addresses were leased for them: what nobody took up is given back at once."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial

import msgspec
import pytest
import zmq
from tests.integration.service import DATA, PATIENCE, environment, eventually, photo, serving, user

from mmprep import AsyncClient, Backend
from mmprep.card import ItemOptions
from mmprep.digest import Hasher
from mmprep.runtime import parse_endpoint
from mmprep.wire.messages import LeaseTo
from mmprep_frontend.dispatch import WriterLink
from mmprep_frontend.offered import OfferItem

#: Leases end by time only long after the tests.
LEASE_SECONDS = 3600

#: Asks, says so, and reads nothing of the answer.
CALLER = """
import signal, socket, sys
asking = socket.create_connection((sys.argv[1], int(sys.argv[2])))
asking.sendall(sys.stdin.buffer.read())
print("asked", flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def service():
    with serving("--frontends", 1, "--cache-size", "16MiB", "--lease-seconds", LEASE_SECONDS) as running:
        yield running


@pytest.fixture
def backend(service):
    with Backend(service.endpoint, id="engine") as backend:
        yield backend
        eventually(lambda: leases(service) == 0, "the end of all leases")


def leases(service):
    return next(one["leases"] for one in service.status()["backends"] if one["id"] == "engine")


def place(service):
    host, port = service.url.removeprefix("http://").rsplit(":", 1)
    return host, int(port)


def asking(kind):
    """Return a request for a leased address."""
    body = {"messages": user(photo("cat.png")), "mm_payload": "shm", "backend_id": "engine", "lease_kind": kind}
    encoded = json.dumps(body).encode()
    head = f"POST /v1/chat/completions/render HTTP/1.1\r\nHost: x\r\nContent-Length: {len(encoded)}\r\n\r\n"
    return head.encode() + encoded


KINDS = pytest.mark.parametrize("kind", ["copy", "view"])


@KINDS
@pytest.mark.usefixtures("backend")
def test_leases_of_an_answer_that_was_not_read_end_when_its_caller_hangs_up(service, kind):
    with socket.create_connection(place(service)) as caller:
        caller.sendall(asking(kind))
        eventually(lambda: leases(service) == 1, "the lease")
        assert caller.recv(1, socket.MSG_PEEK) == b"H"
    eventually(lambda: leases(service) == 0, "the end of the lease")


@pytest.mark.usefixtures("backend")
def test_leases_of_an_answer_that_was_not_read_end_when_its_caller_is_killed(service):
    command = [sys.executable, "-c", CALLER, *map(str, place(service))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), **pipes) as caller:
        caller.stdin.write(asking("view"))
        caller.stdin.close()
        assert caller.stdout.readline() == b"asked\n"
        eventually(lambda: leases(service) == 1, "the lease")
        caller.kill()
    eventually(lambda: leases(service) == 0, "the end of the lease")


@KINDS
@pytest.mark.usefixtures("backend")
def test_a_caller_that_hangs_up_before_its_answer_leaves_no_lease(service, kind):
    """It goes while the writer has the offer and the frontend stands still, which then hears of both at once."""
    (frontend,) = service.pids()["frontend"]
    service.render(user(photo("cat.png")))
    try:
        with service.standing_still():
            caller = socket.create_connection(place(service))
            caller.sendall(asking(kind))
            eventually(lambda: service.under_way() == 1, "the call's start")
            os.kill(frontend, signal.SIGSTOP)
            caller.close()
    finally:
        os.kill(frontend, signal.SIGCONT)
    service.quiet()


def given_up_as(call, happened, what):
    """Give a call up in the very step of the loop that takes in what ``happened`` while the loop stood still."""
    eventually(happened, what)
    asyncio.get_running_loop().call_soon(call.cancel)


@KINDS
def test_an_answer_that_comes_when_a_client_has_just_given_up_leaves_no_lease(service, kind):
    async def main():
        async with AsyncClient(service.endpoint, backend_id="engine") as client:
            chat = partial(client.chat, user(photo("cat.png")), payload="shm", lease_kind=kind)
            (await chat()).release()
            await asyncio.to_thread(eventually, lambda: leases(service) == 0, "the end of the first lease")
            asked = asyncio.create_task(chat())
            with service.standing_still():
                await asyncio.to_thread(eventually, lambda: service.under_way() == 1, "the call's start")
            given_up_as(asked, lambda: leases(service) == 1 and service.under_way() == 0, "the answer")
            with pytest.raises(asyncio.CancelledError):
                await asked
            await asyncio.to_thread(eventually, lambda: leases(service) == 0, "the end of the lease")

    asyncio.run(main())


@KINDS
@pytest.mark.usefixtures("backend")
def test_an_answer_that_comes_to_a_frontend_when_its_caller_has_just_gone_leaves_no_lease(service, kind):
    async def main():
        with zmq.Context() as context:
            link = WriterLink(
                context, parse_endpoint(service.endpoint), 9, hasher="blake3", inline_size=1, queue_size=1, on_card=bool
            )
            try:
                medium = (DATA / "cat.png").read_bytes()
                options = msgspec.msgpack.encode(ItemOptions("uint8"))
                item = OfferItem(
                    os.urandom(32), "image", medium, Hasher("blake3").content_digest(medium), options, 100_000
                )
                offer = partial(
                    link.offer,
                    [item],
                    need="tensors",
                    deadline=asyncio.get_running_loop().time() + PATIENCE,
                    priority=0,
                )
                (await offer()).release()
                with service.standing_still():
                    offered = asyncio.create_task(offer(lease=LeaseTo("engine", kind)))
                    for _ in range(3):  # it sends, and looks once for what has come
                        await asyncio.sleep(0)
                given_up_as(offered, lambda: leases(service) == 1, "the answer")
                with pytest.raises(asyncio.CancelledError):
                    await offered
                await asyncio.to_thread(eventually, lambda: leases(service) == 0, "the end of the lease")
            finally:
                link.close()

    asyncio.run(main())


@KINDS
def test_leases_of_an_answer_that_was_read_stay_when_its_caller_hangs_up(service, backend, kind):
    features = service.render(user(photo("cat.png")), mm_payload="shm", backend_id="engine", lease_kind=kind)[
        "features"
    ]
    (address,) = features["mm_addresses"]["image"]
    item = backend.open(address)
    assert item.address.lease == address["lease"]
    assert leases(service) == 1
    item.release()


@KINDS
def test_an_address_that_was_opened_holds_whatever_its_caller_has_read(service, backend, kind):
    """Two callers leave their answers unread. The first has looked at his, and what was leased for him is in use."""
    with socket.create_connection(place(service)) as first, socket.create_connection(place(service)) as second:
        for number, caller in enumerate((first, second), 1):
            caller.sendall(asking(kind))
            eventually(lambda wanted=number: leases(service) == wanted, "the lease")
        head, _, body = first.recv(1 << 20, socket.MSG_PEEK).partition(b"\r\n\r\n")
        assert b"Content-Length: %d\r\n" % len(body) in head + b"\r\n"
        (address,) = json.loads(body)["features"]["mm_addresses"]["image"]
        item = backend.open(address)
        assert item.address.lease == address["lease"]
        with item.view() as arrays:
            pixels = arrays["pixel_values"].copy()
            first.close()
            second.close()
            eventually(lambda: leases(service) == 1, "the end of the second lease")
            assert (arrays["pixel_values"] == pixels).all()
    assert backend.renew(address) == [True]
    item.release()
