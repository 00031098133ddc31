"""Media that a request holds itself become bytes with a digest and the pixels of their headers, within what it may have."""

import asyncio
import base64
import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.pictures import HEIGHT, WIDTH, samples

from mmprep.digest import Hasher
from mmprep.errors import TooLarge
from mmprep_frontend.media.allowance import MediaLimits
from mmprep_frontend.media.files import LocalFiles
from mmprep_frontend.media.intake import Intake
from mmprep_frontend.media.memory import MediaMemory
from mmprep_frontend.render.conversation import MediaPart

PICTURES = [samples()[key] for key in (("PNG", "RGB"), ("JPEG", "4:2:0"), ("WEBP", "RGBA"))]
PIXELS = WIDTH * HEIGHT


def part(number, url):
    return MediaPart("image", url, f"part {number}")


def sent(data):
    return f"data:;base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def intake(tmp_path):
    """Give what makes an intake for two pictures; none of it fetches."""
    threads, files = ThreadPoolExecutor(2), LocalFiles(str(tmp_path), 10_000, MediaMemory(1 << 20))

    def make(*, request_bytes=100_000, request_pixels=2 * PIXELS):
        limits = MediaLimits(10_000, request_bytes, 10**6, request_pixels)
        return Intake(None, Hasher("sha256"), limits, threads, lambda _seconds: None, files=files)

    yield make
    threads.shutdown()
    files.close()


def read(intake, parts, attachments=()):
    async def main():
        deadline = asyncio.get_running_loop().time() + 60
        return await intake.read(intake.sources(parts, attachments), parts, deadline, bytes(32))

    return asyncio.run(main())


def test_media_have_their_digest_and_the_pixels_of_their_header(intake, tmp_path):
    (tmp_path / "picture").write_bytes(PICTURES[1])
    parts = [part(0, sent(PICTURES[0])), part(1, f"file://{tmp_path}/picture"), part(2, sent(b"no picture"))]
    found = read(intake(), parts)
    assert [medium.pixels for medium in found] == [PIXELS, PIXELS, 0]
    assert [bytes(medium.data) for medium in found] == [PICTURES[0], PICTURES[1], b"no picture"]
    assert [medium.digest for medium in found] == [hashlib.sha256(medium.data).digest() for medium in found]
    here = intake()
    now = here.read_now(here.sources(parts, ()))
    assert [medium and medium.pixels for medium in now] == [PIXELS, None, 0]


@pytest.mark.parametrize("at_once", [True, False])
def test_more_pixels_than_a_request_may_have_are_refused_with_the_part(intake, at_once):
    parts = [part(number, sent(data)) for number, data in enumerate(PICTURES)]
    here = intake()
    with pytest.raises(TooLarge, match="--max-request-image-pixels") as caught:
        here.read_now(here.sources(parts, ())) if at_once else read(here, parts)
    assert caught.value.param in {part.param for part in parts}
    if at_once:
        assert caught.value.param == "part 2"


def test_more_bytes_than_a_request_may_have_are_refused_before_anything_is_read(intake):
    attachments = [memoryview(data) for data in PICTURES]
    parts = [part(0, sent(PICTURES[0])), *(part(number, f"attachment:{number}") for number in (1, 2))]
    total = sum(map(len, PICTURES))
    assert len(intake(request_bytes=total).sources(parts, attachments)) == 3
    with pytest.raises(TooLarge, match=rf"{total - 1:,} bytes together.*--max-request-media-size") as caught:
        intake(request_bytes=total - 1).sources(parts, attachments)
    assert caught.value.param == "part 2"


def test_a_file_counts_before_it_is_read(intake, tmp_path):
    (tmp_path / "picture").write_bytes(PICTURES[1])
    parts = [part(0, sent(PICTURES[0])), part(1, f"file://{tmp_path}/picture")]
    with pytest.raises(TooLarge, match="--max-request-media-size") as caught:
        read(intake(request_bytes=len(PICTURES[0]) + len(PICTURES[1]) - 1), parts)
    assert caught.value.param == "part 1"
