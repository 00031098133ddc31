"""What the media of one request have together is bounded, whatever comes first, and from several threads."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.pictures import FOREIGN, HEIGHT, WIDTH, samples

from mmprep.errors import TooLarge
from mmprep_frontend.media.allowance import Allowance, MediaLimits

PIXELS = WIDTH * HEIGHT
PICTURE = samples()["PNG", "RGB"]


def allowance(*, request_bytes=1000, picture_pixels=10**6, request_pixels=10**6):
    return Allowance(MediaLimits(500, request_bytes, picture_pixels, request_pixels))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 600))))
def test_the_last_size_of_each_medium_counts(steps):
    given_to, sizes = allowance(), {}
    for number, size in steps:
        sizes[number] = size
        if sum(sizes.values()) > 1000:
            with pytest.raises(TooLarge, match=r"more than 1,000 bytes together.*--max-request-media-size") as caught:
                given_to.hold(number, f"part {number}", size)
            assert caught.value.param == f"part {number}"
            return
        given_to.hold(number, f"part {number}", size)


def test_exactly_the_limit_is_within_it():
    given_to = allowance(request_pixels=2 * PIXELS)
    given_to.hold(0, None, 400)
    given_to.hold(1, None, 600)
    assert [given_to.take_pixels(PICTURE, None) for _ in range(2)] == [PIXELS] * 2
    with pytest.raises(
        TooLarge, match=rf"more than {2 * PIXELS:,} pixels together.*--max-request-image-pixels"
    ) as caught:
        given_to.take_pixels(PICTURE, "here")
    assert caught.value.param == "here"


def test_one_picture_above_its_own_limit_is_told_that_one():
    with pytest.raises(TooLarge, match=rf"the picture has {PIXELS} pixels.*--max-image-pixels") as caught:
        allowance(picture_pixels=PIXELS - 1, request_pixels=1).take_pixels(PICTURE, "here")
    assert caught.value.param == "here"


def test_what_is_no_picture_or_a_broken_one_has_no_pixels_here():
    given_to = allowance(request_pixels=1)
    for data in (*FOREIGN.values(), PICTURE[:20], memoryview(PICTURE)[:8]):
        assert given_to.take_pixels(data, None) == 0


def test_several_threads_do_not_get_more_than_one_would():
    given_to, refused = allowance(request_bytes=1000), []
    together = threading.Barrier(8)

    def take(number):
        together.wait()
        for size in range(1, 201):
            try:
                given_to.hold(number, None, size)
            except TooLarge:
                refused.append((number, size))
                return

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused
    held = sum(given_to._bytes.values())
    assert held == given_to._total
    assert held - len(refused) <= 1000 < held + 1
