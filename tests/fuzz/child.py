"""A decoder in a process of its own, with a lane's limit of memory: one that crashes, hangs or eats memory is seen.

What is run is named as ``module:function``. It takes the bytes and returns an outcome; errors of the media tree and
MemoryError are outcomes too. Any other exception is what the parent raises. Messages both ways are bytes behind their
length in four.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.fuzzing import outcome_of

from mmprep.errors import DecodeError, MediaError, TooLarge, UnsupportedMedia

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = (DecodeError, UnsupportedMedia, TooLarge)
_LENGTH = struct.Struct("<I")


class Child:
    """The process; it starts with the first input, and again after its death.

    Parameters
    ----------
    decode:
        ``module:function``.
    data_limit:
        RLIMIT_DATA, in bytes.
    """

    def __init__(self, decode: str, data_limit: int) -> None:
        self._command = [sys.executable, "-m", "tests.fuzz.child", decode, str(data_limit)]
        self._process: subprocess.Popen[bytes] | None = None
        #: How often a process was started.
        self.starts = 0

    def run(self, data: bytes) -> str:
        """Return the outcome of one input.

        Raises
        ------
        AssertionError
            The decoder raised what it must not raise, or the process died.
        """
        process = self._process or self._start()
        try:
            _write(process.stdin, data)
            answer = _read(process.stdout)
        except BaseException:  # also where time is up: whatever hangs must not answer the next input
            self.close()
            raise
        if answer is None:
            status = process.wait()
            self.close()
            raise AssertionError(f"the process died: {_said(status)}")
        if answer.startswith(b"!"):
            raise AssertionError(answer[1:].decode())
        return answer.decode()

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [ROOT, *(ROOT / part for part in ("shared", "frontend", "worker"))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
        )
        self.starts += 1
        return self._process

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _said(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def _write(pipe: Any, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has died; reading tells
        pipe.write(_LENGTH.pack(len(data)) + data)
        pipe.flush()


def _read(pipe: Any) -> bytes | None:
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = pipe.read(length)
    return data if len(data) == length else None


def _outcome(decode: Callable[[bytes], str], data: bytes) -> str:
    try:
        return decode(data)
    except ALLOWED as error:
        return outcome_of(error)
    except MemoryError:
        return "MemoryError"
    except MediaError as error:
        return f"!an error of another kind: {error!r}"
    except Exception as error:  # noqa: BLE001 -- whatever it is, it is the finding
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        return f"!{type(error).__name__}: {error}\n{where}"


def main() -> None:
    """Answer inputs until the parent is gone."""
    module, _, name = sys.argv[1].partition(":")
    limit = int(sys.argv[2])
    decode = getattr(importlib.import_module(module), name)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (data := _read(sys.stdin.buffer)) is not None:
        _write(sys.stdout.buffer, _outcome(decode, data).encode())


if __name__ == "__main__":
    main()
