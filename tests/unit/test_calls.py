"""Calls under way: each gets one outcome, and those that nobody awaits leave nothing behind."""

from __future__ import annotations

import asyncio

import pytest

from mmprep.errors import Busy, ServiceUnavailable, StaleAddress
from mmprep.wire import calls as module
from mmprep.wire.calls import CallTable, WriterLostError


def run(check):
    asyncio.run(check(CallTable()))


def test_a_call_gets_its_outcome_and_what_comes_later_is_passed_over():
    async def check(calls):
        number, future = calls.open()
        calls.resolve(number, "answer")
        calls.resolve(number, StaleAddress("late"))
        calls.resolve(number, "later")
        assert await future == "answer"
        assert len(calls) == 0

    run(check)


def test_an_error_is_raised_where_the_call_is_awaited():
    async def check(calls):
        number, future = calls.open()
        calls.resolve(number, StaleAddress("gone"))
        with pytest.raises(StaleAddress, match="gone"):
            await future

    run(check)


def test_numbers_are_never_used_again():
    async def check(calls):
        numbers = []
        for _ in range(5):
            number, _ = calls.open()
            calls.forget(number)
            numbers.append(number)
        assert numbers == sorted(set(numbers))
        assert numbers[0] > 0, "0 stands for no call"

    run(check)


def test_an_outcome_for_a_call_that_is_unknown_or_was_cancelled_is_passed_over():
    async def check(calls):
        calls.resolve(99, "answer")
        number, future = calls.open()
        future.cancel()
        calls.resolve(number, "answer")
        assert future.cancelled()
        assert len(calls) == 0

    run(check)


def test_forgetting_says_whether_the_call_was_under_way():
    async def check(calls):
        number, future = calls.open()
        assert calls.forget(number)
        assert not calls.forget(number)
        calls.resolve(number, "answer")
        assert not future.done()

    run(check)


def test_when_the_other_side_is_gone_every_call_under_way_fails_by_itself():
    async def check(calls):
        futures = [calls.open()[1] for _ in range(3)]
        calls.fail_all(ServiceUnavailable, "the writer went away")
        raised = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(error) for error in raised] == [ServiceUnavailable] * 3
        assert len({id(error) for error in raised}) == 3, "one exception raised in several tasks mixes their tracebacks"
        assert len(calls) == 0

    run(check)


def test_the_number_of_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_MOST_CALLS", 2)

    async def check(calls):
        first, _ = calls.open()
        calls.open()
        with pytest.raises(Busy):
            calls.open()
        calls.forget(first)
        calls.open()

    run(check)


def test_a_call_whose_connection_is_lost_is_made_anew_and_its_answer_is_that_to_the_last_try():
    async def check(calls):
        said = []

        def say(number):
            said.append(number)
            lost = len(said) < 3
            calls.resolve(number, WriterLostError("lost") if lost else "answer")

        async def connected():
            return None

        assert await calls.ask(say, connected, seconds=60, silence="silence") == "answer"
        assert len(set(said)) == len(said) == 3
        assert len(calls) == 0

    run(check)


def test_a_call_that_is_not_answered_in_its_time_is_told_so_and_forgotten():
    async def check(calls):
        async def connected():
            return None

        with pytest.raises(ServiceUnavailable, match="nobody answers") as caught:
            await calls.ask(lambda _: None, connected, seconds=0.001, silence="nobody answers")
        assert caught.value.retry_after == 1.0
        assert len(calls) == 0

    run(check)


def test_of_a_call_for_which_nobody_waits_the_outcome_is_told():
    async def check(calls):
        told = []
        calls.begin(lambda number: calls.resolve(number, "answer"), lambda done: told.append(done.result()))
        await asyncio.sleep(0)
        assert told == ["answer"]

    run(check)


async def asked(calls, unwanted):
    """Make a call, and return the task that waits for it, and its number."""
    sent = asyncio.get_running_loop().create_future()

    async def connected():
        pass

    asking = calls.ask(sent.set_result, connected, seconds=60.0, silence="none", unwanted=unwanted.append)
    task = asyncio.create_task(asking)
    return task, await sent


@pytest.mark.parametrize("comes", ["before", "after"])
def test_an_answer_that_comes_when_its_caller_has_gone_is_handed_to_whoever_ends_it(comes):
    async def check(calls):
        unwanted = []
        asking, number = await asked(calls, unwanted)
        if comes == "before":  # in the very same moment
            calls.resolve(number, "lease")
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        if comes == "after":
            assert unwanted == []
            assert calls.resolve(number, "lease")
        assert unwanted == ["lease"]
        assert len(calls) == 0

    run(check)


def test_an_error_that_comes_when_its_caller_has_gone_is_nobodys():
    async def check(calls):
        unwanted = []
        asking, _ = await asked(calls, unwanted)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        calls.fail_all(WriterLostError, "gone")
        assert (unwanted, len(calls)) == ([], 0)

    run(check)
