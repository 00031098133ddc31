"""Who waits for how a backend stands with the service is told of what comes, and of nothing that was there before."""

import asyncio

import pytest

from mmprep.errors import Busy, InvalidRequest
from mmprep.wire.standing import Standing


def waiting(standing, condition):
    return asyncio.create_task(standing.until(condition))


def test_who_waits_goes_on_when_what_he_waits_for_has_come():
    async def check():
        standing, come = Standing(), []
        waits = waiting(standing, lambda: bool(come))
        await asyncio.sleep(0)
        standing.note()  # something else
        await asyncio.sleep(0)
        assert not waits.done()
        come.append(1)
        standing.note()
        await waits

    asyncio.run(check())


def test_a_refusal_that_comes_meanwhile_is_raised_and_an_earlier_one_is_not():
    async def check():
        standing = Standing()
        standing.refusal = Busy("before")
        waits = waiting(standing, lambda: False)
        await asyncio.sleep(0)
        standing.note()
        await asyncio.sleep(0)
        assert not waits.done()
        standing.refusal = Busy("meanwhile")
        standing.note()
        with pytest.raises(Busy, match="meanwhile"):
            await waits

    asyncio.run(check())


def test_the_end_is_raised_unless_what_was_waited_for_is_there():
    async def check():
        standing = Standing()
        waits = waiting(standing, lambda: False)
        await asyncio.sleep(0)
        standing.closed = True
        standing.note()
        with pytest.raises(InvalidRequest, match="closed"):
            await waits
        await standing.until(lambda: True)

    asyncio.run(check())
