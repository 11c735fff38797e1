"""The pace of streams: the time between their parts as they pass the router."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from vllm_pd.router.spread import buckets_between

_MAX_KEPT = 64
"""Times that are kept before their gaps are counted: thousands of streams keep them."""


class CountGaps(Protocol):
    """Takes gaps between the parts of a stream."""

    def __call__(self, buckets: list[int], total_s: float, /) -> None:
        """Count gaps, given by ``bucket_of``, and their sum."""


class Pace:
    """Times the parts of one stream.

    Every part of every stream passes here, so a part costs a reading of the clock and
    little more; the gaps are counted many at once. Those at both ends are left out: the
    role that begins a chat and the event that ends a stream come along with a token.

    Args:
        count: takes the gaps.
        clock: a monotonic clock, in seconds.
    """

    __slots__ = ("_clock", "_count", "_first", "_times")

    def __init__(self, count: CountGaps, clock: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._clock = clock
        self._times: list[float] = []
        self._first = 1

    def note(self) -> None:
        """A part has come."""
        times = self._times
        times.append(self._clock())
        if len(times) >= _MAX_KEPT:
            self.flush()

    def flush(self) -> None:
        """Count the gaps so far, but for that before the last part: it may be the end."""
        times = self._times[self._first : -1]
        if len(times) > 1:
            self._count(buckets_between(times), times[-1] - times[0])
            self._times = self._times[-2:]
            self._first = 0
