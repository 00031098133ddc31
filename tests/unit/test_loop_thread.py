"""Asking a loop on another thread, without a task."""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from mmprep.errors import Busy, InvalidRequest
from mmprep.loop_thread import LoopThread


@pytest.fixture
def thread():
    thread = LoopThread("test")
    yield thread
    if not thread.stopped:
        thread.stop()


def on_loop(thread, work):
    async def run():
        return work()

    return thread.run(run())


def test_what_is_told_on_the_loop_is_returned_and_an_error_raised(thread):
    def soon(told):
        on_loop(thread, lambda: asyncio.get_running_loop().call_soon(lambda: told(threading.get_ident())))

    def at_once(told):
        told(Busy("full"))

    def broken(_):
        raise InvalidRequest("not so")

    assert thread.ask(soon, None, seconds=20) == on_loop(thread, threading.get_ident)
    with pytest.raises(Busy, match="full"):
        thread.ask(at_once, None, seconds=20)
    with pytest.raises(InvalidRequest, match="not so"):
        thread.ask(broken, lambda: None, seconds=20)


def test_who_waits_no_more_is_told_nothing_and_the_wait_is_ended_on_the_loop(thread):
    ended, tell = [], []

    with pytest.raises(TimeoutError):
        thread.ask(tell.append, lambda: ended.append(threading.get_ident()), seconds=0.01)
    assert on_loop(thread, lambda: list(ended)) == [on_loop(thread, threading.get_ident)]
    on_loop(thread, lambda: tell[0]("late"))


def test_an_interrupt_ends_the_wait(thread):
    ended = []

    def interrupts(_):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        thread.ask(interrupts, lambda: ended.append(True), seconds=20)
    assert on_loop(thread, lambda: list(ended)) == [True]


def test_one_that_was_stopped_says_so(thread):
    thread.stop()
    with pytest.raises(InvalidRequest, match="closed"):
        thread.ask(print, None, seconds=20)
