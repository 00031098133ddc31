"""Memory for received tensors: where it lies, how much of it there may be, and when it is given back."""

import asyncio

import numpy as np
import pytest

from mmprep.errors import Busy, LeaseLost, TooLarge
from mmprep.remote.received import Memory, Received, aligned


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 1 << 20])
def test_memory_begins_where_tensors_do_and_is_as_long_as_asked_for(nbytes):
    region = aligned(nbytes)
    assert len(region) == nbytes
    assert not nbytes or np.frombuffer(region, np.uint8).ctypes.data % 64 == 0


def test_what_finds_no_room_waits_for_it_and_is_refused_where_there_never_is_any_or_not_in_time():
    async def work():
        memory = Memory(10)
        await memory.take(6, None)
        with pytest.raises(TooLarge, match="receive_limit"):
            await memory.take(11, None)
        with pytest.raises(Busy):
            await memory.take(5, 0.001)
        waiting = [asyncio.create_task(memory.take(5, None)) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await asyncio.to_thread(memory.give, 6)
        await asyncio.gather(*waiting)
        assert memory.used == 10

    asyncio.run(work())


def test_received_tensors_are_given_up_once_and_arrays_of_them_stay():
    released = []
    received = Received(memoryview(bytearray(b"abcd")), lambda: released.append(1))
    view = np.frombuffer(received.hold_now(), np.uint8)
    copied = received.copy()
    assert not view.flags.writeable
    copied[0] = 0
    received.release()
    received.release()
    assert released == [1]
    assert bytes(view) == b"abcd"
    for use in (received.copy, received.hold_now):
        with pytest.raises(LeaseLost):
            use()
    forgotten = Received(memoryview(b"abcd"), lambda: released.append(2))
    del forgotten
    assert released == [1, 2]
