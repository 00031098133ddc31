"""The supervisor's desk and its frontends, on real sockets: what is to be forgotten is forgotten by all, or is not said to be."""

import asyncio

import msgspec
import pytest
import zmq
import zmq.asyncio

from mmprep.errors import ServiceUnavailable
from mmprep.metrics import ProcessReport, Snapshot
from mmprep.supervisor import desk as module
from mmprep.supervisor.desk import Desk
from mmprep.wire import messages
from mmprep.wire.codec import PROTOCOL, pack, unpack
from mmprep_frontend.supervision import SupervisorLink

REPORT = ProcessReport(1, Snapshot([], [], []), {"inflight": 0})


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/desk"


async def hears(socket):
    return unpack((await socket.recv_multipart())[0], messages.FromSupervisor)


def check(endpoint, main):
    """Run ``main`` with a link of frontend 0, what that has forgotten, the socket of a frontend 1 that was welcomed, and the desk."""

    async def run():
        context = zmq.asyncio.Context()
        desk = Desk(zmq.Context(context), endpoint, lambda: None, {})
        forgotten = []

        async def forget(cache):
            forgotten.append(cache)

        link = SupervisorLink(zmq.Context(context), endpoint, 0, lambda: REPORT, forget)
        other = context.socket(zmq.DEALER)
        other.linger = 0
        other.connect(endpoint)
        try:
            await other.send(pack(messages.Hello(PROTOCOL, "1", "frontend", "1", 1)))
            assert isinstance(await hears(other), messages.SupervisorWelcome)
            await main(link, forgotten, other, desk)
        finally:
            link.close()
            desk.close()
            other.close()
            context.destroy(linger=0)

    asyncio.run(run())


def test_a_cache_is_forgotten_when_every_frontend_has_said_so(endpoint):
    async def main(link, forgotten, other, _desk):
        asking = asyncio.create_task(link.let_all_forget("media"))
        asked = await hears(other)
        assert asked.cache == "media"
        assert not asking.done()
        await other.send(pack(messages.Done(asked.call)))
        await asking
        assert forgotten == ["media"]

    check(endpoint, main)


def test_a_frontend_that_does_not_answer_is_not_passed_over(endpoint, monkeypatch):
    monkeypatch.setattr(module, "_FORGET_SECONDS", 0.05)

    async def main(link, forgotten, other, _desk):
        with pytest.raises(ServiceUnavailable, match="not every frontend"):
            await link.let_all_forget("mm")
        late = await hears(other)
        await other.send(pack(messages.Done(late.call)))
        asking = asyncio.create_task(link.let_all_forget("mm"))
        await other.send(pack(messages.Done((await hears(other)).call)))
        await asking
        assert forgotten == ["mm", "mm"]

    check(endpoint, main)


def test_a_frontend_hears_that_the_whole_service_is_ready_also_one_that_comes_later(endpoint):
    async def main(link, _forgotten, other, desk):
        beginning = asyncio.create_task(desk.begin())
        assert await hears(other) == messages.StateChange(True, "")
        await other.send_multipart([pack(messages.Report((await hears(other)).call)), msgspec.json.encode(REPORT)])
        await beginning
        asking = asyncio.create_task(link.let_all_forget("mm"))
        await other.send(pack(messages.Done((await hears(other)).call)))
        await asking
        assert link.begun
        await other.send(pack(messages.Hello(PROTOCOL, "1", "frontend", "1", 1)))
        assert isinstance(await hears(other), messages.SupervisorWelcome)
        assert await hears(other) == messages.StateChange(True, "")

    check(endpoint, main)
