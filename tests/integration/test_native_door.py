"""The native door's bounds over real sockets, before a service that is as small as the door allows."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager

import msgspec
import pytest
import zmq
from tests.integration.service import environment

from mmprep import __version__
from mmprep.errors import Busy, TooLarge
from mmprep.metrics import Metrics
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep.wire.configured import configure
from mmprep.wire.sockets import Pump
from mmprep_frontend.native import NativeDoor
from mmprep_frontend.room import Room

LARGE = 32 << 20

#: Asks, says so, and reads the answer when it is told to.
CLIENT = """
import sys
import zmq
from mmprep import __version__
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL, pack

socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
socket.send(pack(messages.Hello(PROTOCOL, __version__, "client", "c", 1)))
socket.recv_multipart()
socket.send_multipart([pack(messages.Request(1, "tokenize")), b"{}"])
print("asked", flush=True)
print(sum(map(len, socket.recv_multipart())), flush=True)
sys.stdin.read()
"""


class Counter:
    """A service whose answers come when a test lets them."""

    def __init__(self):
        self.metrics = Metrics()
        self.inflight = 0
        self.began = asyncio.Event()
        self.go_on = asyncio.Event()
        self.answer = "done"

    async def tokenize(self, _body, _attachments):
        self.began.set()
        await self.go_on.wait()
        return msgspec.json.encode({"answer": self.answer})


class Asker:
    """A client of one door."""

    def __init__(self, context, endpoint):
        socket = context.socket(zmq.DEALER)
        configure(socket, frame_limit=-1)
        socket.connect(endpoint)
        self.answers = asyncio.Queue()
        self.pump = Pump(socket, self.answers.put_nowait)
        self.pump.send([pack(messages.Hello(PROTOCOL, __version__, "client", "c", os.getpid()))])

    async def welcomed(self):
        assert isinstance(unpack((await self.answers.get())[0], messages.FromFrontend), messages.FrontendWelcome)
        return self

    def ask(self, call, *frames):
        self.pump.send([pack(messages.Request(call, "tokenize")), *frames])

    async def error(self):
        message = unpack((await self.answers.get())[0], messages.FromFrontend)
        assert isinstance(message, messages.Failed)
        return message.fault.error()


@asynccontextmanager
async def door(runtime_dir, room):
    context = zmq.Context()
    endpoint = f"ipc://{runtime_dir}/frontend-0.sock"
    service = Counter()
    opened = NativeDoor(
        context,
        endpoint,
        service,
        service,
        resets=service,
        injecting=service,
        max_body_size=LARGE,
        room=room,
        refusal=lambda: None,
    )
    opened.open()
    asker = Asker(context, endpoint)
    try:
        yield service, await asker.welcomed(), endpoint
    finally:
        service.go_on.set()
        await opened.close(1.0)
        asker.pump.close()
        context.destroy(linger=0)
        (runtime_dir / "frontend-0.sock").unlink()


async def until(condition):
    """Wait for what sends no event; the watchdog bounds it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def test_requests_are_bounded_together_with_those_of_other_doors(runtime_dir):
    async def main():
        room = Room(max_requests=2)
        async with door(runtime_dir, room) as (service, asker, _):
            with room.enter():
                asker.ask(1, b"{}")
                await service.began.wait()
                asker.ask(2, b"{}")
                assert isinstance(await asker.error(), Busy)
                service.go_on.set()
                assert (await asker.answers.get())[1] == msgspec.json.encode({"answer": "done"})
                await until(lambda: room.requests == 1)
            asker.ask(2, b"{}")
            assert len(await asker.answers.get()) == 2

    asyncio.run(main())


def test_bytes_of_requests_and_their_attachments_are_bounded_and_given_back(runtime_dir):
    async def main():
        room = Room(max_body_bytes=1500)
        async with door(runtime_dir, room) as (service, asker, _):
            asker.ask(1, b"{}", bytes(998))
            await service.began.wait()
            asker.ask(2, b"{}", bytes(499))
            assert isinstance(await asker.error(), Busy)
            asker.ask(3, b"{}", bytes(1499))
            assert isinstance(await asker.error(), TooLarge)
            asker.pump.send([pack(messages.Cancel(1))])
            await until(lambda: room.requests == 0)
            assert room.body_bytes == 0
            service.go_on.set()
            asker.ask(4, b"{}", bytes(499))
            assert len(await asker.answers.get()) == 2

    asyncio.run(main())


def test_a_request_that_is_cancelled_with_its_arrival_holds_nothing(runtime_dir):
    async def main():
        room = Room()
        async with door(runtime_dir, room) as (service, asker, _):
            for call in range(1, 50):
                asker.ask(call, b"{}")
                asker.pump.send([pack(messages.Cancel(call))])
            service.go_on.set()
            asker.ask(99, b"{}")
            while unpack((await asker.answers.get())[0], messages.FromFrontend) != messages.Response(99):
                pass
            await until(lambda: room.requests == 0)
            assert room.body_bytes == 0

    asyncio.run(main())


def started(endpoint):
    command = [sys.executable, "-c", CLIENT, endpoint]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())


def stop(process):
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL], ids=["reads in the end", "is killed"])
def test_an_answer_counts_as_held_until_its_client_has_read_it_or_is_gone(runtime_dir, end):
    async def main():
        room = Room(max_answer_bytes=LARGE)
        async with door(runtime_dir, room) as (service, asker, endpoint):
            service.answer = "x" * LARGE
            client = started(endpoint)
            assert await asyncio.to_thread(client.stdout.readline) == "asked\n"
            await service.began.wait()
            stop(client)
            service.go_on.set()
            await until(lambda: room.requests == 0)
            assert room.answer_bytes > LARGE
            service.answer = "y" * 100
            asker.ask(1, b"{}")
            assert isinstance(await asker.error(), Busy)
            client.send_signal(end)
            await until(lambda: room.answer_bytes == 0)
            if end == signal.SIGCONT:
                assert int(await asyncio.to_thread(client.stdout.readline)) > LARGE
            client.communicate()

    asyncio.run(main())
