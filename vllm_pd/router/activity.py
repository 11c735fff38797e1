"""What the router did in the last minutes, for people who watch it.

Prometheus has the whole story, but needs somebody to collect it. This is enough for
the dashboard and is forgotten after ``WINDOW_S``. The slices of all processes of a host
are counted on the same clock, so those of the workers of one router can be put together.
"""

from __future__ import annotations

import enum
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from vllm_pd.router.spread import Spread, bucket_of

SLICE_S = 5.0
NUM_SLICES = 60
WINDOW_S = SLICE_S * NUM_SLICES
"""How far back it remembers, in seconds."""


class Timed(enum.StrEnum):
    """What is timed of a request, in the order in which it happens."""

    DECODE_QUEUE = "decode_slot"  # wait for a slot of the stage, in the router
    PREFILL_QUEUE = "prefill_slot"  # likewise
    PREFILL = "prefill"
    ENGINE_QUEUE = "decode_queue"  # in the decode engine, until it has blocks
    KV_HANDOVER = "kv_handover"
    DECODE_START = "decode_start"  # from the decode leg to the first bytes of a stream
    FIRST_TOKEN = "first_token"
    INTER_TOKEN = "inter_token"
    REQUEST = "request"


class Tally(enum.StrEnum):
    """What is counted. Most of it by a label, such as the status."""

    CODE = "code"
    PATH = "path"
    DECODE_ONLY = "decode_only"
    PREFILL_RETRY = "prefill_retry"
    PROMPT_TOKENS = "prompt_tokens"


@dataclass(slots=True)
class Slice:
    """What happened in one slice of time.

    Attributes:
        number: of the slice, counted on the clock.
        spreads: durations.
        counts: by what is counted and its label.
    """

    number: int
    spreads: dict[Timed, Spread] = field(default_factory=dict)
    counts: dict[tuple[Tally, str], int] = field(default_factory=dict)

    def total(self, tally: Tally) -> int:
        """Return a count of all labels together."""
        return sum(count for (what, _), count in self.counts.items() if what is tally)

    def count(self, key: tuple[Tally, str], num: int) -> None:
        """Take note that something happened."""
        self.counts[key] = self.counts.get(key, 0) + num

    def merge(self, other: Slice) -> None:
        """Count all that another one counts, too."""
        for what, spread in other.spreads.items():
            self.spreads.setdefault(what, Spread()).merge(spread)
        for key, num in other.counts.items():
            self.count(key, num)


def window_of(slices: Iterable[Slice], now: float) -> list[Slice]:
    """Put slices together: one after the other until ``now``; the last one is not over yet.

    There are always ``NUM_SLICES`` of them. Those in which nothing happened are empty, and
    what is older is left out.
    """
    first = _number_at(now) - NUM_SLICES + 1
    window = [Slice(number) for number in range(first, first + NUM_SLICES)]
    for one in slices:
        if 0 <= one.number - first < NUM_SLICES:
            window[one.number - first].merge(one)
    return window


def span_s(num_slices: int, *, age_s: float, now: float) -> float:
    """Return how much time the last slices cover so far, in seconds; at least one.

    Args:
        num_slices: how many.
        age_s: seconds since anything was counted.
        now: time on the clock of the slices.
    """
    whole = (num_slices - 1) * SLICE_S
    return max(1.0, min(age_s, whole + now % SLICE_S))


def _number_at(now: float) -> int:
    return int(now // SLICE_S)


class Activity:
    """Durations and counts of the last ``WINDOW_S``.

    Args:
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slices: deque[Slice] = deque(maxlen=NUM_SLICES)
        self._current = Slice(0)
        self._ends_at = -math.inf
        self.began = clock()

    @property
    def age_s(self) -> float:
        """Seconds since it began to count."""
        return self._clock() - self.began

    @property
    def slices(self) -> tuple[Slice, ...]:
        """What happened, in slices that change; some may be too old to be of interest."""
        return tuple(self._slices)

    def time(self, what: Timed, seconds: float) -> None:
        """Take note of one duration."""
        self.add(what, bucket_of(seconds), seconds)

    def add(self, what: Timed, bucket: int, seconds: float) -> None:
        """Take note of one duration whose bucket is known."""
        self._spread(what).add_one(bucket, seconds)

    def time_all(self, what: Timed, buckets: Collection[int], total_s: float) -> None:
        """Take note of many durations, given by their buckets, and of their sum."""
        self._spread(what).add(buckets, total_s)

    def count(self, what: Tally, label: str = "", num: int = 1) -> None:
        """Take note that something happened."""
        self._now().count((what, label), num)

    def recent(self) -> list[Slice]:
        """Return what happened, as ``window_of`` puts it together."""
        return window_of(self._slices, self._clock())

    def _spread(self, what: Timed) -> Spread:
        spreads = self._now().spreads
        spread = spreads.get(what)
        if spread is None:
            spread = spreads[what] = Spread()
        return spread

    def _now(self) -> Slice:
        if self._clock() >= self._ends_at:
            number = _number_at(self._clock())
            self._current = Slice(number)
            self._slices.append(self._current)
            self._ends_at = (number + 1) * SLICE_S
        return self._current
