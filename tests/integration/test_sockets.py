"""Pump and Link over real sockets: order, bounds, fresh starts, and no message that lies unread."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from itertools import count

import pytest
import zmq

from mmprep.errors import Busy, InvalidRequest
from mmprep.wire.codec import CONTROL_LIMIT, MAX_FRAMES
from mmprep.wire.configured import configure, router
from mmprep.wire.sockets import Link, Pump


class Inbox:
    """What a socket received; :meth:`until` waits for it."""

    def __init__(self):
        self.messages = []
        self._changed = asyncio.Event()

    def __call__(self, frames):
        self.messages.append([bytes(frame) for frame in frames])
        self._changed.set()

    async def until(self, condition):
        while not condition(self.messages):
            self._changed.clear()
            await self._changed.wait()
        return self.messages

    async def holding(self, number):
        return await self.until(lambda messages: len(messages) >= number)


class Peer:
    """A Link with its inbox; it greets with ``hello`` and its number of greetings so far."""

    def __init__(self, context, endpoint, **options):
        self.inbox = Inbox()
        self.downs = Inbox()
        self.greetings = count(1)
        self.link = Link(
            context,
            endpoint,
            "test",
            greeting=lambda: [b"hello", b"%d" % next(self.greetings)],
            on_message=options.pop("on_message", self.inbox),
            on_down=lambda: self.downs([]),
            **options,
        )


@pytest.fixture
def run(runtime_dir):
    """Run a check on a loop; it gets a context, an endpoint, and a stack that closes what it enters."""

    def running(check):
        async def main():
            context = zmq.Context()
            try:
                with contextlib.ExitStack() as stack:
                    await check(context, f"ipc://{runtime_dir}/test.sock", stack)
            finally:
                context.destroy(linger=0)
                (runtime_dir / "test.sock").unlink(missing_ok=True)  # ZeroMQ leaves it

        asyncio.run(main())

    return running


def serve(context, endpoint, stack, handler, **options):
    limit = options.pop("frame_limit", CONTROL_LIMIT)
    pump = Pump(router(context, endpoint, frame_limit=limit), handler, **options)
    stack.callback(pump.close)
    return pump


def connect(context, endpoint, stack, **options):
    peer = Peer(context, endpoint, **options)
    stack.callback(peer.link.close)
    return peer


def test_messages_of_both_directions_arrive_in_order(run):
    async def check(context, endpoint, stack):
        inbox = Inbox()
        server = serve(context, endpoint, stack, inbox)
        peer = connect(context, endpoint, stack)
        (greeting,) = await inbox.holding(1)
        assert greeting[1:] == [b"hello", b"1"]
        number = 5000
        for index in range(number):
            peer.link.send([b"%d" % index])
            server.send([greeting[0], b"%d" % index, b"more"])
            if index % 1000 == 0:
                await asyncio.sleep(0)
        assert [m[1] for m in (await inbox.holding(number + 1))[1:]] == [b"%d" % index for index in range(number)]
        assert [m[0] for m in await peer.inbox.holding(number)] == [b"%d" % index for index in range(number)]
        assert peer.inbox.messages[0] == [b"0", b"more"]

    run(check)


def test_no_message_lies_unread_when_both_sides_answer_from_within_their_handlers(run):
    """The descriptor tells of a change once, and a send uses it up: every answer here is such a send."""

    async def check(context, endpoint, stack):
        inbox, number, width = Inbox(), 3000, 7

        def bounce(frames):
            inbox(frames)
            if frames[1] != b"hello":
                server.send(frames)

        def back(frames):
            peer.inbox(frames)
            if int(frames[0]) + width < number:
                peer.link.send([b"%d" % (int(frames[0]) + width)])

        server = serve(context, endpoint, stack, bounce)
        peer = connect(context, endpoint, stack, on_message=back)
        await inbox.holding(1)
        for index in range(width):
            peer.link.send([b"%d" % index])
        messages = await peer.inbox.holding(number)
        assert sorted(int(frames[0]) for frames in messages) == list(range(number))

    run(check)


def test_a_link_that_is_opened_before_its_other_side_greets_it_when_it_comes(run):
    async def check(context, endpoint, stack):
        peer = connect(context, endpoint, stack)
        peer.link.send([b"early"])
        inbox = Inbox()
        serve(context, endpoint, stack, inbox)
        messages = await inbox.holding(2)
        assert [frames[1:] for frames in messages] == [[b"hello", b"1"], [b"early"]]
        assert not peer.downs.messages

    run(check)


def test_what_waits_for_a_peer_is_bounded(run):
    async def check(context, endpoint, stack):
        socket = context.socket(zmq.DEALER)
        configure(socket)
        socket.connect(endpoint)  # nobody is there
        pump = Pump(socket, lambda _: None, outbox_bytes=1000)
        stack.callback(pump.close)
        for _ in range(10):
            pump.send([bytes(60), bytes(40)])
        with pytest.raises(Busy):
            pump.send([b"x"])
        inbox = Inbox()
        serve(context, endpoint, stack, inbox)
        assert len(await inbox.holding(10)) == 10
        pump.send([b"again"])
        assert (await inbox.holding(11))[-1][1:] == [b"again"]

    run(check)


def test_a_peer_that_does_not_read_is_busy_and_holds_up_no_other(run):
    async def check(context, endpoint, stack):
        inbox = Inbox()
        server = serve(context, endpoint, stack, inbox, outbox_bytes=1 << 20)
        slow = context.socket(zmq.DEALER)
        configure(slow)
        slow.rcvhwm = 1
        slow.routing_id = b"slow"
        slow.connect(endpoint)
        slow.send(b"here")
        stack.callback(slow.close, 0)
        await inbox.holding(1)
        sent = 0
        with contextlib.suppress(Busy):
            while True:
                server.send([b"slow", sent.to_bytes(8, "big") + bytes(1 << 13)])
                sent += 1
        peer = connect(context, endpoint, stack)
        identity = (await inbox.holding(2))[1][0]
        for index in range(100):
            server.send([identity, b"%d" % index])
        assert len(await peer.inbox.holding(100)) == 100
        # When it reads again it gets all that was taken for it, in order.
        reader = Inbox()
        stack.callback(Pump(slow, reader).close)
        messages = await reader.holding(sent)
        assert [int.from_bytes(frames[0][:8], "big") for frames in messages] == list(range(sent))

    run(check)


def test_a_peer_that_a_router_does_not_know_is_an_error_at_once(run):
    async def check(context, endpoint, stack):
        server = serve(context, endpoint, stack, Inbox())
        with pytest.raises(zmq.ZMQError) as caught:
            server.send([b"nobody", b"x"])
        assert caught.value.errno == errno.EHOSTUNREACH

    run(check)


def test_a_link_starts_afresh_when_the_other_side_goes_away(run):
    async def check(context, endpoint, stack):
        first, second = Inbox(), Inbox()
        server = serve(context, endpoint, stack, first)
        peer = connect(context, endpoint, stack)
        await first.holding(1)
        server.close()
        await peer.downs.holding(1)
        peer.link.send([b"for whoever comes"])
        serve(context, endpoint, stack, second)
        messages = await second.holding(2)
        assert [frames[1:] for frames in messages] == [[b"hello", b"2"], [b"for whoever comes"]]
        assert first.messages[0][0] != messages[0][0] == messages[1][0], "not a new identity"
        assert len(peer.downs.messages) == 1

    run(check)


def test_what_waited_for_a_peer_that_died_is_not_sent_to_the_next_one(run):
    async def check(context, endpoint, stack):
        first, second = Inbox(), Inbox()
        server = serve(context, endpoint, stack, first)
        peer = connect(context, endpoint, stack)
        await first.holding(1)
        server.close()
        # In one go, without a look at what happened meanwhile: the link does not know yet.
        for _ in range(100):
            peer.link.send([b"for the dead"])
        await peer.downs.holding(1)
        serve(context, endpoint, stack, second)
        peer.link.send([b"for the living"])
        messages = await second.until(lambda found: found and found[-1][1] == b"for the living")
        assert [frames[1:] for frames in messages] == [[b"hello", b"2"], [b"for the living"]]

    run(check)


def test_a_link_whose_loop_slept_through_the_change_sends_the_next_one_nothing_that_was_meant_for_the_dead(run):
    async def check(context, endpoint, stack):
        first, second = Inbox(), Inbox()
        server = serve(context, endpoint, stack, first)
        peer = connect(context, endpoint, stack)
        await first.holding(1)
        server.close()
        for _ in range(10):
            peer.link.send([b"for the dead"])
        socket = router(context, endpoint)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        # The loop stands still for so long that a socket that connects again by itself would have done it.
        assert not monitor.poll(300)
        socket.disable_monitor()
        monitor.close()
        stack.callback(Pump(socket, second).close)
        for _ in range(10):
            peer.link.send([b"for the dead"])
        await peer.downs.holding(1)
        peer.link.send([b"for the living"])
        messages = await second.until(lambda found: found and found[-1][1] == b"for the living")
        assert [frames[1:] for frames in messages] == [[b"hello", b"2"], [b"for the living"]]

    run(check)


def test_every_loss_is_told_once_however_often_the_other_side_comes_and_goes(run):
    async def check(context, endpoint, stack):
        peer = connect(context, endpoint, stack)
        identities = set()
        for life in range(1, 6):
            inbox = Inbox()
            server = serve(context, endpoint, stack, inbox)
            ((identity, *greeting),) = await inbox.holding(1)
            assert greeting == [b"hello", b"%d" % life]
            identities.add(identity)
            server.close()
            await peer.downs.holding(life)
        assert len(identities) == len(peer.downs.messages) == 5

    run(check)


def test_a_frame_above_the_limit_ends_its_connection_and_no_other(run):
    async def check(context, endpoint, stack):
        inbox = Inbox()
        server = serve(context, endpoint, stack, inbox)
        good, bad = connect(context, endpoint, stack), connect(context, endpoint, stack)
        await inbox.holding(2)
        bad.link.send([bytes(CONTROL_LIMIT + 1)])
        await bad.downs.holding(1)
        await inbox.until(lambda found: found[-1][1:] == [b"hello", b"2"])
        good.link.send([bytes(CONTROL_LIMIT)])
        await inbox.until(lambda found: found[-1][1] == bytes(CONTROL_LIMIT))
        assert not good.downs.messages
        server.send([inbox.messages[-1][0], b"answer"])
        assert await good.inbox.holding(1) == [[b"answer"]]

    run(check)


def test_a_message_of_too_many_frames_comes_cut_so_that_its_handler_can_refuse_it(run):
    async def check(context, endpoint, stack):
        inbox = Inbox()
        serve(context, endpoint, stack, inbox)
        peer = connect(context, endpoint, stack)
        peer.link.send([b"x"] * (MAX_FRAMES + 99))
        peer.link.send([b"next"])
        await inbox.until(lambda found: found and found[-1][1] == b"next")
        assert [len(frames) for frames in inbox.messages[1:]] == [MAX_FRAMES + 1, 2]

    run(check)


@pytest.mark.parametrize("error", [InvalidRequest("no"), ValueError("a bug")], ids=["refused", "bug"])
def test_a_message_that_its_handler_does_not_take_stops_nothing(run, error, caplog):
    async def check(context, endpoint, stack):
        inbox = Inbox()

        def handler(frames):
            inbox(frames)
            if frames[1] == b"bad":
                raise error

        serve(context, endpoint, stack, handler)
        peer = connect(context, endpoint, stack)
        for message in (b"bad", b"good"):
            peer.link.send([message])
        assert (await inbox.holding(3))[-1][1] == b"good"

    run(check)
    assert len(caplog.records) == 1


def test_large_frames_arrive_whole_without_a_copy(run):
    async def check(context, endpoint, stack):
        size, number = 8 << 20, 6
        received, frames_seen = [], []
        done = asyncio.Event()

        def handler(frames):
            frames_seen.extend(frames[1:])
            if len(frames) == 3 and len(frames[2]) == size:
                view = frames[2].buffer
                received.append((bytes(frames[1].buffer), len(view), view[0], view[-1]))
                if len(received) == number:
                    done.set()

        serve(context, endpoint, stack, handler, copy=False, frame_limit=size)
        peer = connect(context, endpoint, stack, copy=False)
        for index in range(number):
            peer.link.send([b"%d" % index, bytearray([index]) * size])
        await done.wait()
        assert received == [(b"%d" % index, size, index, index) for index in range(number)]
        assert all(isinstance(frame, zmq.Frame) for frame in frames_seen)

    run(check)


def test_frames_that_were_received_are_passed_on_as_they_are(run):
    async def check(context, endpoint, stack):
        def echo(frames):
            server.send(frames)

        server = serve(context, endpoint, stack, echo, copy=False, frame_limit=4 << 20)
        peer = connect(context, endpoint, stack, frame_limit=4 << 20)
        peer.link.send([b"small", bytes(3 << 20)])
        messages = await peer.inbox.holding(2)
        assert [list(map(len, frames)) for frames in messages] == [[5, 1], [5, 3 << 20]]

    run(check)


def test_after_closing_nothing_is_sent_received_or_told(run):
    async def check(context, endpoint, stack):
        inbox = Inbox()
        server = serve(context, endpoint, stack, inbox)
        peer = connect(context, endpoint, stack)
        other = connect(context, endpoint, stack)
        await inbox.holding(2)
        peer.link.close()
        peer.link.close()
        peer.link.send([b"x"])
        other.link.send([b"y"])
        assert (await inbox.holding(3))[-1][1] == b"y"
        server.close()
        server.close()
        server.send([b"test", b"x"])
        await other.downs.holding(1)
        assert not peer.downs.messages

    run(check)
