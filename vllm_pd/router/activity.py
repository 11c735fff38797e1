"""What the router did in the last minutes, for people who watch it.

Prometheus has the whole story, but needs somebody to collect it. This is enough for
the dashboard of one router process and is forgotten after ``WINDOW_S``.
"""

from __future__ import annotations

import enum
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
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
    counts: Counter[tuple[Tally, str]] = field(default_factory=Counter)

    def total(self, tally: Tally) -> int:
        """Return a count of all labels together."""
        return sum(count for (what, _), count in self.counts.items() if what is tally)


class Activity:
    """Durations and counts of the last ``WINDOW_S``.

    Args:
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slices: deque[Slice] = deque(maxlen=NUM_SLICES)
        self.began = clock()

    @property
    def age_s(self) -> float:
        """Seconds since it began to count."""
        return self._clock() - self.began

    def span_s(self, num_slices: int) -> float:
        """Return how much time the last slices cover so far, in seconds; at least one."""
        whole = (num_slices - 1) * SLICE_S
        return max(1.0, min(self.age_s, whole + self._clock() % SLICE_S))

    def time(self, what: Timed, seconds: float) -> None:
        """Take note of one duration."""
        self.time_all(what, (bucket_of(seconds),), seconds)

    def time_all(self, what: Timed, buckets: Collection[int], total_s: float) -> None:
        """Take note of many durations, given by their buckets, and of their sum."""
        spreads = self._now().spreads
        spread = spreads.get(what)
        if spread is None:
            spread = spreads[what] = Spread()
        spread.add(buckets, total_s)

    def count(self, what: Tally, label: str = "", num: int = 1) -> None:
        """Take note that something happened."""
        self._now().counts[what, label] += num

    def recent(self) -> list[Slice]:
        """Return what happened, one slice after the other; the last one is not over yet.

        There are always ``NUM_SLICES`` of them. Nothing happened in those before its
        beginning.
        """
        last = self._number()
        known = {one.number: one for one in self._slices}
        return [
            known.get(number) or Slice(number) for number in range(last - NUM_SLICES + 1, last + 1)
        ]

    def _now(self) -> Slice:
        number = self._number()
        slices = self._slices
        if not slices or slices[-1].number != number:
            slices.append(Slice(number))
        return slices[-1]

    def _number(self) -> int:
        return int(self._clock() // SLICE_S)
