"""The C library's allocator, told to keep memory for the next request.

By default each large buffer is mapped, faulted in page by page and given back: for an answer with a picture's tensors that
is a third of its cost, for decoding a small picture a fifth.
"""

from __future__ import annotations

import ctypes

#: mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
#: Larger buffers are mapped whatever is asked for.
_LARGEST = 32 << 20


def keep_memory(nbytes: int, *, arenas: int | None = None) -> None:
    """Take buffers up to 32 MiB from the heap, of which ``nbytes`` are kept while they are free; to be called at the start.

    Parameters
    ----------
    arenas:
        Most heaps; ``None``: as many as threads want, each of which keeps as much.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, other C libraries do not
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST)
    mallopt(_M_TRIM_THRESHOLD, nbytes)
    if arenas is not None:
        mallopt(_M_ARENA_MAX, arenas)
