"""When the frames of a video are shown and where decoding may begin, as its packets say; headers are not believed.

A container's header may lie about the number of frames, their rate and the duration, or be silent. So all packets are
read once, without decoding them: a frame is a time at which one is shown. Times are whole numbers of ticks.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from mmprep.errors import DecodeError, TooLarge

#: How far a rate that a header tells may be from the measured one, as a part of it.
_TOLERANCE = Fraction(1, 100)
#: Frames a second that the longest video may have throughout.
_DENSEST = 240
#: The rate of a single frame of unknown duration; transformers assumes it of videos without one.
_USUAL_RATE = Fraction(24)


class Timeline:
    """The packets of one video, noted one by one in the order in which they are decoded.

    Parameters
    ----------
    tick: seconds of the unit of time.
    longest: seconds that the video may last, ``--max-video-duration``.
    """

    def __init__(self, tick: Fraction, longest: float) -> None:
        self.tick = tick
        self.packets = 0
        self._longest = longest
        self._shown = array("q")
        self._first = self._last = 0
        self._last_duration = 0
        #: Of the key packets: their times in order, and their numbers; and the last time among those before.
        self._key_times = array("q")
        self._key_packets = array("q")

    def note(self, time: int, *, duration: int, key: bool, shown: bool) -> None:
        """Note the next packet.

        Parameters
        ----------
        time, duration: when its frame is shown and for how long, in ticks; 0: not known.
        key: decoding may begin with it.
        shown: it has a frame that is shown.

        Raises
        ------
        TooLarge
            The video is too long, or has more frames than the longest one may have.
        """
        if key and (not self._key_times or time > self._key_times[-1]):
            self._key_times.append(time)
            self._key_packets.append(self.packets)
        self.packets += 1
        if not shown:
            return
        if not self._shown:
            self._first = self._last = time
        if time >= self._last:
            self._last, self._last_duration = time, max(0, duration)
        self._first = min(self._first, time)
        self._shown.append(time)
        self._check_duration(self._last - self._first)
        most = max(1, int(self._longest * _DENSEST))
        if len(self._shown) > most:
            raise TooLarge(
                f"the video has more than {most} frames, {_DENSEST} a second for the longest one "
                "(--max-video-duration); send it with fewer"
            )

    def _check_duration(self, ticks: int) -> None:
        if ticks * self.tick > self._longest:
            raise TooLarge(
                f"the video is longer than the limit of {self._longest:g} seconds (--max-video-duration); cut it"
            )

    def close(self, told: Iterable[Fraction | None]) -> Schedule:
        """Return what the packets amount to, when all have been noted.

        Parameters
        ----------
        told: rates that the header tells, in frames a second, the most trusted first.

        Raises
        ------
        DecodeError
            There is no frame.
        TooLarge
            The video is too long with its last frame.
        """
        times = array("q", sorted(set(self._shown)))
        if not times:
            raise DecodeError("the video has no frames")
        self._check_duration(self._last + self._last_duration - self._first)
        rate = _rate(len(times), (times[-1] - times[0]) * self.tick, self._last_duration * self.tick, self.tick, told)
        return Schedule(times, self._key_times, self._key_packets, float(rate))


class Start(NamedTuple):
    """Where decoding may begin: the number of a packet, and when its frame is shown."""

    packet: int
    time: int


class Schedule:
    """The frames of one video.

    Attributes
    ----------
    times: when each is shown, in ticks, ascending.
    rate: frames a second.
    """

    def __init__(self, times: Sequence[int], key_times: Sequence[int], key_packets: Sequence[int], rate: float) -> None:
        self.times = times
        self.rate = rate
        self._key_times = key_times
        self._key_packets = key_packets

    def start(self, time: int) -> Start:
        """Return where decoding must begin to reach the frame shown at ``time``: the last key packet shown by then.

        What is decoded from it on and shown from its time on needs nothing before it.
        """
        position = bisect_right(self._key_times, time)
        if not position:
            return Start(0, self.times[0])
        return Start(self._key_packets[position - 1], self._key_times[position - 1])


def _rate(frames: int, span: Fraction, last: Fraction, tick: Fraction, told: Iterable[Fraction | None]) -> Fraction:
    """Return frames a second: a told rate where the times agree with it, else what they amount to.

    Parameters
    ----------
    frames: how many.
    span: seconds from the first to the last.
    last: duration of the last one in seconds, 0: not known.
    """
    rates = [rate for rate in told if rate is not None and rate > 0]
    if frames == 1:
        return rates[0] if rates and rates[0] < _DENSEST else _USUAL_RATE
    duration = span + (last or span / (frames - 1))
    measured = frames / duration
    allowed = _TOLERANCE + 2 * tick / duration
    return next((rate for rate in rates if abs(rate / measured - 1) <= allowed), measured)
