"""When a fetch that failed is tried again. Pure: no clock, no sleep, no random source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

_SECONDS = re.compile(r"[0-9]{1,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential pauses with full jitter (each as long as anything from nothing to its ceiling).

    Parameters
    ----------
    tries:
        At most so many, the first one included.
    first:
        Ceiling of the first pause, seconds; each further one is twice as high.
    longest:
        No ceiling is higher, seconds.
    """

    tries: int = 3
    first: float = 0.2
    longest: float = 2.0

    def pause(self, failed: int, *, left: float, chance: float, retry_after: float | None = None) -> float | None:
        """Return the seconds until the next try, ``None`` for none.

        Parameters
        ----------
        failed:
            Tries that failed, at least 1.
        left:
            Seconds until the deadline. No pause reaches it.
        chance:
            A random number from 0 up to and without 1.
        retry_after:
            Seconds for which the host asked to be left alone; the jitter comes on top.
        """
        if failed >= self.tries:
            return None
        ceiling = min(self.longest, self.first * 2 ** (failed - 1))
        pause = chance * ceiling + (retry_after or 0.0)
        return pause if pause < left else None


def read_retry_after(text: str | None, now: float) -> float | None:
    """Return the seconds that a ``Retry-After`` header means, ``None`` where there is none that can be read.

    Parameters
    ----------
    text:
        The header's value: seconds, or a date.
    now:
        Seconds since 1970.
    """
    if text is None:
        return None
    text = text.strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
