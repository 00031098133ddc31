"""Waiting for real sockets and descriptors: what has come is never overlooked, also where its signal was used up."""

from __future__ import annotations

import os

import pytest
import zmq

from mmprep.wire.frames import readable, recv_frames, send_frames
from mmprep_worker.writer.waiting import Waiting

SOON = 20.0


@pytest.fixture
def pair():
    context = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    router.bind("inproc://waiting")
    dealer.connect("inproc://waiting")
    yield router, dealer
    router.close(0)
    dealer.close(0)
    context.term()


@pytest.fixture
def waiting():
    waiting = Waiting()
    yield waiting
    waiting.close()


def take_all(waiting, fd, socket, got):
    while readable(socket):
        got.append(recv_frames(socket, copy=True))
    waiting.emptied(fd)


def wait_until(waiting, got, number):
    while len(got) < number:
        handlers = waiting.wait(SOON)
        assert handlers, "nothing has come"
        for handle in handlers:
            handle()


def test_every_message_is_handed_over_whatever_is_sent_in_between(pair, waiting):
    router, dealer = pair
    got = []
    fd = waiting.add_socket(router, lambda: take_all(waiting, fd, router, got))
    for number in range(200):
        send_frames(dealer, [b"%d" % number])
        wait_until(waiting, got, number + 1)
        send_frames(router, [got[-1][0], b"answer"])
        waiting.used(fd)
    assert [frames[1] for frames in got] == [b"%d" % number for number in range(200)]


def test_a_message_whose_signal_was_used_up_by_sending_is_handed_over_at_once(pair, waiting):
    router, dealer = pair
    got = []
    fd = waiting.add_socket(router, lambda: take_all(waiting, fd, router, got))
    send_frames(dealer, [b"hello"])
    wait_until(waiting, got, 1)
    send_frames(dealer, [b"unsignalled"])
    assert router.poll(1000 * SOON)
    send_frames(router, [got[0][0], b"answer"])
    waiting.used(fd)
    (handle,) = waiting.wait(SOON)
    handle()
    assert got[-1][1] == b"unsignalled"
    assert waiting.wait(0.0) == []


def test_what_is_left_in_a_socket_is_handed_over_in_the_next_turn(pair, waiting):
    router, dealer = pair
    got = []

    def take_one():
        got.append(recv_frames(router, copy=True))
        if readable(router):
            waiting.used(fd)
        else:
            waiting.emptied(fd)

    fd = waiting.add_socket(router, take_one)
    for number in range(5):
        send_frames(dealer, [b"%d" % number])
    wait_until(waiting, got, 5)


def test_handlers_come_in_the_order_in_which_they_were_added(pair, waiting):
    order = []
    router, dealer = pair
    ends = [os.pipe() for _ in range(3)]
    waiting.add(ends[1][0], lambda: order.append("first"))
    waiting.add_socket(router, lambda: order.append("second"))
    waiting.add(ends[0][0], lambda: order.append("third"))
    for _, end in ends:
        os.write(end, b"x")
    send_frames(dealer, [b"x"])
    assert router.poll(1000 * SOON)
    for handle in waiting.wait(SOON):
        handle()
    assert order == ["first", "second", "third"]
    for pipe in ends:
        for end in pipe:
            os.close(end)


def test_a_descriptor_that_was_removed_is_not_waited_for_and_its_number_can_come_again(waiting):
    seen = []
    read, write = os.pipe()
    os.write(write, b"x")
    waiting.add(read, lambda: seen.append("former"))
    waiting.remove(read)
    assert waiting.wait(0.0) == []
    waiting.add(read, lambda: seen.append("next"))
    for handle in waiting.wait(SOON):
        handle()
    assert seen == ["next"]
    waiting.remove(read)
    os.close(read)
    os.close(write)
