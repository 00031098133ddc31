"""The budget of the bytes of media: what shares count, when they end, and from any thread."""

import gc
import threading

import pytest

from mmprep.errors import Busy
from mmprep_frontend.media.memory import MediaMemory


def test_what_is_above_the_budget_is_refused_and_counts_nothing():
    memory = MediaMemory(100)
    share = memory.share()
    share.grow(60)
    share.grow(40)
    with pytest.raises(Busy) as caught:
        share.grow(1)
    assert caught.value.retry_after
    assert memory.nbytes == 100


def test_a_share_counts_until_the_last_who_refers_to_it_is_gone():
    memory = MediaMemory(100)
    share = memory.share()
    share.grow(100)
    holders = [share, {"of another request": share}]
    del share
    holders.pop()
    assert memory.nbytes == 100
    holders.pop()
    assert memory.nbytes == 0
    memory.share().grow(100)
    assert memory.nbytes == 0


def test_a_share_may_end_in_the_middle_of_another_ones_growth():
    class EndsInTheMiddle(int):
        """A number of bytes in whose addition, with the lock held, the garbage collector finds another share."""

        def __radd__(self, other):
            gc.collect()
            return other + int(self)

    memory = MediaMemory(100)
    circle = {"share": memory.share()}
    circle["share"].grow(50)
    circle["itself"] = circle
    gc.disable()
    try:
        del circle
        growing = memory.share()
        growing.grow(EndsInTheMiddle(10))
    finally:
        gc.enable()
    assert memory.nbytes == 10


def test_shares_of_many_threads_come_out_even():
    memory = MediaMemory(1 << 30)
    start = threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(2000):
            share = memory.share()
            share.grow(3)
            share.grow(4)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.nbytes == 0


def test_pieces_that_end_in_an_error_count_no_more_though_the_error_is_kept():
    memory = MediaMemory(100)
    kept = None
    try:
        with memory.pieces() as pieces:
            pieces.add(bytes(60))
            pieces.add(bytes(41))
    except Busy as error:
        kept = error
    assert kept is not None
    assert memory.nbytes == 0


def test_pieces_join_in_their_order_and_count_as_long_as_they_are_referred_to():
    memory = MediaMemory(100)
    with memory.pieces() as pieces:
        for piece in (b"one ", b"two ", b"three"):
            pieces.add(piece)
        loaded = pieces.joined()
    assert (loaded.data, memory.nbytes) == (b"one two three", 13)
    del loaded, pieces
    assert memory.nbytes == 0
