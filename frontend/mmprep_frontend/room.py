"""What all requests of a frontend may hold while they are under way, through whichever door they came: their number, the
bytes of their bodies and media, and the bytes of their answers.

What is held counts until the answer has left for the client, because a client that does not read keeps it in memory.
Used on the event loop only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Self

from mmprep.errors import Busy, TooLarge

#: Seconds after which a client that was told that all is full may try again.
RETRY_AFTER: Final = 1.0


class Room:
    """The bounds, and what is held.

    Parameters
    ----------
    max_requests:
        Requests under way.
    max_body_bytes:
        Of all their bodies, attachments included.
    max_answer_bytes:
        Of all their answers. One answer alone may be larger: what a request may hold in the ring bounds it.
    """

    def __init__(
        self, *, max_requests: int = 1024, max_body_bytes: int = 512 << 20, max_answer_bytes: int = 512 << 20
    ) -> None:
        self._max_requests = max_requests
        self._max_body_bytes = max_body_bytes
        self._max_answer_bytes = max_answer_bytes
        self.requests = 0
        self.body_bytes = 0
        self.answer_bytes = 0

    def enter(self) -> Held:
        """Let a request in; raises :class:`~mmprep.errors.Busy` where too many are under way."""
        if self.requests >= self._max_requests:
            raise Busy("too many requests are under way; try again", retry_after=RETRY_AFTER)
        self.requests += 1
        return Held(self)

    def resize_body(self, old: int, new: int) -> None:
        """Count ``new`` bytes for ``old`` ones; see :meth:`Held.hold_body`."""
        if new > self._max_body_bytes:
            raise TooLarge(
                f"the request and its media have more than {self._max_body_bytes:,} bytes, this service's limit; send less "
                "in one request"
            )
        if new > old and self.body_bytes + new - old > self._max_body_bytes:
            raise Busy("the bodies of other requests fill this service's memory; try again", retry_after=RETRY_AFTER)
        self.body_bytes += new - old

    def resize_answer(self, old: int, new: int) -> None:
        """Count ``new`` bytes for ``old`` ones; see :meth:`Held.hold_answer`."""
        others = self.answer_bytes - old
        if new > old and others and others + new > self._max_answer_bytes:
            raise Busy(
                "answers on their way to other clients fill this service's memory; try again, or take the tensors by "
                "address",
                retry_after=RETRY_AFTER,
            )
        self.answer_bytes = others + new


class Held:
    """What one request holds; made by :meth:`Room.enter`. A context manager that gives all of it back."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._inside = True
        self.body_bytes = 0
        self._answer_bytes = 0

    def hold_body(self, nbytes: int) -> None:
        """Hold ``nbytes`` of body.

        Raises
        ------
        mmprep.errors.Busy
            All bodies together would be above the bound.
        mmprep.errors.TooLarge
            This one alone is.
        """
        self._room.resize_body(self.body_bytes, nbytes)
        self.body_bytes = nbytes

    def hold_answer(self, nbytes: int) -> None:
        """Hold ``nbytes`` of answer; before encoding, what encoding will take.

        Raises
        ------
        mmprep.errors.Busy
            All answers together would be above the bound.
        """
        self._room.resize_answer(self._answer_bytes, nbytes)
        self._answer_bytes = nbytes

    def hand_over(self, nbytes: int) -> Callable[[], None]:
        """Let so many of the answer's bytes outlive this; return what gives them back, to be called once."""
        self._answer_bytes -= nbytes
        return partial(self._room.resize_answer, nbytes, 0)

    def leave(self) -> None:
        """Give everything back; again is no error."""
        if self._inside:
            self._inside = False
            self._room.requests -= 1
            self.hold_body(0)
            self.hold_answer(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
