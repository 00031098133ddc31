import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmprep.kept import KeptFiles, cache_directory

KEY, DATA = bytes(32), b"machine code"


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "cache" / "kind"


@pytest.fixture
def files(directory):
    return KeptFiles(directory, 16)


def test_what_was_put_is_got_under_its_key_alone_by_every_process(files, directory):
    assert files.get(KEY) is None
    files.put(KEY, DATA)
    assert files.get(KEY) == KeptFiles(directory, 16).get(KEY) == DATA
    assert files.get(bytes([1]) * 32) is None
    files.put(KEY, b"")
    assert files.get(KEY) == b""


@pytest.mark.parametrize("damaged", [b"", DATA, b"x" * 31, b"x" * 40])
def test_a_damaged_file_is_as_if_it_were_not_there(damaged, files, directory):
    files.put(KEY, DATA)
    path = directory / KEY.hex()
    path.write_bytes(damaged)
    assert files.get(KEY) is None
    files.put(KEY, DATA)
    assert files.get(KEY) == DATA


def test_what_others_may_write_is_as_if_it_were_not_there(files, directory, tmp_path):
    files.put(KEY, DATA)
    path = directory / KEY.hex()
    for suspect in (path, directory):
        mode = suspect.stat().st_mode
        suspect.chmod(mode | 0o020)
        assert files.get(KEY) is None
        suspect.chmod(mode)
    assert files.get(KEY) == DATA
    other = path.rename(tmp_path / "elsewhere")
    path.symlink_to(other)
    assert files.get(KEY) is None
    path.unlink()
    os.mkfifo(path)
    assert files.get(KEY) is None
    path.unlink()
    moved = directory.rename(tmp_path / "moved")
    directory.symlink_to(moved)
    files.put(KEY, DATA)
    assert files.get(KEY) is None
    assert list(moved.iterdir()) == []


def test_the_files_are_this_users_alone(files, directory):
    files.put(KEY, DATA)
    assert [found.stat().st_mode & 0o077 for found in (directory / KEY.hex(), directory)] == [0, 0]


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path):
    (tmp_path / "file").touch()
    for files in (KeptFiles(tmp_path / "file" / "kind", 16), KeptFiles(None, 16)):
        files.put(KEY, DATA)
        assert files.get(KEY) is None
        with files.alone():
            pass


def test_few_are_kept_and_those_stay_that_were_used_last(files, directory):
    keys = [bytes([number]) * 32 for number in range(20)]
    for number, key in enumerate(keys):
        files.put(key, DATA)
        os.utime(directory / key.hex(), ns=(number, number))
        assert files.get(keys[0])
    assert [key for key in keys if files.get(key)] == [keys[0], *keys[5:]]


def test_another_process_waits_until_this_one_is_done_or_dead(directory):
    code = (
        "import sys; from pathlib import Path; from mmprep.kept import KeptFiles\n"
        "with KeptFiles(Path(sys.argv[1]), 16).alone():\n    print('alone', flush=True); input()"
    )
    command = [sys.executable, "-c", code, directory]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"alone\n"
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as waiting:
            os.set_blocking(waiting.stdout.fileno(), False)
            assert not waiting.stdout.read()
            holder.kill()
            os.set_blocking(waiting.stdout.fileno(), True)
            assert waiting.stdout.readline() == b"alone\n"
            waiting.communicate(b"\n")
    assert waiting.returncode == 0


def test_the_place_is_that_of_the_users_caches(monkeypatch, tmp_path):
    assert cache_directory({"XDG_CACHE_HOME": "/var/c"}) == Path("/var/c/mmprep")
    monkeypatch.setenv("HOME", str(tmp_path))
    for environment in ({}, {"XDG_CACHE_HOME": "relative"}):
        assert cache_directory(environment) == tmp_path / ".cache" / "mmprep"
