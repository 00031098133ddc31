"""One HTTP connection: errors below the application are JSON as well, and it is noticed who hangs up on an answer.

An answer that the kernel has taken is not an answer that was read. A client that has read to the end closes with a FIN; one
that was killed, or has lost interest, leaves something unread, and its kernel says so with a RST, also where it had closed
before the answer came. The state of the TCP connection tells the two apart, whatever the event loop calls the end; and where
that RST is still on its way, the bytes that the other kernel has not acknowledged do: whoever has read an answer has
acknowledged all of it before his FIN, and a closed socket acknowledges nothing.

It can be said wrongly that an answer was not read, where only the last bytes were left; so what is done then must do no
harm. Of a connection that this side closes first, as HTTP/1.0 and ``Connection: close`` want it, nothing is known.
"""

from __future__ import annotations

import logging
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable
from fcntl import ioctl
from typing import Final

from aiohttp import web

from mmprep.errors import InvalidRequest
from mmprep_frontend.http.answers import error_answer, internal_error, request_id_of, sign

_log = logging.getLogger(__name__)

#: Bytes of the request line, and of one header.
MAX_LINE: Final = 8190
MAX_HEADERS: Final = 100
#: Answers of one connection that are watched: those to pipelined requests, of which the last ones count.
_MOST_WATCHED: Final = 64
#: As in the kernel's ``tcp_states.h``: the other side has reset the connection.
_TCP_CLOSE: Final = 7
#: How many bytes were sent, and not acknowledged; see tcp(7).
_SIOCOUTQ: Final = termios.TIOCOUTQ


class Connection(web.RequestHandler):
    """A connection of the server."""

    #: What is to be called where the answers that were sent last are not read.
    _unread: deque[Callable[[], None]] | None = None

    def watch(self, unread: Callable[[], None]) -> None:
        """Call ``unread`` where the client hangs up before it has read all that was sent so far, and says nothing more."""
        if self.transport is None:  # the client has gone meanwhile
            unread()
            return
        if self._unread is None:
            self._unread = deque(maxlen=_MOST_WATCHED)
        self._unread.append(unread)

    def data_received(self, data: bytes) -> None:
        """Take in what the client says; who goes on has read what was answered before."""
        if data:  # without any, the library asks itself for what waits in its parser
            self._unread = None
        super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is over."""
        unread, self._unread = self._unread, None
        if unread and self._left_unread():
            for tell in unread:
                tell()
        super().connection_lost(exc)

    def _left_unread(self) -> bool:
        opened = None if self.transport is None else self.transport.get_extra_info("socket")
        if opened is None:
            return False
        try:
            state: bytes = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
            (unacknowledged,) = struct.unpack("i", ioctl(opened.fileno(), _SIOCOUTQ, bytes(4)))
        except OSError:
            return False
        return state[0] == _TCP_CLOSE or unacknowledged > 0

    def close_if_idle(self) -> bool:
        """Close the connection unless a request is being read or answered on it; return whether it is idle."""
        if self._request_in_progress or self._messages:
            return False
        self.close()
        return True

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002
    ) -> web.StreamResponse:
        """Answer what the application never saw: what is no HTTP, or a fault below it. The connection is closed."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun; no other can be sent")
        if status < 500:
            answer = error_answer(
                InvalidRequest(
                    "the request is not valid HTTP/1.1, or its line or a header is longer than "
                    f"{MAX_LINE:,} bytes, or it has more than {MAX_HEADERS} headers"
                )
            )
        else:
            _log.error("a request failed below the application", exc_info=exc)
            answer = internal_error()
        sign(answer, request_id_of(request))
        answer.force_close()
        return answer
