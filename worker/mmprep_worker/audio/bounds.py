"""What a recording may be at most, and the errors that say so."""

from __future__ import annotations

import re

from mmprep.errors import InvalidRequest, TooLarge, UnsupportedMedia

#: 7.1 surround sound; what has more is no recording of somebody who speaks.
MAX_CHANNELS = 8
#: Samples a second: from below the poorest telephone to the best studio.
MIN_RATE, MAX_RATE = 4_000, 192_000


def check_sound(rate: int, channels: int) -> None:
    """Refuse a recording with too many channels, or with a rate that nobody records at.

    Raises
    ------
    TooLarge
        More channels than :data:`MAX_CHANNELS`.
    UnsupportedMedia
        Fewer samples a second than :data:`MIN_RATE`, or more than :data:`MAX_RATE`.
    """
    if channels > MAX_CHANNELS:
        raise TooLarge(f"the recording has {channels} channels, above the limit of {MAX_CHANNELS}; mix it down")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise UnsupportedMedia(
            f"the recording has {rate} samples a second; from {MIN_RATE} to {MAX_RATE} are read: resample it"
        )


def check_seconds(seconds: float, max_seconds: float) -> None:
    """Refuse a recording that is too long; raises TooLarge."""
    if seconds > max_seconds:
        raise TooLarge(
            f"the recording is longer than {max_seconds:g} seconds, the limit of this service (--max-audio-duration); "
            "send a shorter one"
        )


def too_short(samples: int, least: int, rate: int) -> InvalidRequest:
    """Return the error for a recording of so many samples, where the model needs ``least`` at ``rate`` a second."""
    return InvalidRequest(
        f"the recording is too short: it has {samples} samples at {rate} a second, and this model needs at least "
        f"{least} ({least / rate:g} seconds)"
    )


def reason(error: BaseException, text: str | None) -> str:
    """Return a decoder's words where they are plain text, without what could name an object or a place."""
    said = (text or str(error)).strip().rstrip(".")
    return said if re.fullmatch(r"[\w ,.:()'-]{4,120}", said) else "its data cannot be decoded"
