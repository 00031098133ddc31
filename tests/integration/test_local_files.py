"""Files below the allowed directory, on a real file system: what is read, and that nothing leads out of it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.service import eventually

from mmprep.errors import Busy, FetchError, Forbidden, MmprepError, TooLarge
from mmprep_frontend.media.files import LocalFiles
from mmprep_frontend.media.memory import MediaMemory
from mmprep_frontend.media.sources import FileSource, parse_source

PARAM = "messages[0].content[1].image_url"
LIMIT = 100_000
OUTSIDE = b"what lies outside"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    (root / "below" / "deep").mkdir(parents=True)
    (root / "below" / "deep" / "a.bin").write_bytes(b"inside")
    (tmp_path / "secret.bin").write_bytes(OUTSIDE)
    (tmp_path / "media-other").mkdir()
    (tmp_path / "media-other" / "secret.bin").write_bytes(OUTSIDE)
    return root


@pytest.fixture
def files(root: Path) -> Iterator[LocalFiles]:
    files = LocalFiles(str(root), LIMIT, MediaMemory(64 << 20))
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield files
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    files.close()


def read(files: LocalFiles, path: Path | str) -> bytes:
    source = parse_source(f"file://{path}", param=PARAM, max_bytes=LIMIT, local_files=True)
    assert isinstance(source, FileSource)
    with asyncio.Runner() as runner:
        return runner.run(files.read(source)).data


def refused(files: LocalFiles, path: Path | str) -> MmprepError:
    with pytest.raises(MmprepError) as caught:
        read(files, path)
    assert caught.value.param == PARAM
    assert "/" not in caught.value.message
    assert "secret" not in caught.value.message
    return caught.value


def test_a_file_is_read_by_the_directorys_given_name_and_by_its_real_one(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    files = LocalFiles(str(tmp_path / "link"), LIMIT, MediaMemory(64 << 20))
    for directory in (root, tmp_path / "link"):
        assert read(files, directory / "below/deep/a.bin") == b"inside"
    files.close()


def test_a_name_is_percent_decoded_once(files: LocalFiles, root: Path) -> None:
    (root / "a b%20?.bin").write_bytes(b"odd")
    assert read(files, f"{root}/a%20b%2520%3F.bin") == b"odd"


def test_what_is_not_below_the_directory_is_refused_without_a_look_at_it(files: LocalFiles, root: Path) -> None:
    for path in (root, root.parent / "secret.bin", root.parent / "media-other/secret.bin", "/etc/passwd", "/absent/x"):
        error = refused(files, path)
        assert type(error) is Forbidden
        assert (error.code, "--allowed-local-media-path" in error.message) == (400, True)


def test_no_link_is_followed_wherever_it_stands_and_wherever_it_leads(files: LocalFiles, root: Path) -> None:
    (root / "file").symlink_to(root.parent / "secret.bin")
    (root / "relative").symlink_to("../secret.bin")
    (root / "directory").symlink_to(root.parent)
    (root / "inner").symlink_to("below/deep/a.bin")
    (root / "loop").symlink_to("loop")
    (root / "magic").symlink_to("/proc/self/fd/0")
    for name in ("file", "relative", "directory/secret.bin", "inner", "loop", "magic"):
        assert type(refused(files, root / name)) is FetchError


def test_nothing_but_a_regular_file_is_opened(files: LocalFiles, root: Path) -> None:
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "socket"))
        for name in ("fifo", "socket", "below", "absent", "absent/x", "below/deep/a.bin/x", "n" * 300):
            assert type(refused(files, root / name)) is FetchError


def test_all_failures_below_the_directory_look_alike(files: LocalFiles, root: Path) -> None:
    (root / "link").symlink_to("/etc/passwd")
    messages = {refused(files, root / name).message for name in ("absent", "link", "below", "link/x")}
    assert len(messages) == 1


def test_a_device_is_refused() -> None:
    files = LocalFiles("/dev", LIMIT, MediaMemory(64 << 20))
    for name in ("zero", "null", "tty"):
        assert type(refused(files, f"/dev/{name}")) is FetchError
    files.close()


def test_the_limit_holds_before_reading_and_while_reading(files: LocalFiles, root: Path) -> None:
    (root / "exact").write_bytes(bytes(LIMIT))
    assert read(files, root / "exact") == bytes(LIMIT)
    with (root / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 40)
    assert "--max-media-size" in refused(files, root / "sparse").message
    assert type(refused(files, root / "sparse")) is TooLarge
    # Files of /proc say that they are empty, and are not.
    size = len(Path("/proc/self/maps").read_bytes())
    proc = LocalFiles("/proc", size // 4, MediaMemory(64 << 20))
    assert type(refused(proc, f"/proc/{os.getpid()}/maps")) is TooLarge
    proc.close()


def test_an_empty_file_is_an_error_of_its_own(files: LocalFiles, root: Path) -> None:
    (root / "empty").touch()
    error = refused(files, root / "empty")
    assert type(error) is FetchError
    assert "empty" in error.message


def test_a_name_that_changes_between_file_and_link_never_gives_what_lies_outside(files: LocalFiles, root: Path) -> None:
    (root / "inside").write_bytes(b"inside")
    (root / "good").mkdir()
    (root / "good" / "secret.bin").write_bytes(b"inside")
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            for target, name in (("../secret.bin", "file"), ("..", "directory")):
                (root / "new").symlink_to(target)
                (root / "new").rename(root / name)
            (root / "new").hardlink_to(root / "inside")
            (root / "new").rename(root / "file")
            (root / "directory").unlink()
            (root / "good").rename(root / "directory")
            (root / "directory").rename(root / "good")

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen = set()
    try:
        for _ in range(300):
            for name in ("file", "directory/secret.bin"):
                try:
                    seen.add(read(files, root / name))
                except FetchError:
                    seen.add(b"refused")
    finally:
        over.set()
        swapping.join()
    assert seen <= {b"inside", b"refused"}
    assert seen


def test_files_take_their_part_of_the_memory_and_are_refused_where_there_is_none(root: Path) -> None:
    memory = MediaMemory(9)
    files = LocalFiles(str(root), LIMIT, memory)
    others = memory.share()
    others.grow(4)
    assert type(refused(files, root / "below/deep/a.bin")) is Busy
    del others
    assert read(files, root / "below/deep/a.bin") == b"inside"
    eventually(lambda: memory.nbytes == 0, "the thread that has read it letting go")
    files.close()
