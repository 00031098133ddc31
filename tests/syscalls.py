"""Taking system calls away from one thread, so that a test can prove that it does without them.

seccomp (linux/seccomp.h, linux/filter.h): a filter of the calling thread lets everything pass but the calls that open,
read at a place, write, sync, lock, rename, remove or look at files, which fail with EPERM. It holds for threads that this
one makes later, and cannot be taken back: use it in a process of the test's own. Plain ``read`` and ``write`` are left,
because loops wake up by them; a thread that cannot open a file has none to read.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

#: Calls by the numbers of each architecture: its own in linux/audit.h, theirs in its unistd.h.
_MACHINES = {
    "x86_64": (
        0xC000003E,
        {"open": 2, "creat": 85, "openat": 257, "openat2": 437, "stat": 4, "fstat": 5, "lstat": 6, "newfstatat": 262}
        | {"statx": 332, "access": 21, "faccessat": 269, "faccessat2": 439, "pread64": 17, "pwrite64": 18}
        | {"fsync": 74, "fdatasync": 75, "flock": 73, "truncate": 76, "ftruncate": 77, "fallocate": 285}
        | {"getdents": 78, "getdents64": 217, "readlink": 89, "readlinkat": 267, "rename": 82, "renameat": 264}
        | {"renameat2": 316, "mkdir": 83, "mkdirat": 258, "rmdir": 84, "link": 86, "linkat": 265, "unlink": 87}
        | {"unlinkat": 263, "symlink": 88, "symlinkat": 266, "chmod": 90, "fchmod": 91, "fchmodat": 268},
    ),
    "aarch64": (
        0xC00000B7,
        {"openat": 56, "openat2": 437, "newfstatat": 79, "fstat": 80, "statx": 291, "faccessat": 48, "faccessat2": 439}
        | {"pread64": 67, "pwrite64": 68, "fsync": 82, "fdatasync": 83, "flock": 32, "truncate": 45, "ftruncate": 46}
        | {"fallocate": 47, "getdents64": 61, "readlinkat": 78, "renameat": 38, "renameat2": 276, "mkdirat": 34}
        | {"linkat": 37, "unlinkat": 35, "symlinkat": 36, "fchmod": 52, "fchmodat": 53},
    ),
}
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000 | 1  # EPERM
_NUMBER, _ARCHITECTURE = 0, 4
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def known_machine() -> bool:
    """Whether the numbers of this machine's system calls are known here."""
    return platform.machine() in _MACHINES


def deny_files() -> None:
    """Let every call that concerns files fail with EPERM in this thread, for ever; raises OSError where that cannot be."""
    architecture, calls = _MACHINES[platform.machine()]
    steps = [(_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _ALLOW)]
    steps.append((_LOAD, 0, 0, _NUMBER))
    for number in calls.values():
        steps += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _FAIL)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    program = _Program(len(steps), code)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
