"""How durations are spread: counts by bucket, fine enough for percentiles. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise

import msgspec

_STEPS = (
    *(1.0, 1.12, 1.25, 1.4, 1.6, 1.8, 2.0, 2.25, 2.5, 2.8),
    *(3.15, 3.55, 4.0, 4.5, 5.0, 5.6, 6.3, 7.1, 8.0, 9.0),
)

# Read from text, so that they are the very numbers that a literal such as 0.025 gives.
BOUNDS: Sequence[float] = tuple(
    float(f"{step}e{exponent}") for exponent in range(-5, 3) for step in _STEPS
)
"""Upper bounds of the buckets in seconds, 10 µs to 900 s; neighbours are about an eighth apart."""


def bucket_of(seconds: float) -> int:
    """Return the index of the bucket; the last one has no upper bound."""
    return bisect_left(BOUNDS, seconds)


def buckets_between(times: Sequence[float]) -> list[int]:
    """Return the buckets of the durations from one time to the next."""
    find, bounds = bisect_left, BOUNDS  # this is done for every part of every stream
    return [find(bounds, later - earlier) for earlier, later in pairwise(times)]


class Spread(msgspec.Struct, array_like=True):
    """Durations, by bucket.

    Attributes:
        num: how many there are.
        total_s: their sum.
        counts: how many are in each bucket that has any.
    """

    num: int = 0
    total_s: float = 0.0
    counts: dict[int, int] = {}  # msgspec gives each its own

    def add(self, buckets: Collection[int], total_s: float) -> None:
        """Count durations, given by ``bucket_of``, and their sum."""
        counts = self.counts
        for bucket in buckets:
            counts[bucket] = counts.get(bucket, 0) + 1
        self.num += len(buckets)
        self.total_s += total_s

    def add_one(self, bucket: int, seconds: float) -> None:
        """Count one duration."""
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.num += 1
        self.total_s += seconds

    def merge(self, other: Spread) -> None:
        """Count all durations of another one, too."""
        counts = self.counts
        for bucket, count in other.counts.items():
            counts[bucket] = counts.get(bucket, 0) + count
        self.num += other.num
        self.total_s += other.total_s

    def quantile(self, share: float) -> float | None:
        """Return the duration that ``share`` of all do not exceed, in seconds; None of none.

        Inside a bucket, durations are taken to be spread evenly. Of those beyond the last
        bound nothing is known but that.
        """
        if not self.num:
            return None
        rank, seen = share * self.num, 0
        for bucket, count in sorted(self.counts.items()):
            if bucket < len(BOUNDS) and seen + count >= rank:
                lower = BOUNDS[bucket - 1] if bucket else 0.0
                return lower + (BOUNDS[bucket] - lower) * (rank - seen) / count
            seen += count
        return BOUNDS[-1]

    def cumulative(self, bounds: Sequence[float]) -> list[int]:
        """Return how many do not exceed each of some ``BOUNDS``, which must ascend."""
        ends = [bucket_of(bound) for bound in bounds]
        found = [0] * (len(bounds) + 1)
        for bucket, count in self.counts.items():
            found[bisect_left(ends, bucket)] += count
        return list(accumulate(found[:-1]))
