"""Tensors that travel inline: what found no shared memory, on its way from a lane to the frontends that wait for it.

A transfer is reserved when its lane is told to send, filled by the lane's one frame, and then held by the calls that were
answered with it until their frontends say that they have it, or are gone. The frame is passed on untouched; nothing of it
is cached. All transfers together stay within a budget of bytes, from their reservation on.

A transfer has the number of its flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class Transfer:
    """One item's tensors.

    Attributes
    ----------
    number: of the flight that computes it.
    nbytes: of the tensor region.
    meta: the packed metadata.
    frame: the tensor region as the lane sent it, ``None`` until then.
    flying: its flight has not ended, so more calls may come to hold it.
    holders: the calls that need it.
    """

    __slots__ = ("flying", "frame", "holders", "meta", "nbytes", "number")

    def __init__(self, number: int, nbytes: int, meta: bytes) -> None:
        self.number = number
        self.nbytes = nbytes
        self.meta = meta
        self.frame: Any = None
        self.flying = True
        self.holders: set[str] = set()


class Transfers:
    """The table.

    Parameters
    ----------
    max_bytes:
        Of all transfers together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        #: Of all transfers, reserved ones too.
        self.nbytes = 0
        #: Filled since the start.
        self.filled = 0
        self._transfers: dict[int, Transfer] = {}

    def __len__(self) -> int:
        return len(self._transfers)

    def __iter__(self) -> Iterator[Transfer]:
        return iter(self._transfers.values())

    def reserve(self, number: int, nbytes: int, meta: bytes) -> Transfer | None:
        """Reserve for a flight's tensors; ``None`` where the budget does not allow it at the moment."""
        if not self.max_bytes or self.nbytes + nbytes > self.max_bytes:
            return None
        assert number not in self._transfers, f"transfer {number} is reserved twice"
        transfer = self._transfers[number] = Transfer(number, nbytes, meta)
        self.nbytes += nbytes
        return transfer

    def fill(self, transfer: Transfer, frame: Any) -> None:
        """Take the tensors from the lane."""
        transfer.frame = frame
        self.filled += 1

    def hold(self, transfer: Transfer, holder: str) -> None:
        """Keep the transfer for a call, until :meth:`let_go`."""
        transfer.holders.add(holder)

    def let_go(self, number: int, holder: str) -> None:
        """The call needs the transfer no more."""
        transfer = self._transfers[number]
        transfer.holders.discard(holder)
        self._drop_unused(transfer)

    def landed(self, transfer: Transfer) -> None:
        """The flight has ended, with this or otherwise: only those who hold the transfer get it."""
        transfer.flying = False
        self._drop_unused(transfer)

    def frame(self, number: int) -> Any | None:
        """Return the tensors of a transfer, ``None`` where it is over."""
        transfer = self._transfers.get(number)
        return None if transfer is None else transfer.frame

    def bytes_of(self, numbers: Iterable[int]) -> int:
        """Return the bytes of these transfers."""
        return sum(self._transfers[number].nbytes for number in numbers)

    def _drop_unused(self, transfer: Transfer) -> None:
        if not transfer.flying and not transfer.holders:
            del self._transfers[transfer.number]
            self.nbytes -= transfer.nbytes

    def validate(self) -> None:
        """Check every invariant.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        assert self.nbytes == sum(transfer.nbytes for transfer in self), "the bytes of transfers are miscounted"
        assert self.nbytes <= self.max_bytes, "transfers have more bytes than the budget"
        for number, transfer in self._transfers.items():
            assert transfer.number == number, f"transfer {number} is found by another number"
            assert transfer.flying or transfer.holders, f"nobody needs transfer {number}"
            assert not transfer.holders or transfer.frame is not None, f"transfer {number} is held before it is filled"
