"""What the writer refuses to take on: more work than it has room for, and keys that took lanes down.

Every flight that was opened holds a reservation of one item and of its medium's bytes, from before the bytes are asked
for until the flight ends, whatever state it is in. A request is refused as a whole, before anything is pinned or asked
for, when its new flights do not fit: nothing half-done has to be taken back, and the caller knows at once.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from mmprep import errors

#: Lanes lost over one key within the quarantine time after which its offers are refused.
STRIKES = 2
#: What happened to a lane of which nothing else is known than that it is gone.
CRASHED = "the process that decoded it crashed"
_NONE = (0, 0.0, "")
#: Bounds of the seconds that a refused caller is told to wait.
MIN_RETRY_AFTER = 0.5
MAX_RETRY_AFTER = 60.0
#: Weight of the latest interval between two ends of flights in their smoothed mean.
_SMOOTHING = 0.1
#: Seconds between two ends of flights that are assumed before any was seen.
_FIRST_INTERVAL = 0.1


class Admission:
    """Reservations of flights.

    Parameters
    ----------
    max_items, max_bytes:
        Flights, and bytes of their media, that are asked for, queued and running at a time.
    max_items_per_client:
        Flights that one client may have opened.
    """

    def __init__(self, *, max_items: int, max_bytes: int, max_items_per_client: int) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._max_items_per_client = min(max_items_per_client, max_items)
        #: ``{flight_id: (client, bytes)}``
        self._held: dict[int, tuple[str, int]] = {}
        self._by_client: dict[str, int] = {}
        self._bytes = 0
        self._interval = _FIRST_INTERVAL
        #: When the last flight ended, or the first one was opened after nothing was to do.
        self._since = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, flight_id: int) -> bool:
        return flight_id in self._held

    def reservation(self, flight_id: int) -> tuple[str, int]:
        """Return who opened the flight, and the bytes that are reserved for its medium."""
        return self._held[flight_id]

    @property
    def bytes(self) -> int:
        """Bytes of the media of all reservations."""
        return self._bytes

    def check(self, client: str, sizes: Sequence[int]) -> None:
        """Refuse a request whose new flights do not fit; nothing changes.

        Parameters
        ----------
        sizes:
            Bytes of the medium of each flight that the request would open.

        Raises
        ------
        mmprep.errors.Busy
            They do not fit at the moment; ``retry_after`` estimates when they may.
        mmprep.errors.TooLarge
            They would never fit.
        """
        items, nbytes = len(sizes), sum(sizes)
        if not items:
            return
        if items > self._max_items_per_client:
            raise errors.TooLarge(
                f"The request has {items} media to process, above the limit of {self._max_items_per_client} at a time; "
                "send fewer of them in one request."
            )
        if nbytes > self._max_bytes:
            raise errors.TooLarge(
                f"The request's media have {nbytes} bytes, above the limit of {self._max_bytes} at a time; "
                "send smaller or fewer ones."
            )
        mine = self._by_client.get(client, 0)
        if mine + items > self._max_items_per_client:
            excess = (mine + items - self._max_items_per_client) / mine
            raise self._busy(f"{mine} of your media are in work already; wait for some of them.", excess)
        excess_items = (len(self._held) + items - self._max_items) / max(len(self._held), 1)
        excess_bytes = (self._bytes + nbytes - self._max_bytes) / max(self._bytes, 1)
        if (excess := max(excess_items, excess_bytes)) > 0:
            raise self._busy("All room for media in work is taken; send the request again later.", excess)

    def add(self, flight_id: int, client: str, nbytes: int, now: float) -> None:
        """Reserve for a flight that was opened, after :meth:`check` allowed it in the same step."""
        assert flight_id not in self._held, f"flight {flight_id} has a reservation already"
        if not self._held:
            self._since = now
        self._held[flight_id] = (client, nbytes)
        self._by_client[client] = self._by_client.get(client, 0) + 1
        self._bytes += nbytes

    def release(self, flight_id: int, now: float) -> bool:
        """The flight has ended; ``False`` where it holds nothing (any more)."""
        held = self._held.pop(flight_id, None)
        if held is None:
            return False
        client, nbytes = held
        self._bytes -= nbytes
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]
        self._interval += _SMOOTHING * (max(now - self._since, 0.0) - self._interval)
        self._since = now
        return True

    def _busy(self, message: str, excess: float) -> errors.Busy:
        """``excess``: the share of what is held, by the client or by all, that has to end first."""
        seconds = excess * len(self._held) * self._interval
        return errors.Busy(message, retry_after=min(max(seconds, MIN_RETRY_AFTER), MAX_RETRY_AFTER))

    def validate(self) -> None:
        """Check every invariant.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        counts: dict[str, int] = {}
        for client, _ in self._held.values():
            counts[client] = counts.get(client, 0) + 1
        assert counts == self._by_client, "the counts by client and the reservations differ"
        assert self._bytes == sum(nbytes for _, nbytes in self._held.values()), "the bytes do not add up"
        assert len(self._held) <= self._max_items, "more flights than allowed"
        assert self._bytes <= self._max_bytes, "more bytes than allowed"
        assert max(counts.values(), default=0) <= self._max_items_per_client, "a client has more flights than allowed"
        assert 0 <= self._interval < math.inf, "the smoothed interval is no duration"


class Quarantine:
    """Keys over which lanes were lost. The second loss within the time refuses the key's offers for that time.

    A key includes its scope, so nobody can put another's media here.

    Parameters
    ----------
    max_keys:
        Keys that are remembered; the first to expire are forgotten first.
    seconds:
        How long a key's latest loss counts.
    """

    def __init__(self, *, max_keys: int, seconds: float) -> None:
        self._max_keys = max_keys
        self._seconds = seconds
        #: ``{key: (strikes, until, what happened last)}`` in the order of expiry.
        self._keys: OrderedDict[bytes, tuple[int, float, str]] = OrderedDict()

    def __len__(self) -> int:
        """Keys whose offers are refused, including those that are over and not pruned yet."""
        return sum(strikes >= STRIKES for strikes, _, _ in self._keys.values())

    def strike(self, key: bytes, now: float, why: str = CRASHED) -> errors.MediaError | None:
        """A lane was lost over this key; returns the error for those who wait for it if that was once too often.

        ``why``: what happened, as a clause for those who sent the medium.
        """
        self.prune(now)
        strikes = self._keys.pop(key, _NONE)[0] + 1
        self._keys[key] = (strikes, now + self._seconds, why)
        if len(self._keys) > self._max_keys:
            self._keys.popitem(last=False)
        return self.refusal(key, now)

    def forgive(self, key: bytes) -> None:
        """The key's item was computed after all."""
        self._keys.pop(key, None)

    def clear(self) -> None:
        """Forget every key: whoever clears the cache wants what is in it to be tried again."""
        self._keys.clear()

    def refusal(self, key: bytes, now: float) -> errors.MediaError | None:
        """Return the error with which the key's offers are refused, if they are."""
        strikes, until, why = self._keys.get(key, _NONE)
        if strikes < STRIKES or until <= now:
            return None
        return errors.MediaError(
            f"Processing this medium broke off {strikes} times, the last time because {why}; it is refused for another "
            f"{math.ceil(until - now)} seconds. Send a smaller or newly encoded one."
        )

    def prune(self, now: float) -> None:
        """Forget what is over."""
        while self._keys and next(iter(self._keys.values()))[1] <= now:
            self._keys.popitem(last=False)

    def validate(self) -> None:
        """Check every invariant.

        Raises
        ------
        AssertionError
            One does not hold; the message says which.
        """
        assert len(self._keys) <= self._max_keys, "more keys than allowed"
        untils = [until for _, until, _ in self._keys.values()]
        assert untils == sorted(untils), "the keys are not in the order of expiry"
