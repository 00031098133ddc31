"""Reads one answer of HTTP/1.1 as it comes: of known length, in chunks, or to the end of the connection. Pure.

A load test wants to know that an answer is whole and what its status is; of its body, which may be megabytes, only the
beginning is kept.
"""

from __future__ import annotations

from typing import Final

from mmprep.errors import ServiceUnavailable

#: Bytes of an answer's head, and of an answer, at most.
_MOST_HEAD: Final = 64 << 10
_MOST_BODY: Final = 1 << 30
#: A chunk's first line, and all lines behind the last chunk, are not longer.
_MOST_LINES: Final = 16 << 10
_BROKE: Final = "the connection broke before the answer was complete"


class Answer:
    """One answer.

    Parameters
    ----------
    keep:
        Bytes of the body that are kept.

    Attributes
    ----------
    status: 0 before the head is there.
    reusable: whether the connection can be used again, once the answer is whole.
    """

    def __init__(self, keep: int) -> None:
        self.status = 0
        self.reusable = False
        self._keep = keep
        self._kept: list[bytes] = []
        #: What has come of the head, or of a line between chunks.
        self._begun = b""
        #: Bytes of the body, or of the present chunk with the line's end behind it, that are to come; ``None``: not known.
        self._left: int | None = None
        self._total = 0
        self._chunked = self._last_chunk = False

    @property
    def body(self) -> bytes:
        """What is kept of the body."""
        return b"".join(self._kept)[: self._keep]

    def feed(self, data: bytes) -> bool:
        """Take what has come; return whether the answer is whole.

        Raises
        ------
        mmprep.errors.ServiceUnavailable
            It is not HTTP, or too long.
        """
        if not self.status:
            rest = self._read_head(data)
            if rest is None:
                return False
            data = rest
        if self._chunked:
            return self._read_chunks(data)
        self._take(data)
        if self._left is None:
            return False
        self._left -= len(data)
        if self._left < 0:  # nothing was asked that this could be an answer to
            self.reusable = False
        return self._left <= 0

    def end(self) -> None:
        """Take the connection's end for the answer's; raises ServiceUnavailable where more had to come."""
        if not self.status or self._chunked or self._left is not None:
            raise ServiceUnavailable(_BROKE)

    @property
    def begun(self) -> bool:
        """Whether anything has come."""
        return bool(self.status or self._begun)

    def _read_head(self, data: bytes) -> bytes | None:
        """Read the head; return what follows it, ``None`` where it is not there yet."""
        data = self._begun + data if self._begun else data
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0 or end > _MOST_HEAD:
                if len(data) > _MOST_HEAD:
                    raise _not_http()
                self._begun = data
                return None
            status, version, fields = _parse(data[:end])
            data = data[end + 4 :]
            if status >= 200:  # those below come before the answer
                break
        self._begun = b""
        self.status = status
        self.reusable = version == b"HTTP/1.1" and b"close" not in fields.get(b"connection", b"").lower()
        if status in {204, 304}:
            self._left = 0
        elif b"chunked" in fields.get(b"transfer-encoding", b"").lower():
            self._chunked = True
        elif b"content-length" in fields:
            self._left = _size(fields[b"content-length"], 10)
        else:
            self.reusable = False
        return data

    def _read_chunks(self, data: bytes) -> bool:
        while True:
            if self._left:
                piece = data[: self._left]
                data = data[len(piece) :]
                self._take(piece[: max(0, self._left - 2)])  # the last two are the line's end
                self._left -= len(piece)
                if self._left:
                    return False
            data, self._begun = self._begun + data, b""
            line, found, data = data.partition(b"\r\n")
            if not found:
                if len(line) > _MOST_LINES:
                    raise _not_http()
                self._begun = line
                return False
            if self._last_chunk:
                if not line:
                    self.reusable = self.reusable and not data
                    return True
                continue
            size = _size(line.partition(b";")[0].strip(), 16)
            self._last_chunk = not size
            self._left = size + 2 if size else 0

    def _take(self, data: bytes) -> None:
        if self._total < self._keep:
            self._kept.append(data)
        self._total += len(data)
        if self._total > _MOST_BODY:
            raise _too_long()


def _parse(head: bytes) -> tuple[int, bytes, dict[bytes, bytes]]:
    first, *lines = head.split(b"\r\n")
    version, _, rest = first.partition(b" ")
    if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise _not_http()
    fields = (line.partition(b":") for line in lines)
    return int(rest[:3]), version, {name.lower(): value.strip() for name, _, value in fields}


def _size(digits: bytes, base: int) -> int:
    try:
        size = int(digits, base)
    except ValueError:
        raise _not_http() from None
    if not 0 <= size <= _MOST_BODY:
        raise _too_long()
    return size


def _not_http() -> ServiceUnavailable:
    return ServiceUnavailable("the server's answer is not HTTP")


def _too_long() -> ServiceUnavailable:
    return ServiceUnavailable(f"the server's answer is longer than {_MOST_BODY:,} bytes")
