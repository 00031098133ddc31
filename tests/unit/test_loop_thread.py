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
        asyncio.get_running_loop().call_soon(told, threading.get_ident())
        return lambda: None

    def at_once(told):
        told(Busy("full"))
        return lambda: None

    def broken(_):
        raise InvalidRequest("not so")

    assert thread.ask(soon, seconds=20) == on_loop(thread, threading.get_ident)
    with pytest.raises(Busy, match="full"):
        thread.ask(at_once, seconds=20)
    with pytest.raises(InvalidRequest, match="not so"):
        thread.ask(broken, seconds=20)


def test_who_waits_no_more_is_told_nothing_and_the_wait_is_ended_on_the_loop(thread):
    ended, tell = [], []

    def never(told):
        tell.append(told)
        return lambda: ended.append(threading.get_ident())

    with pytest.raises(TimeoutError):
        thread.ask(never, seconds=0.01)
    assert on_loop(thread, lambda: list(ended)) == [on_loop(thread, threading.get_ident)]
    on_loop(thread, lambda: tell[0]("late"))


def test_an_interrupt_ends_the_wait(thread):
    ended = []

    def interrupts(_):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return lambda: ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        thread.ask(interrupts, seconds=20)
    assert on_loop(thread, lambda: list(ended)) == [True]


def test_one_that_was_stopped_says_so(thread):
    thread.stop()
    with pytest.raises(InvalidRequest, match="closed"):
        thread.ask(lambda told: told, seconds=20)
