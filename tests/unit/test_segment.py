import gc
import mmap
import os
import secrets
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmprep.errors import StaleAddress, StartupError
from mmprep.segment import Segment, free_space, segment_name, segments_of, sibling_name, unlink

MiB = 2**20


@pytest.fixture
def name():
    name = segment_name(secrets.token_hex(4), secrets.token_bytes(16))
    yield name
    unlink(name)


@pytest.fixture
def segment(name):
    with Segment.create(name, 4 * MiB) as segment:
        yield segment
    segment.unlink()


def shm_file(name):
    return Path("/dev/shm") / name.removeprefix("/")


def test_a_name_holds_the_user_the_runtime_directory_and_the_epoch():
    assert segment_name("0badcafe", bytes(range(16))) == f"/mmprep-{os.geteuid()}-0badcafe-00010203"


def test_a_sibling_belongs_to_the_same_runtime_directory_and_differs_in_the_epoch_alone():
    ours = segment_name("0badcafe", bytes(16))
    assert sibling_name(ours, bytes(range(16))) == segment_name("0badcafe", bytes(range(16)))
    assert sibling_name("/mmprep-1234-0badcafe-deadbeef", b"\xff" * 16) == "/mmprep-1234-0badcafe-ffffffff"


def test_a_new_segment_is_private_reserved_and_zero(segment):
    status = shm_file(segment.name).stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == segment.size == len(segment.buffer) == 4 * MiB
    assert status.st_blocks * 512 == 4 * MiB
    assert not np.frombuffer(segment.buffer, np.uint8).any()


def resident_kib(name):
    smaps = Path("/proc/self/smaps").read_text()
    return int(smaps.split(f"/dev/shm{name}\n")[1].split("Rss:")[1].split()[0])


def test_the_pages_of_a_new_segment_are_touched(segment):
    assert resident_kib(segment.name) == 4 * 1024


def test_the_pages_are_touched_on_a_kernel_without_populate(monkeypatch, name):
    monkeypatch.setattr("mmprep.segment._MADV_POPULATE_WRITE", 9999)  # EINVAL, as an older kernel answers
    with Segment.create(name, 4 * MiB + 1) as segment:
        assert resident_kib(name) == 4 * 1024 + mmap.PAGESIZE // 1024
        assert not np.frombuffer(segment.buffer, np.uint8).any()


def test_a_reader_sees_what_the_creator_writes(segment):
    with Segment.attach(segment.name) as reader:
        segment.buffer[1000:1005] = b"hello"
        assert bytes(reader.buffer[1000:1005]) == b"hello"
        assert reader.size == segment.size


def test_a_reader_cannot_write(segment):
    with Segment.attach(segment.name) as reader:
        assert reader.buffer.readonly
        assert not np.frombuffer(reader.buffer, np.uint8).flags.writeable
        with pytest.raises(TypeError):
            reader.buffer[0] = 1


def test_a_filler_can_write_when_it_says_so(segment):
    with Segment.attach(segment.name, writable=True) as filler:
        filler.buffer[5] = 7
    assert segment.buffer[5] == 7


def test_attaching_to_a_segment_that_is_gone_is_a_stale_address(name):
    with pytest.raises(StaleAddress):
        Segment.attach(name)


def test_attaching_to_a_segment_that_has_no_memory_yet_is_a_stale_address(name):
    shm_file(name).touch(mode=0o600)
    with pytest.raises(StaleAddress, match="not ready"):
        Segment.attach(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_users_segment_cannot_be_attached(segment):
    code = f"""
import os
from mmprep.errors import ServiceUnavailable
from mmprep.segment import Segment
os.setuid(65534)
try:
    Segment.attach({segment.name!r})
except ServiceUnavailable as error:
    print(error)
"""
    assert "another user" in in_child(code)


def test_a_name_that_exists_is_refused_and_left_alone(segment):
    segment.buffer[0] = 42
    with pytest.raises(StartupError, match="exists already"):
        Segment.create(segment.name, MiB)
    assert segment.buffer[0] == 42
    assert shm_file(segment.name).stat().st_size == 4 * MiB


def test_closing_does_not_fail_while_arrays_of_it_live(segment):
    reader = Segment.attach(segment.name)
    segment.buffer[64] = 9
    array = np.frombuffer(reader.buffer, np.uint8)
    part = reader.buffer[64:128]
    reader.close()
    assert array[64] == part[0] == 9


def test_the_mapping_goes_with_the_last_view(segment):
    def mappings():
        return Path("/proc/self/maps").read_text().count(f"/dev/shm{segment.name}\n")

    reader = Segment.attach(segment.name)
    array = np.frombuffer(reader.buffer, np.uint8)
    reader.close()
    assert mappings() == 2
    del array
    gc.collect()
    assert mappings() == 1


def test_a_closed_segment_gives_no_buffer_and_closes_again(segment):
    reader = Segment.attach(segment.name)
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        _ = reader.buffer
    assert "closed" in repr(reader)


def test_unlinking_twice_is_no_error_and_readers_read_on(segment):
    with Segment.attach(segment.name) as reader:
        segment.unlink()
        segment.unlink()
        segment.buffer[3] = 3
        assert reader.buffer[3] == 3
        with pytest.raises(StaleAddress):
            Segment.attach(segment.name)


def test_a_process_that_attached_and_ended_leaves_the_segment(segment):
    in_child(f"from mmprep.segment import Segment; print(Segment.attach({segment.name!r}).size)")
    assert shm_file(segment.name).exists()


def test_segments_are_found_by_their_runtime_directory():
    here, there = secrets.token_hex(4), secrets.token_hex(4)
    names = sorted(segment_name(here, secrets.token_bytes(16)) for _ in range(2))
    others = [segment_name(there, b"0000"), names[0] + "-not-ours", f"/mmprep-{os.geteuid() + 1}-{here}-00000000"]
    try:
        for name in [*names, *others]:
            shm_file(name).touch()
        assert segments_of(here) == names
    finally:
        for name in [*names, *others]:
            unlink(name)


def test_a_segment_larger_than_what_is_free_is_refused_before_anything_is_made(name):
    space = free_space()
    assert space is not None
    with pytest.raises(StartupError) as caught:
        Segment.create(name, space[0] + 1024 * MiB)
    assert "--cache-size" in caught.value.message
    assert "free of" in caught.value.message
    assert not shm_file(name).exists()


def in_child(code, *prefix):
    """Run ``code`` in a new interpreter, behind the command ``prefix``, and return what it printed."""
    result = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


SMALL_SHM = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=8m none /dev/shm && exec "$@"', "sh"]
needs_mounts = pytest.mark.skipif(
    subprocess.run([*SMALL_SHM, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs the right to mount a file system of its own",
)


@needs_mounts
def test_a_small_shared_memory_file_system_is_an_error_that_says_what_to_do():
    code = """
from pathlib import Path
from mmprep.errors import StartupError
from mmprep.segment import Segment
try:
    Segment.create("/mmprep-0-00000000-00000000", 16 * 2**20)
except StartupError as error:
    print(error)
print([entry.name for entry in Path("/dev/shm").iterdir()])
"""
    message, entries = in_child(code, *SMALL_SHM).splitlines()
    assert "16 MiB are needed, /dev/shm has 8 MiB free of 8 MiB" in message
    assert "--cache-size" in message
    assert "--shm-size" in message
    assert entries == "[]"


@needs_mounts
def test_memory_that_vanishes_between_the_check_and_the_reservation_leaves_no_segment():
    # The check is told that there is room, as if another process had taken the rest right after it.
    code = """
from pathlib import Path
from mmprep import segment
from mmprep.errors import StartupError
segment._check_space = lambda size: None
try:
    segment.Segment.create("/mmprep-0-00000000-00000000", 16 * 2**20)
except StartupError as error:
    print(type(error.__cause__).__name__, error.__cause__.errno, error)
print([entry.name for entry in Path("/dev/shm").iterdir()])
"""
    message, entries = in_child(code, *SMALL_SHM).splitlines()
    assert message.startswith("OSError 28 shared memory is too small: 16 MiB")
    assert entries == "[]"


@needs_mounts
def test_a_segment_may_fill_the_file_system_to_the_last_page():
    code = """
from mmprep.segment import Segment
with Segment.create("/mmprep-0-00000000-00000000", 8 * 2**20) as segment:
    segment.buffer[-1] = 1
    print(segment.size)
"""
    assert in_child(code, *SMALL_SHM) == f"{8 * MiB}\n"
