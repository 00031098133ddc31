"""Where prompts are made: who uses the tokenizer, on which thread, and in which turn of the loop."""

import asyncio
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmprep_frontend.render_thread import RenderThread


@pytest.fixture
def thread():
    made = RenderThread(ThreadPoolExecutor(1))
    yield made
    made.close()


def test_what_is_made_at_once_is_made_on_the_loop_and_all_else_on_the_thread(thread):
    async def main():
        here = threading.get_ident()
        assert await thread.at_once(threading.get_ident) == here
        assert await thread.run(threading.get_ident) != here

    asyncio.run(main())


def test_the_loop_does_not_wait_while_the_thread_is_at_work(thread):
    began, end = threading.Event(), threading.Event()

    def work():
        began.set()
        return end.wait(60)

    async def main():
        running = thread.run(work)
        await asyncio.to_thread(began.wait, 60)
        try:
            assert await thread.at_once(lambda: "made") is None
        finally:
            end.set()
        assert await running
        assert await thread.at_once(lambda: "made") == "made"

    asyncio.run(main())


def test_never_are_both_at_work(thread):
    at_work = threading.Lock()

    def work():
        assert at_work.acquire(blocking=False)
        try:
            hashlib.sha256(bytes(100_000)).digest()  # lets other threads run meanwhile
        finally:
            at_work.release()
        return True

    async def main():
        on_the_thread = [thread.run(work) for _ in range(50)]
        while not all(one.done() for one in on_the_thread):
            await thread.at_once(work)
        assert all(await asyncio.gather(*on_the_thread))
        assert await thread.at_once(work)

    asyncio.run(main())


def test_one_is_made_in_a_turn_of_the_loop_and_an_error_hinders_nobody(thread):
    async def main():
        loop, turns, made = asyncio.get_running_loop(), [0], []

        def count():
            turns[0] += 1
            nonlocal next_turn
            next_turn = loop.call_soon(count)

        next_turn = loop.call_soon(count)

        def work(number):
            made.append(turns[0])
            if number == 1:
                raise ValueError
            return number

        done = await asyncio.gather(*(thread.at_once(work, number) for number in range(5)), return_exceptions=True)
        next_turn.cancel()
        assert [type(result) for result in done] == [int, ValueError, int, int, int]
        assert len(set(made)) == 5

    asyncio.run(main())
